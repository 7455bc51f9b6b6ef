// Causal convolution and selective scan, vectorized over blocks of kChannels channels: lanes are channels, so that nothing is
// reduced across lanes. Remaining channels use the plain functions of elementwise.inl. The file that includes this defines the
// operations listed in matmul.inl and: smaller(a, b), larger(a, b), shift_left<n>(ints), division and the other operators on
// Floats.

constexpr int kParts = kChannels / kLanes;  // registers per value of a block's channels

// exp(x) as in exp_fast, for x up to 88.3. If one operand of `smaller` or `larger` is NaN, x86 returns the second: the operand
// that may be NaN goes there.
static inline Floats exp_below(Floats x) {
    x = larger(spread(-87.3f), x);
    const Floats magic = spread(12582912.0f), shifted = multiply_add(x, spread(1.44269504f), magic), k = shifted - magic;
    const Floats r = multiply_add(k, spread(2.12194440e-4f), multiply_add(k, spread(-0.693359375f), x));
    Floats p = spread(kExp6);
    p = multiply_add(p, r, spread(kExp5));
    p = multiply_add(p, r, spread(kExp4));
    p = multiply_add(p, r, spread(kExp3));
    p = multiply_add(p, r, spread(kExp2));
    p = multiply_add(p, r, spread(1.0f));
    p = multiply_add(p, r, spread(1.0f));
    return p * as_floats(add(shift_left<23>(as_ints(shifted)), spread(static_cast<int32_t>(0x3f800000))));
}

static inline Floats silu(Floats x) { return x / (spread(1.0f) + exp_below(smaller(spread(88.3f), spread(0.0f) - x))); }

static inline Floats softplus(Floats x) {
    const Floats e = exp_below(smaller(x, spread(0.0f) - x)), s = e / (spread(2.0f) + e), q = s * s;
    Floats p = spread(1.0f / 13);
    p = multiply_add(p, q, spread(1.0f / 11));
    p = multiply_add(p, q, spread(1.0f / 9));
    p = multiply_add(p, q, spread(1.0f / 7));
    p = multiply_add(p, q, spread(1.0f / 5));
    p = multiply_add(p, q, spread(1.0f / 3));
    p = multiply_add(p, q, spread(1.0f));
    return multiply_add(spread(2.0f) * s, p, larger(spread(0.0f), x));
}

// (kChannels, width) to (width, kChannels) and back.
static inline void turn(const float* from, int64_t rows, int64_t cols, float* to) {
    if (rows % kLanes == 0 && cols % kLanes == 0) {
        for (int64_t r = 0; r < rows; r += kLanes)
            for (int64_t c = 0; c < cols; c += kLanes) {
                Ints square[kLanes];
                for (int i = 0; i < kLanes; ++i) square[i] = as_ints(load_floats(from + (r + i) * cols + c));
                transpose(square);
                for (int i = 0; i < kLanes; ++i) store_floats(to + (c + i) * rows + r, as_floats(square[i]));
            }
        return;
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) to[c * rows + r] = from[r * cols + c];
}

// A block's values of one token share a cache line, those of the next token are in another page: hardware does not prefetch
// it.
constexpr int64_t kTokensAhead = 6;
static inline void prefetch_tokens_ahead(const float* p) { __builtin_prefetch(p, 0, 3); }

// kTaps = 0: the number of taps is read at run time.
template <int kTaps>
static void conv_block(const Conv& conv, int64_t c, const float* x, int64_t x_stride, int64_t tokens, float* state, float* u,
                       int64_t u_stride) {
    constexpr int kMost = kTaps ? kTaps : 8;
    const int64_t taps = kTaps ? kTaps : conv.taps;
    if (taps < 1 || taps > kMost) __builtin_unreachable();
    alignas(64) float turned[kMost * kChannels];
    turn(state + c * taps, kChannels, taps, turned);
    Floats past[kMost][kParts], weight[kMost][kParts];
    for (int64_t k = 0; k < taps; ++k)
        for (int p = 0; p < kParts; ++p) {
            past[k][p] = load_floats(turned + k * kChannels + p * kLanes);
            weight[k][p] = load_floats(conv.weight + k * conv.channels + c + p * kLanes);
        }
    for (int64_t t = 0; t < tokens; ++t) {
        prefetch_tokens_ahead(x + (t + kTokensAhead) * x_stride + c);
        for (int p = 0; p < kParts; ++p) {
            Floats sum = load_floats(conv.bias + c + p * kLanes);
            for (int64_t k = 0; k + 1 < taps; ++k) {
                past[k][p] = past[k + 1][p];
                sum = multiply_add(past[k][p], weight[k][p], sum);
            }
            past[taps - 1][p] = load_floats(x + t * x_stride + c + p * kLanes);
            sum = multiply_add(past[taps - 1][p], weight[taps - 1][p], sum);
            store_floats(u + t * u_stride + c + p * kLanes, silu(sum));
        }
    }
    for (int64_t k = 0; k < taps; ++k)
        for (int p = 0; p < kParts; ++p) store_floats(turned + k * kChannels + p * kLanes, past[k][p]);
    turn(turned, taps, kChannels, state + c * taps);
}

static void conv_silu(const Conv& conv, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                      float* state, float* u, int64_t u_stride) {
    const auto block = conv.taps == 4 ? conv_block<4> : conv_block<0>;
    int64_t c = from;
    for (; c + kChannels <= to; c += kChannels) block(conv, c, x, x_stride, tokens, state, u, u_stride);
    plain_conv_silu(conv, c, to, x, x_stride, tokens, state, u, u_stride);
}

// kState = 0: d_state is read at run time.
template <int kState>
static void scan_block(const Scan& s, int64_t c, int64_t tokens, const float* dt, int64_t dt_stride, const float* B,
                       const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h, const float* u,
                       float* out, int64_t u_stride) {
    constexpr int kMost = kState ? kState : 256;
    const int64_t d_state = kState ? kState : s.d_state;
    if (d_state < 1 || d_state > kMost) __builtin_unreachable();
    alignas(64) float a[kMost * kChannels], state[kMost * kChannels];
    turn(s.A + c * d_state, kChannels, d_state, a);
    turn(h + c * d_state, kChannels, d_state, state);
    for (int64_t t = 0; t < tokens; ++t) {
        const float *Bt = B + t * bc_stride, *Ct = C + t * bc_stride;
        const float *low = dt + t * dt_stride + c, *gate = z + t * z_stride + c, *x = u + t * u_stride + c;
        prefetch_tokens_ahead(low + kTokensAhead * dt_stride);
        prefetch_tokens_ahead(gate + kTokensAhead * z_stride);
        prefetch_tokens_ahead(x + kTokensAhead * u_stride);
        Floats delta[kParts], inflow[kParts], y[kParts];
        for (int p = 0; p < kParts; ++p) {
            const Floats in = load_floats(x + p * kLanes);
            delta[p] = softplus(load_floats(low + p * kLanes) + load_floats(s.dt_bias + c + p * kLanes));
            inflow[p] = delta[p] * in;
            y[p] = load_floats(s.D + c + p * kLanes) * in;
        }
        for (int64_t k = 0; k < d_state; ++k) {
            const Floats b = spread(Bt[k]), g = spread(Ct[k]);
            for (int p = 0; p < kParts; ++p) {
                float* part = state + k * kChannels + p * kLanes;
                const Floats decay = exp_below(delta[p] * load_floats(a + k * kChannels + p * kLanes));
                const Floats next = multiply_add(decay, load_floats(part), inflow[p] * b);
                store_floats(part, next);
                y[p] = multiply_add(next, g, y[p]);
            }
        }
        for (int p = 0; p < kParts; ++p)
            store_floats(out + t * u_stride + c + p * kLanes, y[p] * silu(load_floats(gate + p * kLanes)));
    }
    turn(state, d_state, kChannels, h + c * d_state);
}

static void selective_scan(const Scan& s, int64_t from, int64_t to, int64_t tokens, const float* dt, int64_t dt_stride,
                           const float* B, const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h,
                           const float* u, float* out, int64_t u_stride) {
    const auto block = s.d_state == 16 ? scan_block<16> : scan_block<0>;
    int64_t c = from;
    for (; c + kChannels <= to; c += kChannels)
        block(s, c, tokens, dt, dt_stride, B, C, bc_stride, z, z_stride, h, u, out, u_stride);
    plain_selective_scan(s, c, to, tokens, dt, dt_stride, B, C, bc_stride, z, z_stride, h, u, out, u_stride);
}
