// The product of a matrix with many tokens' activations on tensor cores: out (tokens, out) = x (tokens, in) Wᵀ.
//
// The matrix is the first operand of m16n8k16, so each code is decoded once, in registers, by the warp that owns its row, and
// serves all tokens of the warp's tile. Activations are the second, from shared memory. Copies run ahead of the products by
// one to three stages.
//
// A stage is 32 CHUNKS inputs. The sum over inputs has no order of its own, so lane t of a quad takes a run of neighbouring
// ones: with CHUNKS 4 it owns 32 of 128, which is one block of 4-bit codes, has one scale whatever the group, and is read with
// the widest loads. Each of the eight products over a stage takes four neighbours of each lane, columns 2t, 2t + 1, 2t + 8 and
// 2t + 9 of the fragments: two registers of one load next to each other, as a product wants its second operand. Of float16
// both operands come by ldmatrix, inputs in their order.
//
// A group's scale multiplies its weights in float16 before the product, an error of 2^-12 of a weight at most, which is that
// of the activations too. Rows 2g and 2g + 1 of an m16 tile lie at its rows g and g + 8: what a lane stores is then two
// neighbours of a token.
#include "device.cuh"

namespace gemm {

// What becomes of a product: float16 (saturated), float32, added to float32, the softplus of it and a bias in float32, or the
// part of a split in float32: part s at out + s tokens out_stride.
enum Epilogue { kHalf = 0, kFloat = 1, kAdd = 2, kSoftplus = 3, kPart = 4 };

COBRA_DEVICE float softplus(float v) { return v > 20.f ? v : log1pf(expf(v)); }
// Bytes 2i and 2i + 1 of four, each under the exponent of 1024.
COBRA_DEVICE half2 spread(uint32_t v, int i) {
    return halves_of(permute_bytes(v, 0x64646464u, i ? 0x4342u : 0x4140u));
}
COBRA_DEVICE uint32_t scaled(half2 v, half2 scale) { return bits_of(multiply(v, scale)); }

// Where the 16 bytes `chunk` of a row lie, so that the eight lanes of a phase, two rows of four lanes, meet eight different
// banks.
template <int ROW_BYTES>
COBRA_DEVICE int swizzled(int row, int chunk) {
    if (ROW_BYTES == 256) return chunk ^ (chunk >> 3 & 1) ^ (row & 1) << 1;
    if (ROW_BYTES == 128) return chunk ^ (row & 1);
    return chunk;
}
// The same for the eight lanes that read one column of eight rows of 128 bytes.
COBRA_DEVICE int swizzled_for_matrices(int row, int chunk) {
    return chunk ^ (row & 7);
}

// A lane's share of a row of codes in a stage. `pair` yields the weights of step i, of the lane's first half and of its
// second. A lane's share of half a stage of a row of codes: four products, of inputs 8h .. 8h + 7 and 8h + 16 .. 8h + 23 of
// its 32. `pairs` yields the weights of product i: two inputs and the next two. kCopiers threads copy a row, each its part of
// it, kCopy bytes at a time.
template <int BITS>
struct Codes;

template <>
struct Codes<4> {
    static constexpr int kChunks = 4, kRowBytes = 64, kCopy = 16, kCopiers = 4;
    uint2 w;
    COBRA_DEVICE_MEMBER void read(const unsigned char* rows, int slot, int t, int h) {
        w = load(reinterpret_cast<const uint2*>(rows + slot * kRowBytes + t * 16 + h * 8));
    }
    COBRA_DEVICE_MEMBER void pairs(int i, half2 scale, uint32_t& first, uint32_t& second) const {
        const uint32_t v = (i & 1 ? w.y : w.x) & (i < 2 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
        first = value(i, spread(v, 0), scale), second = value(i, spread(v, 1), scale);
    }
    // From 1024 + code, or 1024 + 16 code: minus 1032, or a sixteenth minus 72, both exact.
    static COBRA_DEVICE_MEMBER uint32_t value(int i, half2 v, half2 scale) {
        return scaled(
            i < 2 ? subtract(v, halves_of(0x64086408u)) : multiply_add(v, halves_of(0x2c002c00u), halves_of(0xd480d480u)),
            scale);
    }
};

template <>
struct Codes<8> {
    static constexpr int kChunks = 4, kRowBytes = 128, kCopy = 16, kCopiers = 8;
    uint2 w[2];
    COBRA_DEVICE_MEMBER void read(const unsigned char* rows, int slot, int t, int h) {
        for (int half = 0; half < 2; ++half)
            w[half] = load(reinterpret_cast<const uint2*>(rows + slot * kRowBytes +
                                                          swizzled<kRowBytes>(slot, 2 * t + half) * 16 + h * 8));
    }
    COBRA_DEVICE_MEMBER void pairs(int i, half2 scale, uint32_t& first, uint32_t& second) const {
        const uint32_t v = i & 1 ? w[i >> 1].y : w[i >> 1].x;
        const half2 zero = halves_of(0x64806480u);  // 1152, of 1024 + code
        first = scaled(subtract(spread(v, 0), zero), scale), second = scaled(subtract(spread(v, 1), zero), scale);
    }
};

// Two blocks of 64 codes a stage: a plane of two bits, codes j, j + 16, j + 32, j + 48 in byte j, then one of the top bits,
// codes j, j + 8, ... in byte j.
template <>
struct Codes<3> {
    static constexpr int kChunks = 4, kRowBytes = 48, kCopy = 8, kCopiers = 2;
    uint2 w, top;  // moved so that the first inputs' bits are 0, 1 and 2, and the second's 2, 3 and 4
    COBRA_DEVICE_MEMBER void read(const unsigned char* rows, int slot, int t, int h) {
        const uint2* block = reinterpret_cast<const uint2*>(rows + slot * kRowBytes + (t >> 1) * 24);
        const int shift = (t & 1) * 4;
        w = load(block + h), top = load(block + 2);
        w.x >>= shift, w.y >>= shift;
        top.x = top.x >> shift << 2 >> h, top.y = top.y >> shift << 2 >> h;
    }
    COBRA_DEVICE_MEMBER void pairs(int i, half2 scale, uint32_t& first, uint32_t& second) const {
        const uint32_t low = i & 1 ? w.y : w.x, high = i & 1 ? top.y : top.x;
        const uint32_t v = i < 2 ? (low & 0x03030303u) | (high & 0x04040404u) : (low & 0x0c0c0c0cu) | (high & 0x10101010u);
        first = value(i, spread(v, 0), scale), second = value(i, spread(v, 1), scale);
    }
    // From 1024 + code, or 1024 + 4 code: minus 1028, or a quarter minus 260, both exact.
    static COBRA_DEVICE_MEMBER uint32_t value(int i, half2 v, half2 scale) {
        return scaled(
            i < 2 ? subtract(v, halves_of(0x64046404u)) : multiply_add(v, halves_of(0x34003400u), halves_of(0xdc10dc10u)),
            scale);
    }
};

template <>
struct Codes<16> {
    static constexpr int kChunks = 2, kRowBytes = 128, kCopy = 16, kCopiers = 8;
};

// A block's tile: WARPS_M by WARPS_N warps, each of 16 MT rows by 8 NT tokens, with STAGES stages of copies.
template <int BITS, int MT, int NT, int WARPS_M, int WARPS_N, int STAGES>
struct Tile {
    typedef Codes<BITS> C;
    static constexpr int kBits = BITS, kThreads = 32 * WARPS_M * WARPS_N, kRows = 16 * MT * WARPS_M,
                         kTokens = 8 * NT * WARPS_N;
    static constexpr int kInputs = 32 * C::kChunks, kTokenBytes = 2 * kInputs;
    static constexpr int kCodesBytes = kRows * C::kRowBytes, kStageBytes = kCodesBytes + kTokens * kTokenBytes;
    static constexpr int kShare = C::kRowBytes / C::kCopiers, kChunksAToken = kTokenBytes / 16;

    static constexpr int kPartStride =
        20;  // floats between tokens of a warp's results: the lanes of a phase meet different banks
    static_assert(WARPS_M * WARPS_N * 8 * NT * kPartStride * 4 <= STAGES * kStageBytes,
                  "results are staged where the copies were");

    const unsigned char* codes;
    const half* x;
    int row0, token0, n_out, n_in, tokens, x_stride;

    // Where the 16 bytes `chunk` of a row of codes, or of a token, lie.
    static COBRA_DEVICE_MEMBER int code_place(int slot, int chunk) {
        return slot * C::kRowBytes +
               (BITS == 16 ? swizzled_for_matrices(slot, chunk) : swizzled<C::kRowBytes>(slot, chunk)) * 16;
    }
    static COBRA_DEVICE_MEMBER int token_place(int token, int chunk) {
        return token * kTokenBytes +
               (BITS == 16 ? swizzled_for_matrices(token, chunk) : swizzled<kTokenBytes>(token, chunk)) * 16;
    }
    static COBRA_DEVICE_MEMBER int slot_of(int row) { return (row & ~15) | (row & 1) << 3 | (row >> 1 & 7); }

    // Begin the copies of inputs k0 .. k0 + kInputs. What lies outside becomes zero; a product with it is zero, since scales
    // are finite.
    COBRA_DEVICE_MEMBER void copy(unsigned char* stage, int k0) const {
        const int row_bytes = n_in / 8 * BITS, at = k0 / 8 * BITS;
        constexpr int kRowStep = kThreads / C::kCopiers,
                      kTokenStep = kThreads / kChunksAToken;  // multiples of 16 rows and of 2 tokens: places repeat
        static_assert(kRowStep % 16 == 0 && kTokenStep % 2 == 0, "places are computed once");
        static_assert(BITS != 16 || kTokenStep % 8 == 0, "");
        {
            const int row = threadIdx.x / C::kCopiers, part = threadIdx.x % C::kCopiers, slot = slot_of(row);
            unsigned char* to = stage + (C::kCopy == 16 ? code_place(slot, part) : slot * C::kRowBytes + part * kShare);
            const unsigned char* from = codes + (size_t)(row0 + row) * row_bytes + at + part * kShare;
            const int inside = row_bytes - at - part * kShare;  // bytes of the row from there on
            int rows_left = n_out - row0 - row;
            COBRA_UNROLL_BY(1)
            for (int j = 0; j < kRows / kRowStep; ++j) {  // unrolled, its addresses take registers that products need
                COBRA_UNROLL
                for (int u = 0; u < kShare; u += C::kCopy) {
                    if (C::kCopy == 16) {
                        copy_ahead_16(to + j * kRowStep * C::kRowBytes, from, rows_left > 0 && inside > 0);
                    } else {
                        copy_ahead<8>(to + j * kRowStep * C::kRowBytes + u, from + u, rows_left > 0 && inside > u);
                    }
                }
                from += (size_t)kRowStep * row_bytes, rows_left -= kRowStep;
            }
        }
        const int token = threadIdx.x / kChunksAToken, chunk = threadIdx.x % kChunksAToken, k = k0 + 8 * chunk;
        unsigned char* to = stage + kCodesBytes + token_place(token, chunk);
        const half* from = x + (size_t)(token0 + token) * x_stride + k;
        int tokens_left = k < n_in ? tokens - token0 - token : 0;
        COBRA_UNROLL_BY(1) for (int j = 0; j < kTokens / kTokenStep; ++j) {
            copy_ahead_16(to + j * kTokenStep * kTokenBytes, from, tokens_left > 0);
            from += (size_t)kTokenStep * x_stride, tokens_left -= kTokenStep;
        }
    }
    static_assert(kRows * C::kCopiers % kThreads == 0 && kTokens * kChunksAToken % kThreads == 0, "threads copy equally much");
    static_assert(C::kCopy == 8 || kShare == 16, "");
};

struct Output {
    void* out;
    const float* bias;
    int n_out, tokens, stride, epilogue;

    // Rows row and row + 1 of a token.
    COBRA_DEVICE_MEMBER void put(int token, int row, float2 v) const {
        const bool both = row + 1 < n_out, together = both && (stride & 1) == 0;
        const size_t at = (size_t)token * stride + row;
        if (epilogue == kHalf) {
            half* to = static_cast<half*>(out) + at;
            const half2 h = to_halves(saturated(v.x), saturated(v.y));
            if (together) {
                store(reinterpret_cast<half2*>(to), h);
            } else {
                store(to, h.x);
                if (both) store(to + 1, h.y);
            }
            return;
        }
        float* to = static_cast<float*>(out) + at + (epilogue == kPart ? (size_t)blockIdx.z * tokens * stride : 0);
        if (epilogue == kSoftplus)
            v = make_float2(softplus(v.x + load_constant(bias + row)),
                            softplus(v.y + (both ? load_constant(bias + row + 1) : 0.f)));
        if (epilogue == kAdd) {
            const float2 before =
                together ? load(reinterpret_cast<const float2*>(to)) : make_float2(load(to), both ? load(to + 1) : 0.f);
            v = make_float2(before.x + v.x, before.y + v.y);
        }
        if (together) {
            store(reinterpret_cast<float2*>(to), v);
        } else {
            store(to, v.x);
            if (both) store(to + 1, v.y);
        }
    }
};

// Add the products of one stage to a warp's sums.
template <class T, int MT, int NT>
COBRA_DEVICE void products_of_stage(const unsigned char* rows, const unsigned char* activations, int warp_row, int warp_token,
                              const half2 (&scale)[MT][2], float (&sums)[MT][NT][4]) {
    typedef typename T::C C;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if constexpr (T::kBits == 16) {
        COBRA_UNROLL
        for (int k = 0; k < T::kInputs / 16; ++k) {
            uint32_t b[NT / 2][4];  // of two tiles of tokens each
            COBRA_UNROLL
            for (int n = 0; n < NT / 2; ++n)
                load_matrices(b[n], activations + T::token_place(warp_token + 16 * n + (lane >> 4) * 8 + (lane & 7),
                                                                 2 * k + (lane >> 3 & 1)));
            COBRA_UNROLL
            for (int m = 0; m < MT; ++m) {
                uint32_t a[4];
                load_matrices(a, rows + T::code_place(warp_row + 16 * m + (lane & 15), 2 * k + (lane >> 4)));
                COBRA_UNROLL
                for (int n = 0; n < NT; ++n) {
                    const uint32_t of_tokens[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    mma_16x8x16(sums[m][n], a, of_tokens);
                }
            }
        }
    } else {
        COBRA_UNROLL
        for (int h = 0; h < 2; ++h) {
            C codes[MT][2];
            COBRA_UNROLL
            for (int m = 0; m < MT; ++m) COBRA_UNROLL
            for (int r = 0; r < 2; ++r) codes[m][r].read(rows, warp_row + 16 * m + 8 * r + g, t, h);
            COBRA_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t a[MT][2][4];
                COBRA_UNROLL
                for (int m = 0; m < MT; ++m) COBRA_UNROLL
                for (int r = 0; r < 2; ++r) COBRA_UNROLL
                for (int i = 0; i < 2; ++i) codes[m][r].pairs(2 * half + i, scale[m][r], a[m][i][r], a[m][i][2 + r]);
                COBRA_UNROLL
                for (int n = 0; n < NT; ++n) {
                    const int token = warp_token + 8 * n + g;
                    const uint4 x =
                        load(reinterpret_cast<const uint4*>(activations + T::token_place(token, 4 * t + 2 * half + h)));
                    const uint32_t first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
                    COBRA_UNROLL
                    for (int m = 0; m < MT; ++m) mma_16x8x16(sums[m][n], a[m][0], first);
                    COBRA_UNROLL
                    for (int m = 0; m < MT; ++m) mma_16x8x16(sums[m][n], a[m][1], second);
                }
            }
        }
    }
}

template <int BITS, int MT, int NT, int WARPS_M, int WARPS_N, int STAGES>
COBRA_DEVICE void product(const unsigned char* codes, const half* scales, const half* x, const Output& output, int n_out, int n_in,
                    int group_shift, int tokens, int x_stride, int inputs_a_split) {
    typedef Tile<BITS, MT, NT, WARPS_M, WARPS_N, STAGES> T;
    COBRA_SHARED(room);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int warp_row = warp / WARPS_N * 16 * MT, warp_token = warp % WARPS_N * 8 * NT;
    T tile;
    tile.codes = codes, tile.x = x, tile.row0 = blockIdx.y * T::kRows, tile.token0 = blockIdx.x * T::kTokens;
    tile.n_out = n_out, tile.n_in = n_in, tile.tokens = tokens, tile.x_stride = x_stride;

    const int begin = blockIdx.z * inputs_a_split, end = min(begin + inputs_a_split, n_in);
    const int stages = (end - begin + T::kInputs - 1) / T::kInputs;
    const int groups = group_shift < 31 ? n_in >> group_shift : 1;  // of a row
    float sums[MT][NT][4] = {};
    COBRA_UNROLL
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < stages) tile.copy(room + s * T::kStageBytes, begin + s * T::kInputs);
        commit_copies();
    }
    for (int s = 0; s < stages; ++s) {
        half2 scale[MT][2];
        if (BITS != 16) {
            const int group = min((begin + s * T::kInputs + 32 * t) >> group_shift, groups - 1);
            COBRA_UNROLL
            for (int m = 0; m < MT; ++m) COBRA_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int row = min(tile.row0 + warp_row + 16 * m + 2 * g + r, n_out - 1);
                scale[m][r] = twice(load_constant(scales + row * groups + group));
            }
        }
        wait_copies<STAGES - 2>();
        sync_block();  // the stage is there for all, and all are done with the one that is overwritten now
        const int ahead = s + STAGES - 1;
        if (ahead < stages) tile.copy(room + ahead % STAGES * T::kStageBytes, begin + ahead * T::kInputs);
        commit_copies();

        const unsigned char* rows = room + s % STAGES * T::kStageBytes;
        products_of_stage<T>(rows, rows + T::kCodesBytes, warp_row, warp_token, scale, sums);
    }
    wait_copies<0>();
    sync_block();  // the last stage has been read by all

    float* staged = reinterpret_cast<float*>(room) + warp * 8 * NT * T::kPartStride;
    COBRA_UNROLL
    for (int m = 0; m < MT; ++m) {
        COBRA_UNROLL
        for (int n = 0; n < NT; ++n) COBRA_UNROLL
        for (int k = 0; k < 2; ++k)
            store(reinterpret_cast<float2*>(staged + (8 * n + 2 * t + k) * T::kPartStride + 2 * g),
                  make_float2(sums[m][n][k], sums[m][n][2 + k]));
        sync_warp();
        COBRA_UNROLL_BY(1) for (int i = lane; i < 64 * NT; i += 32) {
            const int token = tile.token0 + warp_token + i / 8, row = tile.row0 + warp_row + 16 * m + 2 * (i % 8);
            const float2 v = load(reinterpret_cast<const float2*>(staged + i / 8 * T::kPartStride + 2 * (i % 8)));
            if (token < tokens && row < n_out) output.put(token, row, v);
        }
        sync_warp();
    }
}

}  // namespace gemm

// codes: (out, in BITS / 8) bytes as the bundle packs them, at a multiple of 16; in: a multiple of 8 for float16; scales:
// (out, in >> group_shift) float16, one a row where group_shift is 31, none of float16. x: (tokens, in) float16, x_stride
// apart, at a multiple of 16. out: (tokens, out), out_stride apart, at a multiple of 8. A grid of (tiles of tokens, tiles of
// rows, splits), of inputs_a_split inputs each, a multiple of 128.
#define COBRA_GEMM(BITS, SIZE, MT, NT, WARPS_M, WARPS_N, STAGES)                                                             \
    COBRA_KERNEL(32 * WARPS_M * WARPS_N, gemm_w##BITS##_##SIZE)                                                              \
    (const unsigned char* __restrict__ codes, const half* __restrict__ scales, const half* __restrict__ x, void* out,        \
     const float* __restrict__ bias, int n_out, int n_in, int group_shift, int tokens, int x_stride, int out_stride,         \
     int epilogue, int inputs_a_split) {                                                                                     \
        gemm::product<BITS, MT, NT, WARPS_M, WARPS_N, STAGES>(codes, scales, x,                                              \
                                                              {out, bias, n_out, tokens, out_stride, epilogue}, n_out, n_in, \
                                                              group_shift, tokens, x_stride, inputs_a_split);                \
    }                                                                                                                        \
    COBRA_EXPORT(gemm_w##BITS##_##SIZE)

// Tiles of (rows, tokens): 64 by 16, where the codes' bytes are the bound; 128 by 64; and the largest that fits shared memory.
COBRA_GEMM(4, small, 1, 2, 4, 1, 6)
COBRA_GEMM(4, medium, 2, 8, 4, 1, 2)
COBRA_GEMM(4, large, 4, 8, 4, 2, 2)
COBRA_GEMM(3, small, 1, 2, 4, 1, 6)
COBRA_GEMM(3, medium, 2, 8, 4, 1, 2)
COBRA_GEMM(3, large, 2, 8, 4, 2, 2)
COBRA_GEMM(8, small, 1, 2, 4, 1, 4)
COBRA_GEMM(8, medium, 2, 8, 4, 1, 2)
COBRA_GEMM(8, large, 2, 8, 4, 2, 2)
COBRA_GEMM(16, small, 1, 2, 4, 1, 4)
COBRA_GEMM(16, medium, 2, 8, 4, 1, 2)
COBRA_GEMM(16, large, 4, 8, 2, 2, 3)

// What the splits of a product became, summed in their order. parts: (splits, tokens, width) float32.
namespace splits {
constexpr int kThreads = 128;
COBRA_DEVICE float sum(const float* parts, int n, size_t i, size_t stride) {
    float v = 0.f;
    COBRA_UNROLL_BY(1) for (int s = 0; s < n; ++s) v += load(parts + s * stride + i);
    return v;
}
}  // namespace splits

// out (tokens, width), out_stride apart: as `epilogue` of a product says, but for softplus and parts. A grid of (ceil(width /
// 128), tokens).
COBRA_KERNEL(splits::kThreads, sum_splits)(const float* __restrict__ parts, void* out, int n, int tokens, int width,
                                           int out_stride, int epilogue) {
    const int i = blockIdx.x * splits::kThreads + threadIdx.x, token = blockIdx.y;
    if (i >= width) return;
    const float v = splits::sum(parts, n, (size_t)token * width + i, (size_t)tokens * width);
    const size_t at = (size_t)token * out_stride + i;
    if (epilogue == gemm::kHalf) {
        store(static_cast<half*>(out) + at, to_half(saturated(v)));
    } else {
        float* to = static_cast<float*>(out) + at;
        store(to, epilogue == gemm::kAdd ? load(to) + v : v);
    }
}
COBRA_EXPORT(sum_splits)

// x_proj's product taken apart, for dt_proj and the scan: low: (tokens, low_stride) float16, saturated, the first dt_rank
// columns and then zeros; bc: (tokens, 2 states) float32, B and C, each d_state columns and then zeros. parts: (splits,
// tokens, dt_rank + 2 d_state). A grid of (ceil((low_stride + 2 states) / 128), tokens).
COBRA_KERNEL(splits::kThreads, split_projection)
(const float* __restrict__ parts, half* __restrict__ low, float* __restrict__ bc, int n, int tokens, int dt_rank,
 int low_stride, int d_state, int states) {
    const int i = blockIdx.x * splits::kThreads + threadIdx.x, token = blockIdx.y, width = dt_rank + 2 * d_state,
              state = i - low_stride;
    if (i >= low_stride + 2 * states) return;
    const int from = i < low_stride             ? (i < dt_rank ? i : -1)
                     : state % states < d_state ? dt_rank + state / states * d_state + state % states
                                                : -1;
    const float v = from < 0 ? 0.f : splits::sum(parts, n, (size_t)token * width + from, (size_t)tokens * width);
    if (i < low_stride) {
        store(low + (size_t)token * low_stride + i, to_half(saturated(v)));
    } else {
        store(bc + (size_t)token * 2 * states + state, v);
    }
}
COBRA_EXPORT(split_projection)
