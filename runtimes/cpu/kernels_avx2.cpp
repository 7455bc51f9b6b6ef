// AVX2 with FMA and F16C: x86 processors since 2013 (Haswell, Zen).
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace cobra_edge {
namespace {

#include "elementwise.inl"

// Codes lie in natural order. Offsets: lane l of 8 holds -zero times the sum of the activations whose products land in it.
void quantize(const float* x, const Matrix& m, int64_t token, int64_t from, int64_t to, const Int8Rows& rows) {
    const __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    for (int64_t g = from; g < to; ++g) {
        int8_t* codes = rows.codes + token * rows.width + g * m.group;
        rows.scales[token * rows.groups + g] = round_group(x + g * m.group, m.group, codes);
        __m256i sum = _mm256_setzero_si256();
        if (m.storage == Storage::kInt4) {
            for (int64_t i = 0; i < m.group; i += 32) {
                const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, a), pairs));
            }
            sum = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), sum), 3);
        }
        int32_t* offsets = rows.offsets + (token * rows.groups + g) * kOffsetLanes;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets), sum);
    }
}

// 32 weights from 16 bytes, in natural order: low halves first.
inline __m256i unpack4(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(0xf));
}

template <Storage kStorage>
inline __m256i load_weights(const uint8_t* codes) {
    if (kStorage == Storage::kInt4) return unpack4(codes);
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), _mm256_set1_epi8(-128));
}

// 32 products summed into 8 lanes. 4-bit codes are unsigned: 2 · 15 · 127 fits 16 bits. 8-bit codes are made signed and
// their sign is moved to the activation: 2 · 128 · 127 fits, 2 · 255 · 127 would not.
template <Storage kStorage>
inline __m256i dot32(__m256i w, __m256i a) {
    const __m256i pairs = kStorage == Storage::kInt4 ? _mm256_maddubs_epi16(w, a)
                                                     : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <Storage kStorage, int kRows, int kTokens>
void tile(const Matrix& m, int64_t r, int64_t t, const Int8Rows& rows, float* out, int64_t stride, bool add) {
    constexpr int64_t kBytes = kStorage == Storage::kInt4 ? 16 : 32;  // of 32 weights
    __m256 sums[kRows][kTokens];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) sums[i][j] = _mm256_setzero_ps();
    const int64_t groups = m.groups(), blocks = m.group / 32;
    for (int64_t g = 0; g < groups; ++g) {
        for (int i = 0; i < kRows; ++i) {
            const uint8_t* codes = m.row(r + i) + g * blocks * kBytes;
            const float scale = half_to_float(m.scales[(r + i) * groups + g]);
            __m256i parts[kTokens];
            for (int j = 0; j < kTokens; ++j) {
                const int32_t* offsets = rows.offsets + ((t + j) * groups + g) * kOffsetLanes;
                parts[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets));
            }
            for (int64_t b = 0; b < blocks; ++b) {
                const __m256i w = load_weights<kStorage>(codes + b * kBytes);
                for (int j = 0; j < kTokens; ++j) {
                    const int8_t* a = rows.codes + (t + j) * rows.width + g * m.group + b * 32;
                    const __m256i products = dot32<kStorage>(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
                    parts[j] = _mm256_add_epi32(parts[j], products);
                }
            }
            for (int j = 0; j < kTokens; ++j) {
                const __m256 both = _mm256_set1_ps(scale * rows.scales[(t + j) * groups + g]);
                sums[i][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts[j]), both, sums[i][j]);
            }
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) {
            float& o = out[(t + j) * stride + r + i];
            o = (add ? o : 0.0f) + sum8(sums[i][j]);
        }
}

#include "tiling.inl"

}  // namespace

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {"avx2",         rms_norm,  quantize,       multiply_int8<2, 4>, multiply_float,
                              dequantize_row, conv_silu, selective_scan, exponential};

}  // namespace cobra_edge
