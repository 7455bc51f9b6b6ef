// The product of a matrix with one token's activations.
//
//   out[row] = (add ? out[row] : 0) + root · sum over i of W[row, i] · x[i] · norm[i]
//
// norm (n_in,) may be null, for ones; root is 1 / sqrt(mean of mean_of² + eps), or 1 where mean_of is null: x itself before a
// layer, the residual stream before the head of a model whose stream is rotated. x, norm, mean_of and out are float32.
//
// gemv_w8, _w4, _w3: codes (n_out, n_in · bits / 8) as in a bundle, scales (n_out, n_in >> group_shift) float16, one a row
// where group_shift is 31. gemv_w16: float16 (n_out, row_stride), row_stride a multiple of 8, whatever lies behind n_in; n_in
// is anything.
//
// A warp takes 16 rows, 8 lanes each: 128 neighbouring bytes of four rows at a time, four times. A block of 128 threads has 64
// rows; with _split its warps share 16 rows, each a quarter of the inputs: for matrices of few rows, on a GPU of many
// multiprocessors. Grid: n_out / 64 or n_out / 16, rounded up. Shared memory: 512 bytes, and Rounded::bytes(min(n_in, 8192))
// or 4 · min(n_in, 8192) bytes.
#include "rounded.cuh"

namespace gemv {

using namespace cobra;

constexpr int kHead = 512;  // bytes of shared memory for sums between warps
constexpr int kRows = 4;    // of a lane

// Where a lane works.
template <bool SPLIT>
struct Place {
    int warp, lane8, row, first, step;
    COBRA_DEVICE_MEMBER Place() {
        const int lane = threadIdx.x & 31;
        warp = threadIdx.x >> 5;
        lane8 = lane & 7;
        row = (SPLIT ? blockIdx.x : blockIdx.x * kWarps + warp) * (4 * kRows) + (lane >> 3);
        first = SPLIT ? lane8 + 8 * warp : lane8;
        step = SPLIT ? 8 * kWarps : 8;
    }
    COBRA_DEVICE_MEMBER int at(int r, int n_out) const { return min(row + 4 * r, n_out - 1); }
};

// Sums over lanes, and warps where they share rows; the rows are written by one thread each.
template <bool SPLIT>
COBRA_DEVICE void finish(float (&sum)[kRows], float squares, const Place<SPLIT>& place, const float* mean_of, float eps, float* out,
                   int n_out, int n_in, int add, unsigned char* head) {
    float* between = (float*)head;    // (kWarps,)
    float* parts = between + kWarps;  // (kWarps, 4 * kRows)
    squares = sum_of_warp(squares);
    if ((threadIdx.x & 31) == 0) between[place.warp] = squares;
    COBRA_UNROLL
    for (int r = 0; r < kRows; ++r) {
        COBRA_UNROLL
        for (int d = 4; d; d >>= 1) sum[r] += shuffle_xor(sum[r], d);
        if (SPLIT && place.lane8 == 0) parts[place.warp * 4 * kRows + (threadIdx.x & 31) / 8 + 4 * r] = sum[r];
    }
    sync_block();
    const float root = mean_of ? reciprocal_root((between[0] + between[1] + between[2] + between[3]) / n_in + eps) : 1.f;
    if constexpr (SPLIT) {
        const int i = threadIdx.x, row = blockIdx.x * (4 * kRows) + i;
        if (i >= 4 * kRows || row >= n_out) return;
        const float total = parts[i] + parts[4 * kRows + i] + parts[8 * kRows + i] + parts[12 * kRows + i];
        out[row] = (add ? out[row] : 0.f) + total * root;
    } else {
        COBRA_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const int row = place.row + 4 * r;
            if (place.lane8 == 0 && row < n_out) out[row] = (add ? out[row] : 0.f) + sum[r] * root;
        }
    }
}

template <int BITS, bool SPLIT>
COBRA_DEVICE void product(const uint8_t* codes, const half* scales, const float* x, const float* norm, const float* mean_of,
                    float eps, float* out, int n_out, int n_in, int group_shift, int add) {
    using Block = Codes<BITS>;
    COBRA_SHARED(room);
    const Rounded<BITS> rounded(room + kHead, min(n_in, kTile));
    const Place<SPLIT> place;
    const int all_blocks = n_in / Block::kInputs, groups = groups_of(n_in, group_shift),
              shift = group_shift - Block::kLogInputs;
    uint32_t row_block[kRows], row_scale[kRows];  // a matrix has fewer than 2^32 blocks: an address is one instruction
    COBRA_UNROLL
    for (int r = 0; r < kRows; ++r) {
        row_block[r] = (uint32_t)place.at(r, n_out) * all_blocks;
        row_scale[r] = (uint32_t)place.at(r, n_out) * groups;
    }
    float sum[kRows] = {}, squares = 0.f;
    for (int tile = 0; tile < n_in; tile += kTile) {
        const int n = min(kTile, n_in - tile), end = (tile + n) / Block::kInputs, begin = tile / Block::kInputs;
        Block next[kRows];
        COBRA_UNROLL
        for (int r = 0; r < kRows; ++r)
            next[r] = Block::at(codes, row_block[r] + min(begin + place.first, end - 1));  // on their way while x is rounded
        if (tile) sync_block();
        squares +=
            rounded.fill(x + tile, norm ? norm + tile : nullptr, mean_of ? mean_of + tile : nullptr, n, place.warp, kWarps);
        sync_block();
        for (int b = begin + place.first; b < end; b += place.step) {
            Block now[kRows];
            COBRA_UNROLL
            for (int r = 0; r < kRows; ++r) {
                now[r] = next[r];
                next[r] = Block::at(codes, row_block[r] + min(b + place.step, end - 1));
            }
            const float s = rounded.scales[(b - begin) / (kGroup / Block::kInputs)];
            int total[kRows];
            multiply_blocks<BITS, kRows>(now, rounded, b - begin, total);
            COBRA_UNROLL
            for (int r = 0; r < kRows; ++r)
                sum[r] += (float)total[r] * (s * to_float(load_constant(scales + (row_scale[r] + (b >> shift)))));
        }
    }
    finish<SPLIT>(sum, squares, place, mean_of, eps, out, n_out, n_in, add, room);
}

// float16: activations stay float32. In shared memory the halves of 8 neighbours lie apart, so that 8 lanes read 128
// neighbouring bytes.
template <bool SPLIT>
COBRA_DEVICE void product_w16(const half* weights, const float* x, const float* norm, const float* mean_of, float eps, float* out,
                        int n_out, int n_in, int row_stride, int add) {
    constexpr int kInputs = 8;
    COBRA_SHARED(room);
    float* values = (float*)(room + kHead);
    const Place<SPLIT> place;
    float sum[kRows] = {}, squares = 0.f;
    for (int tile = 0; tile < n_in; tile += kTile) {
        const int n = min(kTile, row_stride - tile), blocks = n / kInputs;
        if (tile) sync_block();
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const bool inside = tile + i < n_in;
            const float v = inside ? x[tile + i] : 0.f;
            if (mean_of && inside) {
                const float m = mean_of[tile + i];
                squares += m * m;
            }
            values[(i / 4 % 2 * blocks + i / 8) * 4 + i % 4] = norm && inside ? v * norm[tile + i] : v;
        }
        sync_block();
        for (int b = place.first; b < blocks; b += place.step) {
            const float4 v0 = load((const float4*)values + b), v1 = load((const float4*)values + blocks + b);
            COBRA_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const uint4 w = load_streaming((const uint4*)(weights + (size_t)place.at(r, n_out) * row_stride + tile) + b);
                const float2 a = to_floats(halves_of(w.x)), c = to_floats(halves_of(w.y)), d = to_floats(halves_of(w.z)),
                             e = to_floats(halves_of(w.w));
                sum[r] += a.x * v0.x;
                sum[r] += a.y * v0.y;
                sum[r] += c.x * v0.z;
                sum[r] += c.y * v0.w;
                sum[r] += d.x * v1.x;
                sum[r] += d.y * v1.y;
                sum[r] += e.x * v1.z;
                sum[r] += e.y * v1.w;
            }
        }
    }
    finish<SPLIT>(sum, squares, place, mean_of, eps, out, n_out, n_in, add, room);
}

}  // namespace gemv

#define COBRA_GEMV(name, BITS, SPLIT)                                                                                         \
    COBRA_KERNEL(128, name)(const uint8_t* __restrict__ codes, const half* __restrict__ scales, const float* x,               \
                            const float* __restrict__ norm, const float* mean_of, float eps, float* out, int n_out, int n_in, \
                            int group_shift, int add) {                                                                       \
        gemv::product<BITS, SPLIT>(codes, scales, x, norm, mean_of, eps, out, n_out, n_in, group_shift, add);                 \
    }                                                                                                                         \
    COBRA_EXPORT(name)
#define COBRA_GEMV_W16(name, SPLIT)                                                                                      \
    COBRA_KERNEL(128, name)(const half* __restrict__ weights, const float* x, const float* __restrict__ norm,            \
                            const float* mean_of, float eps, float* out, int n_out, int n_in, int row_stride, int add) { \
        gemv::product_w16<SPLIT>(weights, x, norm, mean_of, eps, out, n_out, n_in, row_stride, add);                     \
    }                                                                                                                    \
    COBRA_EXPORT(name)

COBRA_GEMV(gemv_w8, 8, false)
COBRA_GEMV(gemv_w8_split, 8, true)
COBRA_GEMV(gemv_w4, 4, false)
COBRA_GEMV(gemv_w4_split, 4, true)
COBRA_GEMV(gemv_w3, 3, false)
COBRA_GEMV(gemv_w3_split, 3, true)
COBRA_GEMV_W16(gemv_w16, false)
COBRA_GEMV_W16(gemv_w16_split, true)
