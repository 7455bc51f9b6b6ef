// The causal convolution over many tokens, with SiLU; the window of inputs is carried in and out.
// Source: Gu and Dao 2023, section 3.4.
#include "device.cuh"

namespace conv_rows {

constexpr int kThreads = 128, kMostTaps = 8;

// The input `back` tokens before `token`, from the window where that is before the first: newest last, d_conv of them.
COBRA_DEVICE float input(const half* x, const float* window, int token, int channel, int x_stride, int d_conv) {
    return token >= 0 ? to_float(load_constant(x + (size_t)token * x_stride + channel)) : load(window + d_conv + token);
}

template <int TAPS>
COBRA_DEVICE void convolve(const half* x, float* state, const float* taps, const float* bias, half* out, int tokens, int length,
                     int d_inner, int d_conv, int x_stride) {
    const int channel = blockIdx.x * kThreads + threadIdx.x, begin = blockIdx.y * length, end = min(begin + length, tokens);
    if (channel >= d_inner) return;
    float* window = state + (size_t)channel * d_conv;
    // Aligned to the newest: where there are fewer taps than TAPS, those in front are zero, and so are their inputs.
    float tap[TAPS], held[TAPS];
    COBRA_UNROLL
    for (int k = 0; k < TAPS; ++k) {
        const int at = k - (TAPS - d_conv);
        tap[k] = at >= 0 ? load_constant(taps + (size_t)channel * d_conv + at) : 0.f;
        held[k] =
            at > 0 ? input(x, window, begin + at - d_conv, channel, x_stride, d_conv) : 0.f;  // moved on by the first token
    }
    const float added = load_constant(bias + channel);
    COBRA_UNROLL_BY(1) for (int t = begin; t < end; t += 4) {
        float now[4];
        COBRA_UNROLL
        for (int i = 0; i < 4; ++i) now[i] = to_float(load_constant(x + (size_t)min(t + i, end - 1) * x_stride + channel));
        COBRA_UNROLL
        for (int i = 0; i < 4; ++i) {
            COBRA_UNROLL
            for (int k = 0; k + 1 < TAPS; ++k) held[k] = held[k + 1];
            held[TAPS - 1] = now[i];
            float sum = added;
            COBRA_UNROLL
            for (int k = 0; k < TAPS; ++k) sum += tap[k] * held[k];
            sum = fast_divide(sum, 1.f + fast_exp(-sum));
            if (t + i < end) store(out + (size_t)(t + i) * d_inner + channel, to_half(saturated(sum)));
        }
    }
    // The block of the first tokens, which alone reads the window, writes the next one: it depends on inputs only.
    if (blockIdx.y == 0) {
        float next[kMostTaps];
        COBRA_UNROLL
        for (int k = 0; k < kMostTaps; ++k)
            if (k < d_conv) next[k] = input(x, window, tokens + k - d_conv, channel, x_stride, d_conv);
        COBRA_UNROLL
        for (int k = 0; k < kMostTaps; ++k)
            if (k < d_conv) store(window + k, next[k]);
    }
}

}  // namespace conv_rows

// x: (tokens, d_inner) float16, x_stride apart; state: (d_inner, d_conv) float32, newest last; taps: (d_inner, d_conv); bias:
// (d_inner,); out: (tokens, d_inner) float16, saturated. A grid of (ceil(d_inner / 128), ceil(tokens / length)), length 8 or
// more. conv_rows_4 for 4 taps at most, the other for 8.
COBRA_KERNEL(conv_rows::kThreads, conv_rows_4)
(const half* __restrict__ x, float* state, const float* __restrict__ taps, const float* __restrict__ bias,
 half* __restrict__ out, int tokens, int length, int d_inner, int d_conv, int x_stride) {
    conv_rows::convolve<4>(x, state, taps, bias, out, tokens, length, d_inner, d_conv, x_stride);
}
COBRA_EXPORT(conv_rows_4)

COBRA_KERNEL(conv_rows::kThreads, conv_rows_8)
(const half* __restrict__ x, float* state, const float* __restrict__ taps, const float* __restrict__ bias,
 half* __restrict__ out, int tokens, int length, int d_inner, int d_conv, int x_stride) {
    conv_rows::convolve<8>(x, state, taps, bias, out, tokens, length, d_inner, d_conv, x_stride);
}
COBRA_EXPORT(conv_rows_8)
