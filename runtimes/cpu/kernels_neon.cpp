// NEON on 64-bit ARM, compiled twice: with the dot product instructions (Jetson Orin's Cortex-A78AE, Raspberry Pi 5, Apple)
// and without (Raspberry Pi 4).
#include <arm_neon.h>

#include <cmath>
#include <cstring>

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

// Codes lie in natural order; weights are made signed in registers, so offsets are not needed and stay unwritten.
void quantize(const float* x, const Matrix& m, int64_t token, int64_t from, int64_t to, const Int8Rows& rows) {
    for (int64_t g = from; g < to; ++g) {
        int8_t* codes = rows.codes + token * rows.width + g * m.group;
        rows.scales[token * rows.groups + g] = round_group(x + g * m.group, m.group, codes);
    }
}

inline int32x4_t dot16(int32x4_t sum, int8x16_t w, int8x16_t a) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, w, a);
#else
    // -128 · -128 twice does not fit 16 bits, but activations stop at ±127: 2 · 128 · 127 does.
    const int16x8_t products = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vget_high_s8(w), vget_high_s8(a));
    return vpadalq_s16(sum, products);
#endif
}

template <Storage kStorage, int kRows, int kTokens>
void tile(const Matrix& m, int64_t r, int64_t t, const Int8Rows& rows, float* out, int64_t stride, bool add) {
    constexpr int64_t kBytes = kStorage == Storage::kInt4 ? 16 : 32;  // of 32 weights
    float32x4_t sums[kRows][kTokens];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) sums[i][j] = vdupq_n_f32(0.0f);
    const int64_t groups = m.groups(), blocks = m.group / 32;
    for (int64_t g = 0; g < groups; ++g) {
        for (int i = 0; i < kRows; ++i) {
            const uint8_t* codes = m.row(r + i) + g * blocks * kBytes;
            const float scale = half_to_float(m.scales[(r + i) * groups + g]);
            int32x4_t parts[kTokens];
            for (int j = 0; j < kTokens; ++j) parts[j] = vdupq_n_s32(0);
            for (int64_t b = 0; b < blocks; ++b) {
                const uint8x16_t bytes = vld1q_u8(codes + b * kBytes);
                int8x16_t low, high;
                if (kStorage == Storage::kInt4) {
                    const int8x16_t zero = vdupq_n_s8(8);
                    low = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(0xf))), zero);
                    high = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), zero);
                } else {
                    const uint8x16_t flip = vdupq_n_u8(0x80);
                    low = vreinterpretq_s8_u8(veorq_u8(bytes, flip));
                    high = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes + b * kBytes + 16), flip));
                }
                for (int j = 0; j < kTokens; ++j) {
                    const int8_t* a = rows.codes + (t + j) * rows.width + g * m.group + b * 32;
                    parts[j] = dot16(dot16(parts[j], low, vld1q_s8(a)), high, vld1q_s8(a + 16));
                }
            }
            for (int j = 0; j < kTokens; ++j) {
                const float both = scale * rows.scales[(t + j) * groups + g];
                sums[i][j] = vfmaq_n_f32(sums[i][j], vcvtq_f32_s32(parts[j]), both);
            }
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) {
            float& o = out[(t + j) * stride + r + i];
            o = (add ? o : 0.0f) + vaddvq_f32(sums[i][j]);
        }
}

#include "tiling.inl"

}  // namespace

extern const Kernels COBRA_TABLE;
const Kernels COBRA_TABLE = {COBRA_NAME,     rms_norm,  quantize,       multiply_int8<4, 4>, multiply_float,
                             dequantize_row, conv_silu, selective_scan, exponential};

}  // namespace cobra_edge
