// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4. Groups of a multiple of 128 take whole registers of 64 codes;
// smaller ones are left to the AVX2 table, whose products are the same.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace cobra_edge {

extern const Kernels kAvx2Kernels;

namespace {

#include "elementwise.inl"

constexpr int64_t kSpan = 128;  // weights worked on together: one register of 4-bit codes, two of 8-bit codes

bool wide(const Matrix& m) { return m.group % kSpan == 0; }

// For 4-bit weights a span's codes are stored as its four blocks' first halves, then their second halves: the order in which
// masking and shifting 64 bytes of nibbles yields the weights. Offsets: 16 lanes, as in the AVX2 file.
void quantize(const float* x, const Matrix& m, int64_t token, int64_t from, int64_t to, const Int8Rows& rows) {
    if (!wide(m)) return kAvx2Kernels.quantize(x, m, token, from, to, rows);
    const bool four = m.storage == Storage::kInt4;
    const __m512i zero = _mm512_set1_epi8(four ? 8 : static_cast<char>(128));
    for (int64_t g = from; g < to; ++g) {
        int8_t* codes = rows.codes + token * rows.width + g * m.group;
        rows.scales[token * rows.groups + g] = round_group(x + g * m.group, m.group, codes);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t s = 0; s < m.group; s += kSpan) {
            __m512i first = _mm512_loadu_si512(codes + s), second = _mm512_loadu_si512(codes + s + 64);
            if (four) {
                // 128-bit quarters a0 b0 a1 b1 | a2 b2 a3 b3 become a0 a1 a2 a3 | b0 b1 b2 b3.
                const __m512i low = _mm512_shuffle_i64x2(first, second, 0x88);
                second = _mm512_shuffle_i64x2(first, second, 0xdd);
                first = low;
                _mm512_storeu_si512(codes + s, first);
                _mm512_storeu_si512(codes + s + 64, second);
            }
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, zero, first), zero, second);
        }
        int32_t* offsets = rows.offsets + (token * rows.groups + g) * kOffsetLanes;
        _mm512_storeu_si512(offsets, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }
}

// Scales of `groups` groups as float32, 16 at a time.
inline void widen_scales(const uint16_t* scales, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 mask = static_cast<__mmask16>(groups - g >= 16 ? 0xffff : (1u << (groups - g)) - 1);
        const __m256i halves = _mm256_maskz_loadu_epi16(mask, scales + g);
        _mm512_mask_storeu_ps(out + g, mask, _mm512_cvtph_ps(halves));
    }
}

constexpr int64_t kMostScales = 64;  // groups whose scales are widened together

template <Storage kStorage, int kRows, int kTokens>
void tile(const Matrix& m, int64_t r, int64_t t, const Int8Rows& rows, float* out, int64_t stride, bool add) {
    constexpr int64_t kBytes = kStorage == Storage::kInt4 ? 64 : 128;  // of a span
    __m512 sums[kRows][kTokens];
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) sums[i][j] = _mm512_setzero_ps();
    const int64_t groups = m.groups(), spans = m.group / kSpan;
    const __m512i nibble = _mm512_set1_epi8(0xf);
    float scales[kRows][kMostScales];
    for (int64_t first = 0; first < groups; first += kMostScales) {
        const int64_t here = groups - first < kMostScales ? groups - first : kMostScales;
        for (int i = 0; i < kRows; ++i) widen_scales(m.scales + (r + i) * groups + first, here, scales[i]);
        for (int64_t g = first; g < first + here; ++g) {
            for (int i = 0; i < kRows; ++i) {
                const uint8_t* codes = m.row(r + i) + g * spans * kBytes;
                __m512i parts[kTokens];
                for (int j = 0; j < kTokens; ++j)
                    parts[j] = _mm512_loadu_si512(rows.offsets + ((t + j) * groups + g) * kOffsetLanes);
                for (int64_t s = 0; s < spans; ++s) {
                    __m512i low = _mm512_loadu_si512(codes + s * kBytes), high;
                    if (kStorage == Storage::kInt4) {
                        high = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
                        low = _mm512_and_si512(low, nibble);
                    } else {
                        high = _mm512_loadu_si512(codes + s * kBytes + 64);
                    }
                    for (int j = 0; j < kTokens; ++j) {
                        const int8_t* a = rows.codes + (t + j) * rows.width + g * m.group + s * kSpan;
                        parts[j] = _mm512_dpbusd_epi32(parts[j], low, _mm512_loadu_si512(a));
                        parts[j] = _mm512_dpbusd_epi32(parts[j], high, _mm512_loadu_si512(a + 64));
                    }
                }
                const __m512 scale = _mm512_set1_ps(scales[i][g - first]);
                for (int j = 0; j < kTokens; ++j) {
                    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[(t + j) * groups + g]));
                    sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[j]), both, sums[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTokens; ++j) {
            float& o = out[(t + j) * stride + r + i];
            o = (add ? o : 0.0f) + _mm512_reduce_add_ps(sums[i][j]);
        }
}

#include "tiling.inl"

void multiply(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
              bool add) {
    if (!wide(m)) return kAvx2Kernels.multiply_int8(m, from, to, rows, tokens, out, stride, add);
    multiply_int8<4, 4>(m, from, to, rows, tokens, out, stride, add);
}

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {"avx512-vnni",  rms_norm,  quantize,       multiply,   multiply_float,
                                dequantize_row, conv_silu, selective_scan, exponential};

}  // namespace cobra_edge
