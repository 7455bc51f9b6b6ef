// Gradient of the selective scan, vectorized like the scan in conv_scan.inl, after which and matmul_float.inl it is included:
// lanes are channels. Sums over channels, the gradients of B and C, are taken for kLanes states together.
//
// States and decays are recomputed and kept for kSegment tokens and one block of channels at a time, which fit into a first-
// or second-level cache; of the tokens before, only the state at the start of each segment is kept.

constexpr int64_t kSegment = kScanSegment;

// What of a token is the same for all of a block's states.
struct GradientToken {
    Floats delta[kParts], x[kParts], inflow[kParts];
};

static inline GradientToken token_of(const Scan& s, int64_t c, const float* low, const float* x) {
    GradientToken token;
    for (int p = 0; p < kParts; ++p) {
        token.x[p] = load_floats(x + p * kLanes);
        token.delta[p] = softplus(load_floats(low + p * kLanes) + load_floats(s.dt_bias + c + p * kLanes));
        token.inflow[p] = token.delta[p] * token.x[p];
    }
    return token;
}

// sums[i] += the sum of row i, of kLanes rows of kLanes values.
static inline void add_lanes(const float* rows, float* sums) {
    Floats parts[kLanes];
    float totals[kLanes];
    for (int i = 0; i < kLanes; ++i) parts[i] = load_floats(rows + i * kLanes);
    sum_lanes(parts, totals);
    store_floats(sums, load_floats(sums) + load_floats(totals));
}

static void scan_gradient_block(const Scan& s, int64_t c, int64_t tokens, const ScanInputs& in, const float* gradient,
                                const float* last_gradient, const ScanGradient& g, float* scratch) {
    const int64_t d_state = s.d_state, block = d_state * kChannels, segments = (tokens + kSegment - 1) / kSegment;
    float* const a = scratch;        // (d_state, kChannels), as all below
    float* const ahead = a + block;  // gradient of the state
    float* const a_gradient = ahead + block;
    float* const starts = a_gradient + block;               // (segments, …)
    float* const states = starts + segments * block;        // (kSegment + 1, …)
    float* const decays = states + (kSegment + 1) * block;  // (kSegment, …)
    float* const b_parts = decays + kSegment * block;       // (d_state, kLanes)
    float* const c_parts = b_parts + d_state * kLanes;
    turn(s.A + c * d_state, kChannels, d_state, a);
    turn(in.h + c * d_state, kChannels, d_state, states);
    turn(last_gradient + c * d_state, kChannels, d_state, ahead);
    for (int64_t i = 0; i < block; ++i) a_gradient[i] = 0.0f;
    // The state at the start of each segment.
    for (int64_t t = 0; t < tokens; ++t) {
        if (t % kSegment == 0) std::memcpy(starts + t / kSegment * block, states, static_cast<size_t>(block) * sizeof(float));
        if (t >= (segments - 1) * kSegment) break;  // the last segment's states are computed below
        prefetch_tokens_ahead(in.dt + (t + kTokensAhead) * s.channels + c);
        prefetch_tokens_ahead(in.u + (t + kTokensAhead) * s.channels + c);
        const GradientToken token = token_of(s, c, in.dt + t * s.channels + c, in.u + t * s.channels + c);
        for (int64_t k = 0; k < d_state; ++k) {
            const Floats b = spread(in.B[t * d_state + k]);
            for (int p = 0; p < kParts; ++p) {
                const int64_t at = k * kChannels + p * kLanes;
                const Floats decay = exp_below(token.delta[p] * load_floats(a + at));
                store_floats(states + at, multiply_add(decay, load_floats(states + at), token.inflow[p] * b));
            }
        }
    }
    Floats skip_gradient[kParts], bias_gradient[kParts];
    for (int p = 0; p < kParts; ++p) skip_gradient[p] = bias_gradient[p] = zeros();
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
        const int64_t from = segment * kSegment, to = from + kSegment < tokens ? from + kSegment : tokens;
        std::memcpy(states, starts + segment * block, static_cast<size_t>(block) * sizeof(float));
        for (int64_t t = from; t < to; ++t) {
            const int64_t here = t * s.channels + c;
            for (const float* later : {in.dt, in.u, in.z, gradient}) prefetch_tokens_ahead(later + here);
            for (const float* later : {g.u, g.dt, g.z}) __builtin_prefetch(later + here, 1, 3);
            const GradientToken token = token_of(s, c, in.dt + here, in.u + here);
            const float* before = states + (t - from) * block;
            float* after = states + (t - from + 1) * block;
            float* decay_of = decays + (t - from) * block;
            for (int64_t k = 0; k < d_state; ++k) {
                const Floats b = spread(in.B[t * d_state + k]);
                for (int p = 0; p < kParts; ++p) {
                    const int64_t at = k * kChannels + p * kLanes;
                    const Floats decay = exp_below(token.delta[p] * load_floats(a + at));
                    store_floats(decay_of + at, decay);
                    store_floats(after + at, multiply_add(decay, load_floats(before + at), token.inflow[p] * b));
                }
            }
        }
        for (int64_t t = to - 1; t >= from; --t) {
            const int64_t here = t * s.channels + c;
            const GradientToken token = token_of(s, c, in.dt + here, in.u + here);
            const float *before = states + (t - from) * block, *after = before + block,
                        *decay_of = decays + (t - from) * block;
            const float *B = in.B + t * d_state, *C = in.C + t * d_state;
            Floats dy[kParts], y[kParts], inflow_gradient[kParts], exponents[kParts], gates[kParts];
            for (int p = 0; p < kParts; ++p) {
                gates[p] = load_floats(in.z + here + p * kLanes);
                dy[p] = load_floats(gradient + here + p * kLanes) * silu(gates[p]);
                y[p] = load_floats(s.D + c + p * kLanes) * token.x[p];
                inflow_gradient[p] = exponents[p] = zeros();
            }
            for (int64_t k = 0; k < d_state; ++k) {
                const Floats b = spread(B[k]), out = spread(C[k]);
                Floats b_sum = zeros(), c_sum = zeros();
                for (int p = 0; p < kParts; ++p) {
                    const int64_t at = k * kChannels + p * kLanes;
                    const Floats next = load_floats(after + at), total = multiply_add(dy[p], out, load_floats(ahead + at));
                    const Floats through = total * load_floats(decay_of + at), exponent = through * load_floats(before + at);
                    y[p] = multiply_add(next, out, y[p]);
                    c_sum = multiply_add(dy[p], next, c_sum);
                    b_sum = multiply_add(total, token.inflow[p], b_sum);
                    inflow_gradient[p] = multiply_add(total, b, inflow_gradient[p]);
                    exponents[p] = multiply_add(exponent, load_floats(a + at), exponents[p]);
                    store_floats(a_gradient + at, multiply_add(exponent, token.delta[p], load_floats(a_gradient + at)));
                    store_floats(ahead + at, through);
                }
                store_floats(b_parts + k * kLanes, b_sum);
                store_floats(c_parts + k * kLanes, c_sum);
            }
            for (int64_t k = 0; k < d_state; k += kLanes) {
                add_lanes(b_parts + k * kLanes, g.B + t * d_state + k);
                add_lanes(c_parts + k * kLanes, g.C + t * d_state + k);
            }
            for (int p = 0; p < kParts; ++p) {
                const Floats one = spread(1.0f), up = load_floats(gradient + here + p * kLanes);
                const Floats open = one / (one + exp_below(smaller(spread(88.3f), zeros() - gates[p])));
                const Floats of_silu = multiply_add(gates[p] * open, one - open, open);
                store_floats(g.z + here + p * kLanes, up * y[p] * of_silu);
                store_floats(g.u + here + p * kLanes,
                             multiply_add(dy[p], load_floats(s.D + c + p * kLanes), inflow_gradient[p] * token.delta[p]));
                // softplus'(v) = 1 - exp(-softplus(v))
                const Floats of_delta = multiply_add(token.x[p], inflow_gradient[p], exponents[p]);
                const Floats of_low = of_delta * (one - exp_below(zeros() - token.delta[p]));
                store_floats(g.dt + here + p * kLanes, of_low);
                bias_gradient[p] = bias_gradient[p] + of_low;
                skip_gradient[p] = multiply_add(dy[p], token.x[p], skip_gradient[p]);
            }
        }
    }
    for (int p = 0; p < kParts; ++p) {
        float *skip = g.D + c + p * kLanes, *bias = g.dt_bias + c + p * kLanes;
        store_floats(skip, load_floats(skip) + skip_gradient[p]);
        store_floats(bias, load_floats(bias) + bias_gradient[p]);
    }
    turn(ahead, d_state, kChannels, g.h + c * d_state);
    turn(a_gradient, d_state, kChannels, states);
    for (int64_t i = 0; i < block; ++i) g.A[c * d_state + i] += states[i];
}

static void scan_gradient(const Scan& s, int64_t from, int64_t to, int64_t tokens, const ScanInputs& in, const float* gradient,
                          const float* last_gradient, const ScanGradient& g, float* scratch) {
    int64_t c = from;
    if (s.d_state % kLanes == 0)
        for (; c + kChannels <= to; c += kChannels) scan_gradient_block(s, c, tokens, in, gradient, last_gradient, g, scratch);
    plain_scan_gradient(s, c, to, tokens, in, gradient, last_gradient, g, scratch);
}
