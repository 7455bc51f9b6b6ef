// Kernels in plain C++ that the compiler vectorizes: norm, rotation, quantization, dequantization. Included once by each
// instruction set's file, inside an anonymous namespace, so that each copy is compiled with that file's flags.

// exp(x) for x in [-87.3, 88.3] (clamped), relative error below 2e-7, mostly rounding: 2^k · p(r) with
// r = x - k · ln 2, ln 2 in two parts, and the minimax polynomial of degree 6 in relative error (2e-9) for
// |r| <= 0.347, from Lawson's iteration.
constexpr float kExp2 = 0.49999991059303284f, kExp3 = 0.16666419804096222f, kExp4 = 0.04166822507977486f,
                kExp5 = 0.008374815806746483f, kExp6 = 0.0013836846919730306f;

static inline float exp_fast(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the integer lands in the low bits
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    float p = kExp6;
    p = p * r + kExp5;
    p = p * r + kExp4;
    p = p * r + kExp3;
    p = p * r + kExp2;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // Multiply instead of adding exponents: NaN stays NaN whatever its bits.
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

static inline float silu_fast(float x) { return x / (1.0f + exp_fast(-x)); }

// log(1 + exp(x)) = max(x, 0) + 2 artanh(e / (2 + e)) with e = exp(-|x|): no cancellation at either end.
static inline float softplus_fast(float x) {
    const float e = exp_fast(x < 0.0f ? x : -x);
    const float s = e / (2.0f + e), q = s * s;
    float p = 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return (x > 0.0f ? x : 0.0f) + 2.0f * s * p;
}

// float16 bits to float32, exact for every finite value, infinities and NaN included.
static inline float half_to_float(uint16_t h) {
    uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 5.192296858534828e33f;  // 2^112: adjusts the exponent bias, and normalizes subnormals
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    bits |= static_cast<uint32_t>(h & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

static void exponential(const float* x, int64_t n, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = exp_fast(x[i]);
}

static void rms_norm(const float* x, const float* weight, float eps, int64_t width, float* out) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

static void dequantize_row(const Matrix& m, int64_t r, float* __restrict out) {
    const uint8_t* row = m.row(r);
    if (m.storage == Storage::kFloat32) {
        std::memcpy(out, row, static_cast<size_t>(m.row_bytes()));
        return;
    }
    if (m.storage == Storage::kFloat16) {
        const auto* values = reinterpret_cast<const uint16_t*>(row);
#pragma omp simd
        for (int64_t i = 0; i < m.cols; ++i) out[i] = half_to_float(values[i]);
        return;
    }
    const uint16_t* scales = m.scales + r * m.groups();
    for (int64_t g = 0; g < m.groups(); ++g) {
        const float scale = half_to_float(scales[g]);
        float* __restrict to = out + g * m.group;
        if (m.storage == Storage::kInt8) {
            const uint8_t* codes = row + g * m.group;
#pragma omp simd
            for (int64_t i = 0; i < m.group; ++i) to[i] = static_cast<float>(static_cast<int>(codes[i]) - 128) * scale;
        } else if (m.storage == Storage::kInt3) {
            const uint8_t* codes = row + g * m.group / 8 * 3;
            for (int64_t b = 0; b < m.group / 64; ++b, codes += 24, to += 64) {
                for (int64_t s = 0; s < 4; ++s) {
#pragma omp simd
                    for (int64_t j = 0; j < 16; ++j) {
                        const int low = codes[j] >> (2 * s) & 3, top = codes[16 + (j & 7)] >> (2 * s + (j >> 3)) & 1;
                        to[16 * s + j] = static_cast<float>((low | top << 2) - 4) * scale;
                    }
                }
            }
        } else {
            const uint8_t* codes = row + g * m.group / 2;
            for (int64_t b = 0; b < m.group / 32; ++b, codes += 16, to += 32) {
#pragma omp simd
                for (int64_t i = 0; i < 16; ++i) {
                    to[i] = static_cast<float>(static_cast<int>(codes[i] & 0xf) - 8) * scale;
                    to[i + 16] = static_cast<float>(static_cast<int>(codes[i] >> 4) - 8) * scale;
                }
            }
        }
    }
}

static void plain_matmul_float(const Matrix& m, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                               float* out, int64_t stride, bool add, float* scratch) {
    for (int64_t r = from; r < to; ++r) {
        dequantize_row(m, r, scratch);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* in = x + t * x_stride;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < m.cols; ++k) sum += scratch[k] * in[k];
            float& o = out[t * stride + r];
            o = add ? o + sum : sum;
        }
    }
}

// A group without a larger magnitude is quantized to zeros: 127 / magnitude would overflow.
constexpr float kSmallestMagnitude = 1e-36f;

// Quantize a group to int8: the scale is min(largest magnitude, clip) / 127. Writes codes and their sum, returns the
// scale. Integers cannot hold NaN: a group with a value that is not finite gets codes 0 and the scale NaN, so that every
// result that depends on it is NaN.
template <bool kClipped>
static inline float round_group(const float* __restrict x, int64_t n, float clip, int8_t* __restrict codes, int32_t* sum) {
    // Magnitudes order like their bit patterns, with infinity and NaN above all numbers.
    uint32_t top_bits = 0;
#pragma omp simd reduction(max : top_bits)
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        top_bits = bits > top_bits ? bits : top_bits;
    }
    if (top_bits >= 0x7f800000u) {
        std::memset(codes, 0, static_cast<size_t>(n));
        *sum = 0;
        return std::nanf("");
    }
    float top;
    std::memcpy(&top, &top_bits, 4);
    if (kClipped) top = clip < top ? clip : top;
    const float inverse = top > kSmallestMagnitude ? 127.0f / top : 0.0f;
    int32_t all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < n; ++i) {
        const float low = kClipped && x[i] < -top ? -top : x[i], value = kClipped && low > top ? top : low;
        // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const float shifted = value * inverse + 12582912.0f;
        uint32_t bits;
        std::memcpy(&bits, &shifted, 4);
        const auto code = static_cast<int32_t>(bits - 0x4b400000u);
        codes[i] = static_cast<int8_t>(code);
        all += code;
    }
    *sum = all;
    return top / 127.0f;
}

static void quantize(const float* x, const Matrix& m, int64_t token, int64_t from, int64_t to, const Int8Rows& rows) {
    for (int64_t g = from; g < to; ++g) {
        const int64_t at = token * rows.groups + g;
        const float* from_x = x + g * m.group;
        int8_t* codes = rows.codes + token * rows.width + g * m.group;
        rows.scales[at] = m.clips ? round_group<true>(from_x, m.group, m.clips[g], codes, rows.sums + at)
                                  : round_group<false>(from_x, m.group, 0.0f, codes, rows.sums + at);
    }
}

static void rotate(float* __restrict x, const float* matrix, int64_t order, int64_t width, float* __restrict spare) {
    const int64_t power = width / order;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int64_t i = 0; i < order; ++i) {
        float* __restrict row = spare + i * power;
        for (int64_t j = 0; j < power; ++j) row[j] = 0.0f;
        for (int64_t k = 0; k < order; ++k) {
            const float sign = matrix[i * order + k] * scale;
            const float* from = x + k * power;
#pragma omp simd
            for (int64_t j = 0; j < power; ++j) row[j] += sign * from[j];
        }
    }
    for (int64_t half = 1; half < power; half *= 2)
        for (int64_t block = 0; block < width; block += 2 * half) {
            float* __restrict a = spare + block, * __restrict b = a + half;
#pragma omp simd
            for (int64_t j = 0; j < half; ++j) {
                const float sum = a[j] + b[j];
                b[j] = a[j] - b[j];
                a[j] = sum;
            }
        }
    std::memcpy(x, spare, static_cast<size_t>(width) * sizeof(float));
}

// Plain references of convolution and scan: one channel at a time.
static void plain_conv_silu(const Conv& conv, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                            float* state, float* u, int64_t u_stride) {
    for (int64_t c = from; c < to; ++c) {
        float* past = state + c * conv.taps;  // newest last
        for (int64_t t = 0; t < tokens; ++t) {
            float sum = conv.bias[c];
            for (int64_t k = 0; k < conv.taps; ++k) {
                past[k] = k + 1 < conv.taps ? past[k + 1] : x[t * x_stride + c];
                sum += past[k] * conv.weight[k * conv.channels + c];
            }
            u[t * u_stride + c] = silu_fast(sum);
        }
    }
}

static void plain_selective_scan(const Scan& s, int64_t from, int64_t to, int64_t tokens, const float* dt, int64_t dt_stride,
                                 const float* B, const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h,
                                 const float* u, float* out, int64_t u_stride) {
    for (int64_t c = from; c < to; ++c) {
        const float* a = s.A + c * s.d_state;
        float* state = h + c * s.d_state;
        for (int64_t t = 0; t < tokens; ++t) {
            const float x = u[t * u_stride + c], delta = softplus_fast(dt[t * dt_stride + c] + s.dt_bias[c]);
            float y = s.D[c] * x;
            for (int64_t k = 0; k < s.d_state; ++k) {
                state[k] = exp_fast(delta * a[k]) * state[k] + delta * x * B[t * bc_stride + k];
                y += state[k] * C[t * bc_stride + k];
            }
            out[t * u_stride + c] = y * silu_fast(z[t * z_stride + c]);
        }
    }
}
