// AVX2 with FMA and F16C, compiled twice: plain (x86 processors since Haswell and Zen) and with 256-bit VNNI (Intel since
// Alder Lake, AMD since Zen 5).
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#ifdef __AVXVNNI__
#define COBRA_TABLE kAvx2VnniKernels
#define COBRA_NAME "avx2-vnni"
#else
#define COBRA_TABLE kAvx2Kernels
#define COBRA_NAME "avx2"
#endif

namespace cobra_edge {
namespace {

#include "elementwise.inl"
#include "plain_scan_gradient.inl"

constexpr int kLanes = 8, kTokens = 8;
constexpr int kCodes = 4 * kLanes;
using Codes = __m256i;
using Ints = __m256i;
using Floats = __m256;

inline Ints as_ints(Floats v) { return _mm256_castps_si256(v); }
inline Ints as_ints(Ints v) { return v; }
inline Codes as_codes(Ints v) { return v; }
inline Floats as_floats(Ints v) { return _mm256_castsi256_ps(v); }
inline Codes load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_codes(void* p, Codes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats zeros() { return _mm256_setzero_ps(); }
inline Ints spread(int32_t v) { return _mm256_set1_epi32(v); }
inline Floats spread(float v) { return _mm256_set1_ps(v); }
inline Ints repeat(const int32_t* v) {
    int64_t both;
    std::memcpy(&both, v, 8);
    return _mm256_set1_epi64x(both);
}
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
template <int kBits>
inline Ints shift_left(Ints v) {
    return _mm256_slli_epi32(v, kBits);
}
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats widen_scales(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline Floats repeat(const float* v) {
    double both;
    std::memcpy(&both, v, 8);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
}

inline Floats gather_scales(const uint16_t* const* rows, int64_t g) {
    int32_t two[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&two[i], rows[i] + g, 4);
    return _mm256_cvtph_ps(_mm_setr_epi32(two[0], two[1], two[2], two[3]));
}

inline void sum_phases(Floats v, float* out) {
    const Floats pairs = add(v, _mm256_permute_ps(v, 0xb1));
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    _mm_storeu_ps(out, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(pairs, even)));
}

// Products of unsigned 8-bit codes would overflow the 16-bit sums of plain AVX2: codes are converted to signed there.
template <Storage kStorage>
constexpr int32_t zero_of() {
#ifndef __AVXVNNI__
    if (kStorage == Storage::kInt8) return 0;
#endif
    return kStorage == Storage::kInt8 ? 128 : kStorage == Storage::kInt4 ? 8 : 4;
}

template <Storage kStorage>
inline Codes unpack(const uint8_t* row, int64_t run) {
    if (kStorage == Storage::kInt8) {
        const __m256i codes = load_codes(row + run * 32);
        return zero_of<kStorage>() ? codes : _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    }
    if (kStorage == Storage::kInt4) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + run * 16));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
        return _mm256_and_si256(both, _mm256_set1_epi8(15));
    }
    const uint8_t* block = row + run / 2 * 24;
    const int64_t half = run % 2 * 4;
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
    const __m256i shift = _mm256_setr_epi64x(half, half, half + 2, half + 2);
    const __m256i low = _mm256_and_si256(_mm256_srlv_epi64(pairs, shift), _mm256_set1_epi8(3));
    int64_t tops;
    std::memcpy(&tops, block + 16, 8);
    const __m256i first = _mm256_setr_epi64x(0x0101010101010101, 0x0202020202020202, 0x0404040404040404, 0x0808080808080808);
    const __m256i bit = half ? _mm256_slli_epi16(first, 4) : first;
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_set1_epi64x(tops), bit), bit);
    return _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)));
}

// 64 4-bit codes from one register: the low nibbles of two blocks, and their high nibbles.
struct Nibbles {
    Codes low, high;
};

inline Nibbles nibbles(const uint8_t* codes) {
    const Codes low = _mm256_set1_epi8(15);
    Codes both = load_codes(codes);
    keep_in_register(both);  // otherwise it is loaded twice, once per nibble
    return {_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
}

template <Storage kStorage, int kRuns>
inline void arrange(const int8_t* a, Codes* out) {
    out[0] = load_codes(a);
    for (int i = 0; i + 1 < kRuns; i += 2) {
        const Codes first = load_codes(a + i * 32), second = load_codes(a + (i + 1) * 32);
        out[i] = _mm256_permute2x128_si256(first, second, 0x20);
        out[i + 1] = _mm256_permute2x128_si256(first, second, 0x31);
    }
}

inline __m256i pairs_to_int32(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

#ifdef __AVXVNNI__

template <Storage kStorage>
constexpr int kWide = kStorage == Storage::kInt4 ? 2 : 1;

template <Storage kStorage, int kRuns>
inline Ints step(Ints sums, const uint8_t* row, int64_t run, const Codes* a) {
    if (kRuns == 1) return _mm256_dpbusd_avx_epi32(sums, unpack<kStorage>(row, run), a[0]);
    const Nibbles w = nibbles(row + run * 16);
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sums, w.low, a[0]), w.high, a[1 % kRuns]);
}

template <Storage kStorage>
inline Ints dot4(Ints sums, const Codes* w, const int8_t* a) {
    for (int q = 0; q < 4; ++q) {
        int32_t quad;
        std::memcpy(&quad, a + 4 * q, 4);
        sums = _mm256_dpbusd_avx_epi32(sums, w[q], _mm256_set1_epi32(quad));
    }
    return sums;
}

#else

// Products of adjacent pairs, summed in 16 bits. 4-bit codes are unsigned, and four such sums still fit: 8 · 15 · 127.
// 8-bit codes are signed; their sign is moved to the activation, and one sum fits: 2 · 128 · 127.
template <Storage kStorage>
inline __m256i pair_products(Codes w, Codes a) {
    if (kStorage == Storage::kInt8) return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_maddubs_epi16(w, a);
}

template <Storage kStorage>
constexpr int kWide = kStorage == Storage::kInt4 ? 4 : 1;

template <Storage kStorage, int kRuns>
inline Ints step(Ints sums, const uint8_t* row, int64_t run, const Codes* a) {
    if (kRuns == 1) return add(sums, pairs_to_int32(pair_products<kStorage>(unpack<kStorage>(row, run), a[0])));
    const Nibbles w = nibbles(row + run * 16), v = nibbles(row + run * 16 + 32);
    const __m256i first =
        _mm256_add_epi16(pair_products<kStorage>(w.low, a[0]), pair_products<kStorage>(w.high, a[1 % kRuns]));
    const __m256i second =
        _mm256_add_epi16(pair_products<kStorage>(v.low, a[2 % kRuns]), pair_products<kStorage>(v.high, a[3 % kRuns]));
    return add(sums, pairs_to_int32(_mm256_add_epi16(first, second)));
}

template <Storage kStorage>
inline Ints dot4(Ints sums, const Codes* w, const int8_t* a) {
    __m256i pairs[4];
    for (int q = 0; q < 4; ++q) {
        int32_t quad;
        std::memcpy(&quad, a + 4 * q, 4);
        pairs[q] = pair_products<kStorage>(w[q], _mm256_set1_epi32(quad));
    }
    if (kStorage == Storage::kInt8) {
        for (const __m256i p : pairs) sums = add(sums, pairs_to_int32(p));
        return sums;
    }
    const __m256i all = _mm256_add_epi16(_mm256_add_epi16(pairs[0], pairs[1]), _mm256_add_epi16(pairs[2], pairs[3]));
    return add(sums, pairs_to_int32(all));
}

#endif

template <Storage kStorage>
inline void widen_codes(Codes v, Floats* out) {
    const auto widen = [](__m128i eight) {
        return to_float(zero_of<kStorage>() ? _mm256_cvtepu8_epi32(eight) : _mm256_cvtepi8_epi32(eight));
    };
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    out[0] = widen(low);
    out[1] = widen(_mm_srli_si128(low, 8));
    out[2] = widen(high);
    out[3] = widen(_mm_srli_si128(high, 8));
}

inline Ints lane_sums(const Ints* p) {
    Ints quads[2];  // element i of each 128-bit lane: that lane's partial sum of row 4q + i
    for (int q = 0; q < 2; ++q) {
        const Ints *r = p + 4 * q, ab = add(_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[0], r[1]));
        const Ints cd = add(_mm256_unpacklo_epi32(r[2], r[3]), _mm256_unpackhi_epi32(r[2], r[3]));
        quads[q] = add(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    }
    return add(_mm256_permute2x128_si256(quads[0], quads[1], 0x20), _mm256_permute2x128_si256(quads[0], quads[1], 0x31));
}

inline void transpose(Ints* v) {
    Ints c[2][4];  // [quad of rows][column modulo 4]: 128-bit lane L holds column 4 L + j
    for (int q = 0; q < 2; ++q) {
        const Ints* r = v + 4 * q;
        const Ints ab = _mm256_unpacklo_epi32(r[0], r[1]), AB = _mm256_unpackhi_epi32(r[0], r[1]);
        const Ints cd = _mm256_unpacklo_epi32(r[2], r[3]), CD = _mm256_unpackhi_epi32(r[2], r[3]);
        c[q][0] = _mm256_unpacklo_epi64(ab, cd);
        c[q][1] = _mm256_unpackhi_epi64(ab, cd);
        c[q][2] = _mm256_unpacklo_epi64(AB, CD);
        c[q][3] = _mm256_unpackhi_epi64(AB, CD);
    }
    for (int j = 0; j < 4; ++j) {
        v[j] = _mm256_permute2x128_si256(c[0][j], c[1][j], 0x20);
        v[4 + j] = _mm256_permute2x128_si256(c[0][j], c[1][j], 0x31);
    }
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
