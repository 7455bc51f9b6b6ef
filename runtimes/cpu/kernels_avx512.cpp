// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4. Groups that are a multiple of 64 fill whole registers; others go
// to the 256-bit tables.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace cobra_edge {

extern const Kernels kAvx2Kernels;

namespace {

#include "elementwise.inl"
#include "plain_scan_gradient.inl"

constexpr int kLanes = 16, kTokens = 16;
constexpr int kCodes = 4 * kLanes;
using Codes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
inline Ints as_ints(Ints v) { return v; }
inline Codes as_codes(Ints v) { return v; }
inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Codes load_codes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_codes(void* p, Codes v) { _mm512_storeu_si512(p, v); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Ints spread(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats spread(float v) { return _mm512_set1_ps(v); }
inline Ints repeat(const int32_t* v) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v))); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
template <int kBits>
inline Ints shift_left(Ints v) {
    return _mm512_slli_epi32(v, kBits);
}
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats widen_scales(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline Floats repeat(const float* v) { return _mm512_broadcast_f32x4(_mm_loadu_ps(v)); }

inline Floats gather_scales(const uint16_t* const* rows, int64_t g) {
    __m128i four[4];
    for (int i = 0; i < 4; ++i) four[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i] + g));
    const __m128i low = _mm_unpacklo_epi64(four[0], four[1]), high = _mm_unpacklo_epi64(four[2], four[3]);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

inline void sum_phases(Floats v, float* out) {
    const Floats pairs = add(v, _mm512_permute_ps(v, 0xb1)), all = add(pairs, _mm512_permute_ps(pairs, 0x4e));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
}

template <Storage kStorage>
constexpr int32_t zero_of() {
    return kStorage == Storage::kInt8 ? 128 : kStorage == Storage::kInt4 ? 8 : 4;
}

template <Storage kStorage>
inline Codes unpack(const uint8_t* row, int64_t run) {
    if (kStorage == Storage::kInt8) return _mm512_loadu_si512(row + run * 64);
    if (kStorage == Storage::kInt4) {
        const __m256i blocks = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + run * 32));
        const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
        const __m512i twice = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(blocks));
        return _mm512_and_si512(_mm512_srlv_epi64(twice, shift), _mm512_set1_epi8(15));
    }
    const uint8_t* block = row + run * 24;
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
    const __m512i low =
        _mm512_and_si512(_mm512_srlv_epi64(pairs, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)), _mm512_set1_epi8(3));
    int64_t tops;
    std::memcpy(&tops, block + 16, 8);
    const __m512i bit =
        _mm512_setr_epi64(0x0101010101010101, 0x0202020202020202, 0x0404040404040404, 0x0808080808080808, 0x1010101010101010,
                          0x2020202020202020, 0x4040404040404040, static_cast<int64_t>(0x8080808080808080));
    return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(_mm512_set1_epi64(tops), bit), low, _mm512_set1_epi8(4));
}

// 4 bits: 128 codes from one register, the low nibbles of the blocks and then the high nibbles.
template <Storage kStorage>
constexpr int kWide = kStorage == Storage::kInt4 ? 2 : 1;

template <Storage kStorage, int kRuns>
inline void arrange(const int8_t* a, Codes* out) {
    out[0] = _mm512_loadu_si512(a);
    if (kRuns == 1) return;
    const Codes second = _mm512_loadu_si512(a + 64);
    out[kRuns - 1] = _mm512_shuffle_i64x2(out[0], second, 0xdd);
    out[0] = _mm512_shuffle_i64x2(out[0], second, 0x88);
}

template <Storage kStorage, int kRuns>
inline Ints step(Ints sums, const uint8_t* row, int64_t run, const Codes* a) {
    if (kRuns == 1) return _mm512_dpbusd_epi32(sums, unpack<kStorage>(row, run), a[0]);
    const Codes low = _mm512_set1_epi8(15);
    Codes both = _mm512_loadu_si512(row + run * 32);
    keep_in_register(both);  // otherwise it is loaded twice, once per nibble
    sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(both, low), a[0]);
    return _mm512_dpbusd_epi32(sums, _mm512_and_si512(_mm512_srli_epi16(both, 4), low), a[kRuns - 1]);
}

template <Storage kStorage>
inline Ints dot4(Ints sums, const Codes* w, const int8_t* a) {
    for (int q = 0; q < 4; ++q) {
        int32_t quad;
        std::memcpy(&quad, a + 4 * q, 4);
        sums = _mm512_dpbusd_epi32(sums, w[q], _mm512_set1_epi32(quad));
    }
    return sums;
}

template <Storage kStorage>
inline void widen_codes(Codes v, Floats* out) {
    out[0] = to_float(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(v)));
    out[1] = to_float(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 1)));
    out[2] = to_float(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 2)));
    out[3] = to_float(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(v, 3)));
}

inline Ints lane_sums(const Ints* p) {
    Ints quads[4];  // element i of each 128-bit lane: that lane's partial sum of row 4q + i
    for (int q = 0; q < 4; ++q) {
        const Ints *r = p + 4 * q, ab = add(_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
        const Ints cd = add(_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
        quads[q] = add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    const auto fold = [](Ints x, Ints y) { return add(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd)); };
    return fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
}

inline void transpose(Ints* v) {
    Ints c[4][4];  // [quad of rows][column modulo 4]: 128-bit lane L holds column 4 L + j
    for (int q = 0; q < 4; ++q) {
        const Ints* r = v + 4 * q;
        const Ints ab = _mm512_unpacklo_epi32(r[0], r[1]), AB = _mm512_unpackhi_epi32(r[0], r[1]);
        const Ints cd = _mm512_unpacklo_epi32(r[2], r[3]), CD = _mm512_unpackhi_epi32(r[2], r[3]);
        c[q][0] = _mm512_unpacklo_epi64(ab, cd);
        c[q][1] = _mm512_unpackhi_epi64(ab, cd);
        c[q][2] = _mm512_unpacklo_epi64(AB, CD);
        c[q][3] = _mm512_unpackhi_epi64(AB, CD);
    }
    for (int j = 0; j < 4; ++j) {
        const Ints even = _mm512_shuffle_i32x4(c[0][j], c[1][j], 0x88), odd = _mm512_shuffle_i32x4(c[0][j], c[1][j], 0xdd);
        const Ints EVEN = _mm512_shuffle_i32x4(c[2][j], c[3][j], 0x88), ODD = _mm512_shuffle_i32x4(c[2][j], c[3][j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(even, EVEN, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(odd, ODD, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even, EVEN, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(odd, ODD, 0xdd);
    }
}

#include "conv_scan.inl"
#include "matmul.inl"
#include "matmul_float.inl"
#include "scan_gradient.inl"

void matmul_int8_or_narrower(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out,
                             int64_t stride, bool onto, float* scratch) {
    if (m.group % kCodes) return kAvx2Kernels.matmul_int8(m, from, to, rows, tokens, out, stride, onto, scratch);
    matmul_int8(m, from, to, rows, tokens, out, stride, onto, scratch);
}

}  // namespace

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {"avx512-vnni", rms_norm,       quantize,    matmul_int8_or_narrower,
                                matmul_float,  dequantize_row, conv_silu,   selective_scan,
                                scan_gradient, rotate,         exponential, macs_in_registers};

}  // namespace cobra_edge
