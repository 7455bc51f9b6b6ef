// NEON on 64-bit ARM, compiled twice: with the dot product instructions (Jetson Orin's Cortex-A78AE, Raspberry Pi 5, Apple)
// and without (Raspberry Pi 4).
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#ifdef __ARM_FEATURE_DOTPROD
#define COBRA_TABLE kNeonDotKernels
#define COBRA_NAME "neon-dot"
#else
#define COBRA_TABLE kNeonKernels
#define COBRA_NAME "neon"
#endif

namespace cobra_edge {
namespace {

#include "elementwise.inl"
#include "plain_scan_gradient.inl"

constexpr int kLanes = 4, kTokens = 16;
constexpr int kCodes = 4 * kLanes;
using Codes = int8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;

inline Ints as_ints(Floats v) { return vreinterpretq_s32_f32(v); }
inline Ints as_ints(Codes v) { return vreinterpretq_s32_s8(v); }
inline Codes as_codes(Ints v) { return vreinterpretq_s8_s32(v); }
inline Floats as_floats(Ints v) { return vreinterpretq_f32_s32(v); }
inline Codes load_codes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline void store_codes(void* p, Codes v) { vst1q_s8(static_cast<int8_t*>(p), v); }
inline Floats load_floats(const float* p) { return vld1q_f32(p); }
inline void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats zeros() { return vdupq_n_f32(0.0f); }
inline Ints spread(int32_t v) { return vdupq_n_s32(v); }
inline Floats spread(float v) { return vdupq_n_f32(v); }
inline Ints repeat(const int32_t* v) { return vdupq_n_s32(*v); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats smaller(Floats a, Floats b) { return vminq_f32(a, b); }
inline Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
template <int kBits>
inline Ints shift_left(Ints v) {
    return vshlq_n_s32(v, kBits);
}
inline Ints subtract(Ints a, Ints b) { return vsubq_s32(a, b); }
inline Floats to_float(Ints v) { return vcvtq_f32_s32(v); }
inline Floats widen_scales(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline Floats repeat(const float* v) { return vdupq_n_f32(*v); }

inline Floats gather_scales(const uint16_t* const* rows, int64_t g) {
    uint16x4_t bits = vdup_n_u16(rows[0][g]);
    bits = vld1_lane_u16(rows[1] + g, bits, 1);
    bits = vld1_lane_u16(rows[2] + g, bits, 2);
    bits = vld1_lane_u16(rows[3] + g, bits, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

inline void sum_phases(Floats v, float* out) { vst1q_f32(out, v); }

// The dot product instructions used here take signed codes only.
template <Storage kStorage>
constexpr int32_t zero_of() {
    return 0;
}

template <Storage kStorage>
inline Codes unpack(const uint8_t* row, int64_t run) {
    if (kStorage == Storage::kInt8) return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row + run * 16), vdupq_n_u8(0x80)));
    if (kStorage == Storage::kInt4) {
        const uint8x16_t bytes = vld1q_u8(row + run / 2 * 16);
        const uint8x16_t codes = run % 2 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
        return vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(8));
    }
    const uint8_t* block = row + run / 4 * 24;
    const auto s = static_cast<int8_t>(run % 4 * 2);
    const uint8x16_t low = vandq_u8(vshlq_u8(vld1q_u8(block), vdupq_n_s8(static_cast<int8_t>(-s))), vdupq_n_u8(3));
    const uint8x8_t tops = vld1_u8(block + 16);
    const uint8x16_t bit = vcombine_u8(vdup_n_u8(static_cast<uint8_t>(1 << s)), vdup_n_u8(static_cast<uint8_t>(2 << s)));
    const uint8x16_t top = vandq_u8(vtstq_u8(vcombine_u8(tops, tops), bit), vdupq_n_u8(4));
    return vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(low, top)), vdupq_n_s8(4));
}

inline Ints dot16(Ints sums, Codes w, Codes a) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sums, w, a);
#else
    const Ints first = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)));
    const Ints second = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(a)));
    return vaddq_s32(sums, vpaddq_s32(first, second));
#endif
}

template <Storage kStorage>
constexpr int kWide = block_of(kStorage) / kCodes;

template <Storage kStorage, int kRuns>
inline void arrange(const int8_t* a, Codes* out) {
    for (int i = 0; i < kRuns; ++i) out[i] = vld1q_s8(a + i * 16);
}

template <Storage kStorage, int kRuns>
inline Ints step(Ints sums, const uint8_t* row, int64_t run, const Codes* a) {
    for (int i = 0; i < kRuns; ++i) sums = dot16(sums, unpack<kStorage>(row, run + i), a[i]);
    return sums;
}

template <Storage kStorage>
inline Ints dot4(Ints sums, const Codes* w, const int8_t* a) {
#ifdef __ARM_FEATURE_DOTPROD
    const int8x16_t quads = vld1q_s8(a);
    sums = vdotq_laneq_s32(sums, w[0], quads, 0);
    sums = vdotq_laneq_s32(sums, w[1], quads, 1);
    sums = vdotq_laneq_s32(sums, w[2], quads, 2);
    return vdotq_laneq_s32(sums, w[3], quads, 3);
#else
    for (int q = 0; q < 4; ++q) {
        int32_t quad;
        std::memcpy(&quad, a + 4 * q, 4);
        sums = dot16(sums, w[q], vreinterpretq_s8_s32(vdupq_n_s32(quad)));
    }
    return sums;
#endif
}

template <Storage kStorage>
inline void widen_codes(Codes v, Floats* out) {
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
    out[0] = to_float(vmovl_s16(vget_low_s16(low)));
    out[1] = to_float(vmovl_s16(vget_high_s16(low)));
    out[2] = to_float(vmovl_s16(vget_low_s16(high)));
    out[3] = to_float(vmovl_s16(vget_high_s16(high)));
}

inline Ints lane_sums(const Ints* p) { return vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3])); }

inline void transpose(Ints* v) {
    const auto wide = [](Ints x) { return vreinterpretq_s64_s32(x); };
    const auto narrow = [](int64x2_t x) { return vreinterpretq_s32_s64(x); };
    const Ints ab = vtrn1q_s32(v[0], v[1]), AB = vtrn2q_s32(v[0], v[1]);
    const Ints cd = vtrn1q_s32(v[2], v[3]), CD = vtrn2q_s32(v[2], v[3]);
    v[0] = narrow(vtrn1q_s64(wide(ab), wide(cd)));
    v[1] = narrow(vtrn1q_s64(wide(AB), wide(CD)));
    v[2] = narrow(vtrn2q_s64(wide(ab), wide(cd)));
    v[3] = narrow(vtrn2q_s64(wide(AB), wide(CD)));
}

#include "conv_scan.inl"
#include "matmul.inl"
#include "matmul_float.inl"
#include "scan_gradient.inl"

}  // namespace

extern const Kernels COBRA_TABLE;
const Kernels COBRA_TABLE = {COBRA_NAME, rms_norm,       quantize,      matmul_int8, matmul_float, dequantize_row,
                             conv_silu,  selective_scan, scan_gradient, rotate,      exponential,  macs_in_registers};

}  // namespace cobra_edge
