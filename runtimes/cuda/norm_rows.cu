// RMS norm and the Hadamard rotation over rows, a block a row; and the last norm of a decoder whose residual stream is
// rotated: back, norm, rotation. Sources: Zhang and Sennrich 2019; cobra_edge/formats/hadamard.py for the rotation.
#include "device.cuh"

namespace rows {

constexpr int kThreads = 256, kWarps = kThreads / 32;

COBRA_DEVICE float read(const void* x, bool is_half, size_t i) {
    return is_half ? to_float(load(static_cast<const half*>(x) + i)) : load(static_cast<const float*>(x) + i);
}
COBRA_DEVICE void write(void* out, bool is_half, size_t i, float v) {
    if (is_half) {
        store(static_cast<half*>(out) + i, to_half(saturated(v)));
    } else {
        store(static_cast<float*>(out) + i, v);
    }
}

// The sum over a block's threads, in one order, for all of them; `between` has room for a number a warp, and is free behind
// the next barrier.
COBRA_DEVICE float sum_of_block(float v, float* between) {
    COBRA_UNROLL
    for (int d = 16; d; d >>= 1) v += shuffle_xor(v, d);
    if ((threadIdx.x & 31) == 0) store(between + (threadIdx.x >> 5), v);
    sync_block();
    float sum = 0.f;
    COBRA_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += load(between + w);
    return sum;
}

// Sylvester's matrix of order p times each of m parts of a row in shared memory: four numbers at a time, two rounds of sums
// and differences.
COBRA_DEVICE void butterflies(float* row, int width, int p) {
    int half = 1;
    for (; half * 2 < p; half *= 4) {
        COBRA_UNROLL_BY(1) for (int i = threadIdx.x; i < width / 4; i += kThreads) {
            float* at = row + i / half * 4 * half + i % half;
            const float a = load(at), b = load(at + half), c = load(at + 2 * half), d = load(at + 3 * half);
            const float ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
            store(at, ab + cd), store(at + half, a_b + c_d), store(at + 2 * half, ab - cd), store(at + 3 * half, a_b - c_d);
        }
        sync_block();
    }
    if (half < p) {
        COBRA_UNROLL_BY(1) for (int i = threadIdx.x; i < width / 2; i += kThreads) {
            float* at = row + i / half * 2 * half + i % half;
            const float a = load(at), b = load(at + half);
            store(at, a + b), store(at + half, a - b);
        }
        sync_block();
    }
}

// Mix the m parts by a matrix of signs: row i has word i ((m + 31) / 32) and the next ones, bit k of them 1 where its entry k
// is -1. emit(i, v) takes what is at i of the result. Four parts of a column at a time, which share the reading.
template <class EMIT>
COBRA_DEVICE void mix(const float* row, const uint32_t* signs, int m, int p, float scale, EMIT emit) {
    if (m == 1) {
        COBRA_UNROLL_BY(1) for (int i = threadIdx.x; i < p; i += kThreads) emit(i, load(row + i) * scale);
        return;
    }
    const int words = (m + 31) / 32;  // m is a multiple of four
    COBRA_UNROLL_BY(1) for (int item = threadIdx.x; item < m / 4 * p; item += kThreads) {
        const int column = item % p, part = item / p * 4;
        float sum[4] = {};
        COBRA_UNROLL_BY(1) for (int w = 0; w < words; ++w) {
            uint32_t sign[4];
            COBRA_UNROLL
            for (int i = 0; i < 4; ++i) sign[i] = load_constant(signs + (part + i) * words + w);
            const int most = min(32, m - 32 * w);
            COBRA_UNROLL_BY(4) for (int k = 0; k < most; ++k) {
                const uint32_t v = bits_of(load(row + (32 * w + k) * p + column));
                COBRA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    sum[i] += float_of(v ^ (sign[i] & 1) << 31);
                    sign[i] >>= 1;
                }
            }
        }
        COBRA_UNROLL
        for (int i = 0; i < 4; ++i) emit((part + i) * p + column, sum[i] * scale);
    }
}

}  // namespace rows

// out = x weight / sqrt(mean(x²) + eps). x: (rows, width) float32; out: (rows, width) float16, saturated, out_stride apart. A
// block a row; shared memory for kWarps floats.
COBRA_KERNEL(rows::kThreads, norm_rows)
(const float* __restrict__ x, const float* __restrict__ weight, half* __restrict__ out, int width, int out_stride, float eps) {
    using namespace rows;
    COBRA_SHARED(room);
    const float* row = x + (size_t)blockIdx.x * width;
    half* to = out + (size_t)blockIdx.x * out_stride;
    float squares = 0.f;
    if (((width | out_stride) & 3) == 0) {
        COBRA_UNROLL_BY(1) for (int i = 4 * threadIdx.x; i < width; i += 4 * kThreads) {
            const float4 v = load(reinterpret_cast<const float4*>(row + i));
            squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        }
    } else {
        COBRA_UNROLL_BY(1) for (int i = threadIdx.x; i < width; i += kThreads) squares += load(row + i) * load(row + i);
    }
    const float root = reciprocal_root(sum_of_block(squares, reinterpret_cast<float*>(room)) / width + eps);
    if (((width | out_stride) & 3) == 0) {
        COBRA_UNROLL_BY(1) for (int i = 4 * threadIdx.x; i < width; i += 4 * kThreads) {
            const float4 v = load(reinterpret_cast<const float4*>(row + i)),
                         w = load_constant(reinterpret_cast<const float4*>(weight + i));
            const float n[4] = {v.x * root * w.x, v.y * root * w.y, v.z * root * w.z, v.w * root * w.w};
            float s[4];
            COBRA_UNROLL
            for (int k = 0; k < 4; ++k) s[k] = saturated(n[k]);
            store(reinterpret_cast<uint2*>(to + i),
                  make_uint2(bits_of(to_halves(s[0], s[1])), bits_of(to_halves(s[2], s[3]))));
        }
    } else {
        COBRA_UNROLL_BY(1)
        for (int i = threadIdx.x; i < width; i += kThreads)
            write(to, true, i, load(row + i) * root * load_constant(weight + i));
    }
}
COBRA_EXPORT(norm_rows)

// out = x Rᵀ of each row, R = kron(H_m, H_p) / sqrt(m p); with the signs of H_m transposed, x R. x: (rows, m p) and out
// float16 or float32, out saturated where float16, strides apart; they may be the same. signs: (m, (m + 31) / 32) words, a bit
// a -1; not read where m is 1. A block a row; shared memory for m p floats.
COBRA_KERNEL(rows::kThreads, rotate_rows)
(const void* x, const uint32_t* __restrict__ signs, void* out, int m, int p, int x_stride, int out_stride, int x_is_half,
 int out_is_half) {
    using namespace rows;
    COBRA_SHARED(room);
    float* row = reinterpret_cast<float*>(room);
    const int width = m * p;
    COBRA_UNROLL_BY(1)
    for (int i = threadIdx.x; i < width; i += kThreads) store(row + i, read(x, x_is_half, (size_t)blockIdx.x * x_stride + i));
    sync_block();
    butterflies(row, width, p);
    const size_t begin = (size_t)blockIdx.x * out_stride;
    mix(row, signs, m, p, 1.f / sqrtf((float)width), [&](int i, float v) { write(out, out_is_half, begin + i, v); });
}
COBRA_EXPORT(rotate_rows)

// x R, then the norm and its weight, then Rᵀ again. x: (rows, m p) float32, x_stride apart; out: float16 (saturated) or
// float32, out_stride apart. signs as above, signs_back of H_m transposed. Shared memory for 2 m p + kWarps floats.
COBRA_KERNEL(rows::kThreads, norm_between_rotations)
(const float* __restrict__ x, const uint32_t* __restrict__ signs, const uint32_t* __restrict__ signs_back,
 const float* __restrict__ weight, void* out, int m, int p, int x_stride, int out_stride, int out_is_half, float eps) {
    using namespace rows;
    COBRA_SHARED(room);
    const int width = m * p;
    float *row = reinterpret_cast<float*>(room), *turned = row + width, *between = turned + width;
    COBRA_UNROLL_BY(1)
    for (int i = threadIdx.x; i < width; i += kThreads) store(row + i, load(x + (size_t)blockIdx.x * x_stride + i));
    sync_block();
    butterflies(row, width, p);
    const float scale = 1.f / sqrtf((float)width);
    float squares = 0.f;
    mix(row, signs_back, m, p, scale, [&](int i, float v) {
        squares += v * v;
        store(turned + i, v * load_constant(weight + i));
    });
    const float root = reciprocal_root(sum_of_block(squares, between) / width + eps);
    butterflies(turned, width, p);
    const size_t begin = (size_t)blockIdx.x * out_stride;
    mix(turned, signs, m, p, scale * root, [&](int i, float v) { write(out, out_is_half, begin + i, v); });
}
COBRA_EXPORT(norm_between_rotations)
