// The kernels without integer products, in plain C++ that the compiler turns into vectors. Included once by each instruction
// set's file, inside a namespace of its own, so that each is compiled with that file's flags.

// exp(x) for x in [-87.3, 88.3] (clamped), relative error below 2e-7, nearly all of it rounding: 2^k · p(r) with
// r = x - k · ln 2, ln 2 in two pieces, and Taylor's polynomial of degree 7 (its error is below 6e-9 for |r| <= 0.347).
static inline float exp_fast(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the integer lands in the low bits
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    float p = 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits, exponent;
    std::memcpy(&exponent, &shifted, 4);
    std::memcpy(&bits, &p, 4);
    bits += static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
    std::memcpy(&p, &bits, 4);
    return p;
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
    value *= 5.192296858534828e33f;  // 2^112: moves the exponent's bias, and normalises subnormals
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
        const auto* halves = reinterpret_cast<const uint16_t*>(row);
#pragma omp simd
        for (int64_t i = 0; i < m.cols; ++i) out[i] = half_to_float(halves[i]);
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
        } else {
            const uint8_t* codes = row + g * m.group / 2;
            for (int64_t b = 0; b < m.group / kBlock; ++b, codes += kBlock / 2, to += kBlock) {
#pragma omp simd
                for (int64_t i = 0; i < kBlock / 2; ++i) {
                    to[i] = static_cast<float>(static_cast<int>(codes[i] & 0xf) - 8) * scale;
                    to[i + kBlock / 2] = static_cast<float>(static_cast<int>(codes[i] >> 4) - 8) * scale;
                }
            }
        }
    }
}

static inline float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// Four rows against one token: one load of x serves four products.
static inline void dot4(const float* __restrict rows, int64_t cols, const float* __restrict x, float sums[4]) {
    const float *r0 = rows, *r1 = rows + cols, *r2 = rows + 2 * cols, *r3 = rows + 3 * cols;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < cols; ++i) {
        a += r0[i] * x[i];
        b += r1[i] * x[i];
        c += r2[i] * x[i];
        d += r3[i] * x[i];
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

static void multiply_float(const Matrix& m, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                           float* out, int64_t stride, bool add, float* scratch) {
    for (int64_t r = from; r < to; r += 4) {
        const int64_t n = to - r < 4 ? to - r : 4;
        for (int64_t k = 0; k < n; ++k) dequantize_row(m, r + k, scratch + k * m.cols);
        for (int64_t t = 0; t < tokens; ++t) {
            float sums[4];
            if (n == 4)
                dot4(scratch, m.cols, x + t * x_stride, sums);
            else
                for (int64_t k = 0; k < n; ++k) sums[k] = dot(scratch + k * m.cols, x + t * x_stride, m.cols);
            float* o = out + t * stride + r;
            for (int64_t k = 0; k < n; ++k) o[k] = add ? o[k] + sums[k] : sums[k];
        }
    }
}

// Round a token's groups to int8: the scale is the largest magnitude / 127. Returns the integer codes in natural order.
static inline float round_group(const float* __restrict x, int64_t n, int8_t* __restrict codes) {
    float top = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    const float scale = top / 127.0f, inverse = top > 0.0f ? 127.0f / top : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const float shifted = x[i] * inverse + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        codes[i] = static_cast<int8_t>(bits);
    }
    return scale;
}

static void conv_silu(const Conv& conv, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                      float* state, float* u, int64_t u_stride) {
    const int64_t taps = conv.taps;
    float past[8][kChannels];  // taps <= 8; oldest first
    float sum[kChannels];
    for (int64_t c = from; c < to; c += kChannels) {
        const int64_t n = to - c < kChannels ? to - c : kChannels;
        for (int64_t k = 0; k < taps; ++k)
            for (int64_t i = 0; i < n; ++i) past[k][i] = state[(c + i) * taps + k];
        for (int64_t t = 0; t < tokens; ++t) {
            const float* in = x + t * x_stride + c;
            float* __restrict o = u + t * u_stride + c;
            for (int64_t k = 0; k + 1 < taps; ++k)
                for (int64_t i = 0; i < n; ++i) past[k][i] = past[k + 1][i];
            for (int64_t i = 0; i < n; ++i) past[taps - 1][i] = in[i];
            for (int64_t i = 0; i < n; ++i) sum[i] = conv.bias[c + i];
            for (int64_t k = 0; k < taps; ++k) {
                const float* w = conv.weight + k * conv.channels + c;
                for (int64_t i = 0; i < n; ++i) sum[i] += w[i] * past[k][i];
            }
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) o[i] = silu_fast(sum[i]);
        }
        for (int64_t k = 0; k < taps; ++k)
            for (int64_t i = 0; i < n; ++i) state[(c + i) * taps + k] = past[k][i];
    }
}

// Channels are the lanes and the state's parts a loop around them, so that no sum runs across a vector.
// kState 0 reads d_state at run time.
template <int kState>
static void scan_block(const Scan& s, int64_t c, int64_t n, int64_t tokens, const float* dt, int64_t dt_stride, const float* B,
                       const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h, const float* u,
                       float* out, int64_t u_stride) {
    constexpr int64_t kMost = kState ? kState : 256;
    const int64_t d_state = kState ? kState : s.d_state;
    alignas(64) float a[kMost][kChannels], state[kMost][kChannels];
    alignas(64) float delta[kChannels] = {}, inflow[kChannels] = {}, y[kChannels] = {};
    for (int64_t k = 0; k < d_state; ++k)
        for (int64_t i = 0; i < kChannels; ++i) {
            a[k][i] = i < n ? s.A[(c + i) * d_state + k] : 0.0f;
            state[k][i] = i < n ? h[(c + i) * d_state + k] : 0.0f;
        }
    for (int64_t t = 0; t < tokens; ++t) {
        const float *Bt = B + t * bc_stride, *Ct = C + t * bc_stride;
        const float *low = dt + t * dt_stride + c, *gate = z + t * z_stride + c, *x = u + t * u_stride + c;
        float* o = out + t * u_stride + c;
        for (int64_t i = 0; i < n; ++i) {
            delta[i] = softplus_fast(low[i] + s.dt_bias[c + i]);
            inflow[i] = delta[i] * x[i];
            y[i] = s.D[c + i] * x[i];
        }
        for (int64_t k = 0; k < d_state; ++k) {
            const float b = Bt[k], g = Ct[k];
#pragma omp simd
            for (int64_t i = 0; i < kChannels; ++i) {
                state[k][i] = exp_fast(delta[i] * a[k][i]) * state[k][i] + inflow[i] * b;
                y[i] += state[k][i] * g;
            }
        }
        for (int64_t i = 0; i < n; ++i) o[i] = y[i] * silu_fast(gate[i]);
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < d_state; ++k) h[(c + i) * d_state + k] = state[k][i];
}

static void selective_scan(const Scan& s, int64_t from, int64_t to, int64_t tokens, const float* dt, int64_t dt_stride,
                           const float* B, const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h,
                           const float* u, float* out, int64_t u_stride) {
    for (int64_t c = from; c < to; c += kChannels) {
        const int64_t n = to - c < kChannels ? to - c : kChannels;
        const auto block = s.d_state == 16 ? scan_block<16> : scan_block<0>;
        block(s, c, n, tokens, dt, dt_stride, B, C, bc_stride, z, z_stride, h, u, out, u_stride);
    }
}
