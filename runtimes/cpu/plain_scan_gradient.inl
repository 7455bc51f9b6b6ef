// Plain gradient of the selective scan, included after elementwise.inl: the reference of scan_gradient.inl, and what it
// leaves. States are recomputed and kept for one block of channels at a time.

static void plain_scan_gradient_block(const Scan& s, int64_t c, int64_t lanes, int64_t tokens, const ScanInputs& in,
                                      const float* gradient, const float* last_gradient, const ScanGradient& g,
                                      float* scratch) {
    const int64_t d_state = s.d_state, block = d_state * kChannels;
    float* __restrict states = scratch;                        // (tokens + 1, d_state, kChannels)
    float* __restrict decays = states + (tokens + 1) * block;  // (tokens, d_state, kChannels)
    float* __restrict deltas = decays + tokens * block;        // (tokens, kChannels)
    float* __restrict outputs = deltas + tokens * kChannels;   // (tokens, kChannels)
    float* __restrict future = outputs + tokens * kChannels;   // (d_state, kChannels), gradient of the state
    float* __restrict a = future + block;                      // (d_state, kChannels)
    float* __restrict a_gradient = a + block;                  // (d_state, kChannels)
    for (int64_t k = 0; k < d_state; ++k)
        for (int64_t i = 0; i < lanes; ++i) {
            const int64_t from = (c + i) * d_state + k, to = k * kChannels + i;
            states[to] = in.h[from], future[to] = last_gradient[from], a[to] = s.A[from], a_gradient[to] = 0.0f;
        }
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * s.channels + c;
        const float *x = in.u + at, *low = in.dt + at;
        float* __restrict delta = deltas + t * kChannels;
        float* __restrict y = outputs + t * kChannels;
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
            delta[i] = softplus_fast(low[i] + s.dt_bias[c + i]);
            y[i] = s.D[c + i] * x[i];
        }
        for (int64_t k = 0; k < d_state; ++k) {
            const float b = in.B[t * d_state + k], out = in.C[t * d_state + k];
            const float* __restrict before = states + t * block + k * kChannels;
            float* __restrict after = states + (t + 1) * block + k * kChannels;
            float* __restrict decay = decays + t * block + k * kChannels;
            const float* __restrict rate = a + k * kChannels;
#pragma omp simd
            for (int64_t i = 0; i < lanes; ++i) {
                decay[i] = exp_fast(delta[i] * rate[i]);
                after[i] = decay[i] * before[i] + delta[i] * x[i] * b;
                y[i] += after[i] * out;
            }
        }
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
        const int64_t at = t * s.channels + c;
        const float *x = in.u + at, *gate = in.z + at, *up = gradient + at;
        const float *delta = deltas + t * kChannels, *y = outputs + t * kChannels;
        float dy[kChannels], dx[kChannels] = {}, d_delta[kChannels] = {};
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
            const float open = 1.0f / (1.0f + exp_fast(-gate[i])), silu = gate[i] * open;
            dy[i] = up[i] * silu;
            g.z[at + i] = up[i] * y[i] * (open + silu * (1.0f - open));
            g.D[c + i] += dy[i] * x[i];
        }
        for (int64_t k = 0; k < d_state; ++k) {
            const float b = in.B[t * d_state + k], out = in.C[t * d_state + k];
            const float *before = states + t * block + k * kChannels, *after = before + block;
            const float *decay = decays + t * block + k * kChannels, *rate = a + k * kChannels;
            float* __restrict ahead = future + k * kChannels;
            float* __restrict da = a_gradient + k * kChannels;
            float b_sum = 0.0f, c_sum = 0.0f;
#pragma omp simd reduction(+ : b_sum, c_sum)
            for (int64_t i = 0; i < lanes; ++i) {
                const float total = ahead[i] + dy[i] * out, through = total * decay[i], d_exponent = through * before[i];
                c_sum += dy[i] * after[i];
                b_sum += total * delta[i] * x[i];
                d_delta[i] += d_exponent * rate[i] + total * b * x[i];
                dx[i] += total * b;
                da[i] += d_exponent * delta[i];
                ahead[i] = through;
            }
            g.B[t * d_state + k] += b_sum;
            g.C[t * d_state + k] += c_sum;
        }
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
            g.u[at + i] = dx[i] * delta[i] + dy[i] * s.D[c + i];
            // softplus'(v) = 1 - exp(-softplus(v))
            const float d_low = d_delta[i] * (1.0f - exp_fast(-delta[i]));
            g.dt[at + i] = d_low;
            g.dt_bias[c + i] += d_low;
        }
    }
    for (int64_t k = 0; k < d_state; ++k)
        for (int64_t i = 0; i < lanes; ++i) {
            const int64_t to = (c + i) * d_state + k, from = k * kChannels + i;
            g.h[to] = future[from], g.A[to] += a_gradient[from];
        }
}

static void plain_scan_gradient(const Scan& s, int64_t from, int64_t to, int64_t tokens, const ScanInputs& in,
                                const float* gradient, const float* last_gradient, const ScanGradient& g, float* scratch) {
    for (int64_t c = from; c < to; c += kChannels)
        plain_scan_gradient_block(s, c, to - c < kChannels ? to - c : kChannels, tokens, in, gradient, last_gradient, g,
                                  scratch);
}
