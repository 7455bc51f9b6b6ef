// A token's activations as 16-bit integers, and their exact products with codes.
//
// A group of 128 neighbours shares a scale; each integer lies in two planes of signed bytes, x = scale · (256 high + low), so
// that dp4a multiplies them with codes of up to 8 bits and nothing is lost until a block's sum becomes a float: 16 bits err by
// 3e-5 of a group's largest magnitude, where float16 products err by 5e-4 of each value. A group with a value that is not
// finite gets the scale NaN.
//
// Codes lie as docs/bundle.md says. A block of a row is 16 bytes of low bits (and 8 of top bits, of 3-bit codes), which hold
// kRuns runs of 16 neighbours; byte j of the plane holds lane j of each run. So a word of a plane, shifted and masked, meets
// four neighbouring activations.
#pragma once
#include "device.cuh"

namespace cobra {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kGroup = 128;   // activations that share a scale
constexpr int kMost = 32639;  // 127 · 256 + 127: the largest integer of two signed bytes, on both sides of zero
constexpr int kTile = 8192;   // inputs that are in shared memory at a time
constexpr float kQuietest = 1e-33f;  // a group with no larger magnitude is zeros: kMost / that would overflow

COBRA_DEVICE float sum_of_warp(float v) {
    COBRA_UNROLL
    for (int d = 16; d; d >>= 1) v += shuffle_xor(v, d);
    return v;
}
COBRA_DEVICE float silu(float v) { return v / (1.f + expf(-v)); }
COBRA_DEVICE float softplus(float v) { return v > 20.f ? v : log1pf(expf(v)); }
COBRA_DEVICE float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
COBRA_DEVICE float squared(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// Scales of a row: one for 2^group_shift inputs, one for all of them where that is 31.
COBRA_DEVICE int groups_of(int n_in, int group_shift) {
    return group_shift < 31 ? n_in >> group_shift : 1;
}

// A block of a row's codes as it is loaded.
template <int BITS>
struct Codes {
    static constexpr int kRuns = BITS == 3 ? 4 : BITS == 4 ? 2 : 1;
    static constexpr int kInputs = 16 * kRuns;  // codes
    static constexpr int kLogInputs = BITS == 3 ? 6 : BITS == 4 ? 5 : 4;
    static constexpr int kBytes = kInputs * BITS / 8;
    static constexpr int kZero = 1 << (BITS - 1);  // the code that stands for 0
    uint32_t low[4], top[BITS == 3 ? 2 : 1];

    COBRA_DEVICE_MEMBER static Codes at(const uint8_t* codes, uint32_t block) {
        const uint8_t* p = codes + (size_t)block * kBytes;
        Codes c;
        if constexpr (BITS == 3) {  // only every other block begins where 16 bytes may be loaded at once
            const uint2 a = load_streaming((const uint2*)p), b = load_streaming((const uint2*)(p + 8)),
                        t = load_streaming((const uint2*)(p + 16));
            c.low[0] = a.x, c.low[1] = a.y, c.low[2] = b.x, c.low[3] = b.y, c.top[0] = t.x, c.top[1] = t.y;
        } else {
            const uint4 v = load_streaming((const uint4*)p);
            c.low[0] = v.x, c.low[1] = v.y, c.low[2] = v.z, c.low[3] = v.w, c.top[0] = 0;
        }
        return c;
    }
};

// In shared memory, see `bytes`.
template <int BITS>
struct Rounded {
    using Block = Codes<BITS>;
    uint4* planes;
    float* scales;  // one a group
    int* sums;      // of the integers of a block
    int blocks;     // whole groups of them

    static constexpr int padded(int n) { return (n + kGroup - 1) / kGroup * kGroup; }
    // What n inputs take.
    static constexpr int bytes(int n) { return 2 * padded(n) + 4 * (padded(n) / kGroup) + 4 * (padded(n) / Block::kInputs); }

    COBRA_DEVICE_MEMBER Rounded(unsigned char* room, int n) {
        const int whole = padded(n);
        planes = (uint4*)room;
        scales = (float*)(room + 2 * whole);
        sums = (int*)(scales + whole / kGroup);
        blocks = whole / Block::kInputs;
    }
    COBRA_DEVICE_MEMBER uint4 at(int plane, int run, int block) const {
        return load(planes + (plane * Block::kRuns + run) * blocks + block);
    }

    // Round n values, a multiple of 4, of all the block's warps: x, times norm where that is given. Returns this thread's
    // share of the squares of `mean_of`, where that is given. A barrier has to follow.
    COBRA_DEVICE_MEMBER float fill(const float* x, const float* norm, const float* mean_of, int n, int warp, int warps) const {
        const int lane = threadIdx.x & 31, groups = (n + kGroup - 1) / kGroup;
        float squares = 0.f;
        for (int g = warp; g < groups; g += warps) {
            const int i = g * kGroup + 4 * lane;
            const bool inside = i < n;
            float4 v = inside ? load((const float4*)(x + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
            if (mean_of && inside) squares += squared(mean_of == x ? v : load((const float4*)(mean_of + i)));
            if (norm && inside) v = times(v, load((const float4*)(norm + i)));
            // As integers magnitudes compare as they do as floats, and those that are not finite are the largest.
            uint32_t most = max(max(bits_of(fabsf(v.x)), bits_of(fabsf(v.y))), max(bits_of(fabsf(v.z)), bits_of(fabsf(v.w))));
            most = max_of_warp(most);
            const bool finite = most < 0x7f800000u;
            const float largest = float_of(most), inverse = finite && largest > kQuietest ? kMost / largest : 0.f;
            int q[4] = {round_to_int(v.x * inverse), round_to_int(v.y * inverse), round_to_int(v.z * inverse),
                        round_to_int(v.w * inverse)};
            if (!finite) q[0] = q[1] = q[2] = q[3] = 0;
            uint32_t high = 0, low = 0;
            COBRA_UNROLL
            for (int k = 0; k < 4; ++k) {
                high |= (uint32_t)((q[k] + 128) >> 8 & 255) << 8 * k;
                low |= (uint32_t)(q[k] & 255) << 8 * k;
            }
            const int block = i / Block::kInputs, run = i / 16 % Block::kRuns, word = lane % 4;
            ((uint32_t*)(planes + run * blocks + block))[word] = high;
            ((uint32_t*)(planes + (Block::kRuns + run) * blocks + block))[word] = low;
            int total = q[0] + q[1] + q[2] + q[3];
            COBRA_UNROLL
            for (int d = 1; d < Block::kInputs / 4; d <<= 1) total += shuffle_xor(total, d);
            if (lane % (Block::kInputs / 4) == 0) sums[block] = total;
            if (lane == 0) scales[g] = finite ? largest / kMost : float_of(0x7fc00000u);
        }
        return squares;
    }
};

// The products of several rows' blocks with the same activations: into totals, exact.
template <int BITS, int ROWS>
COBRA_DEVICE void multiply_blocks(const Codes<BITS> (&w)[ROWS], const Rounded<BITS>& x, int block, int (&total)[ROWS]) {
    int high[ROWS] = {}, low[ROWS] = {};
    uint4 h[Codes<BITS>::kRuns], l[Codes<BITS>::kRuns];
    COBRA_UNROLL
    for (int run = 0; run < Codes<BITS>::kRuns; ++run) h[run] = x.at(0, run, block), l[run] = x.at(1, run, block);
    const int sum = BITS == 8 ? 0 : Codes<BITS>::kZero * x.sums[block];
    COBRA_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        COBRA_UNROLL
        for (int k = 0; k < 4; ++k) {
            const uint32_t word = w[r].low[k];
            uint32_t run[4];  // four neighbours of each
            if constexpr (BITS == 8) {
                run[0] = word ^ 0x80808080u;
            } else if constexpr (BITS == 4) {
                run[0] = word & 0x0f0f0f0fu;
                run[1] = word >> 4 & 0x0f0f0f0fu;
            } else {
                // Runs 0 and 2 lie in the low two bits of half bytes, 1 and 3 in the high two; a top bit comes to lie above
                // them.
                const uint32_t top = w[r].top[k & 1], upper = k >> 1;
                const uint32_t even_top = top << (2 - upper), odd_top = top >> upper;
                const uint32_t even = ((word ^ even_top) & 0x33333333u) ^ even_top,
                               odd = ((word >> 2 ^ odd_top) & 0x33333333u) ^ odd_top;
                run[0] = even & 0x07070707u;
                run[1] = odd & 0x07070707u;
                run[2] = even >> 4 & 0x07070707u;
                run[3] = odd >> 4 & 0x07070707u;
            }
            COBRA_UNROLL
            for (int i = 0; i < Codes<BITS>::kRuns; ++i) {
                const uint32_t in_high = k == 0 ? h[i].x : k == 1 ? h[i].y : k == 2 ? h[i].z : h[i].w;
                const uint32_t in_low = k == 0 ? l[i].x : k == 1 ? l[i].y : k == 2 ? l[i].z : l[i].w;
                high[r] = dot4(run[i], in_high, high[r]);
                low[r] = dot4(run[i], in_low, low[r]);
            }
        }
        total[r] = high[r] * 256 + low[r] - sum;
    }
}

}  // namespace cobra
