// For one token, what a layer does with its input before the recurrence: the causal convolution, and the product with x_proj.
//
//   window moves on by xz[channel];  u[channel] = silu(bias + sum over k of taps[channel, k] · window[k]);  projected[row] =
//   sum of x_proj[row, c] · u[c]
//
// The product needs all channels and the convolution none but its own, so a block convolves 128 channels and multiplies them
// with their columns of x_proj; the block that comes last adds the blocks' sums, in their order: no launch more, and the same
// bits every time.
//
// xz (2 n_inner,) float32, its first half is read. *state: (n_layer, n_inner, d_conv) float32, the newest last; `layer`'s is
// changed. taps (n_inner, d_conv), bias and u (n_inner,) float32. x_proj (n_rows, n_inner): codes and scales as for gemv, or
// float16 (n_rows, row_stride), row_stride even, whatever lies behind n_inner. partials (blocks, n_rows) float32 and arrived,
// 0, are scratch. projected (n_rows,) float32. Grid: n_inner / 128 rounded up, 128 threads. Shared memory: 1024 bytes +
// Rounded::bytes(128).
#include "rounded.cuh"

namespace conv_step {

using namespace cobra;

constexpr int kSlice = kGroup;  // channels of a block
constexpr int kHead = 1024;     // bytes of shared memory: a flag, and the channels' values

// Moves this thread's window on; returns its u.
COBRA_DEVICE float convolve(const float* xz, float* state, int layer, const float* taps, const float* bias, int channel, int n_inner,
                      int d_conv) {
    float* window = state + ((size_t)layer * n_inner + channel) * d_conv;
    const float* tap = taps + (size_t)channel * d_conv;
    const float newest = xz[channel];
    float sum = bias[channel];
    if (d_conv == 4) {
        const float4 w = load((const float4*)window), t = load((const float4*)tap);
        const float4 moved = make_float4(w.y, w.z, w.w, newest);
        store((float4*)window, moved);
        sum += moved.x * t.x + moved.y * t.y + moved.z * t.z + moved.w * t.w;
    } else {
        for (int k = 0; k < d_conv; ++k) {
            const float v = k + 1 < d_conv ? window[k + 1] : newest;
            window[k] = v;
            sum += v * tap[k];
        }
    }
    return silu(sum);
}

// Sums of all blocks, by the last of them.
COBRA_DEVICE void add_parts(const float* partials, float* projected, unsigned* arrived, unsigned char* room, int n_rows) {
    if (!last_block(arrived, (unsigned*)room)) return;
    for (int row = threadIdx.x; row < n_rows; row += kThreads) {
        float sum = 0.f;
        COBRA_UNROLL_BY(8)
        for (int part = 0; part < (int)gridDim.x; ++part) sum += load_coherent(partials + (size_t)part * n_rows + row);
        projected[row] = sum;
    }
}

template <int BITS>
COBRA_DEVICE void step(const uint8_t* codes, const half* scales, const float* xz, float* const* state, int layer, const float* taps,
                 const float* bias, float* u, float* partials, float* projected, unsigned* arrived, int n_rows, int n_inner,
                 int d_conv, int group_shift) {
    using Block = Codes<BITS>;
    constexpr int kLanes = kSlice / Block::kInputs;  // of a row
    COBRA_SHARED(room);
    float* values = (float*)(room + 16);
    const Rounded<BITS> rounded(room + kHead, kSlice);
    const int channel = blockIdx.x * kSlice + threadIdx.x, width = min(kSlice, n_inner - (int)blockIdx.x * kSlice);
    float value = 0.f;
    if (channel < n_inner) u[channel] = value = convolve(xz, *state, layer, taps, bias, channel, n_inner, d_conv);
    values[threadIdx.x] = value;
    sync_block();
    rounded.fill(values, nullptr, nullptr, width, threadIdx.x >> 5, kWarps);
    sync_block();
    const int blocks = n_inner / Block::kInputs, groups = groups_of(n_inner, group_shift),
              shift = group_shift - Block::kLogInputs;
    const int part = threadIdx.x % kLanes, b = blockIdx.x * kLanes + part;
    for (int first = 0; first < n_rows; first += kThreads / kLanes) {
        const int row = first + threadIdx.x / kLanes;
        float sum = 0.f;
        if (row < n_rows && b < blocks) {
            const Block w[1] = {Block::at(codes, (uint32_t)row * blocks + b)};
            int total[1];
            multiply_blocks<BITS, 1>(w, rounded, part, total);
            sum =
                (float)total[0] * (rounded.scales[0] * to_float(load_constant(scales + (size_t)row * groups + (b >> shift))));
        }
        COBRA_UNROLL
        for (int d = 1; d < kLanes; d <<= 1) sum += shuffle_xor(sum, d);
        if (part == 0 && row < n_rows) partials[(size_t)blockIdx.x * n_rows + row] = sum;
    }
    add_parts(partials, projected, arrived, room, n_rows);
}

}  // namespace conv_step

#define CONV_STEP(name, BITS)                                                                                                 \
    COBRA_KERNEL(128, name)(const uint8_t* __restrict__ codes, const half* __restrict__ scales, const float* __restrict__ xz, \
                            float* const* state, int layer, const float* __restrict__ taps, const float* __restrict__ bias,   \
                            float* u, float* partials, float* projected, unsigned* arrived, int n_rows, int n_inner,          \
                            int d_conv, int group_shift) {                                                                    \
        conv_step::step<BITS>(codes, scales, xz, state, layer, taps, bias, u, partials, projected, arrived, n_rows, n_inner,  \
                              d_conv, group_shift);                                                                           \
    }                                                                                                                         \
    COBRA_EXPORT(name)

CONV_STEP(conv_step_w8, 8)
CONV_STEP(conv_step_w4, 4)
CONV_STEP(conv_step_w3, 3)

// 8 lanes a row.
COBRA_KERNEL(128, conv_step_w16)(const half* __restrict__ weights, const float* __restrict__ xz, float* const* state,
                                 int layer, const float* __restrict__ taps, const float* __restrict__ bias, float* u,
                                 float* partials, float* projected, unsigned* arrived, int n_rows, int n_inner, int d_conv,
                                 int row_stride) {
    using namespace conv_step;
    COBRA_SHARED(room);
    float* values = (float*)(room + 16);
    const int begin = blockIdx.x * kSlice, channel = begin + threadIdx.x, width = min(kSlice, n_inner - begin),
              lane8 = threadIdx.x & 7;
    float value = 0.f;
    if (channel < n_inner) u[channel] = value = convolve(xz, *state, layer, taps, bias, channel, n_inner, d_conv);
    values[threadIdx.x] = value;
    sync_block();
    for (int first = 0; first < n_rows; first += kThreads / 8) {
        const int row = first + threadIdx.x / 8;
        float sum = 0.f;
        if (row < n_rows) {
            const half* w = weights + (size_t)row * row_stride + begin;
            for (int i = 2 * lane8; i < width; i += 16) {  // values behind the last channel are 0
                const float2 pair = to_floats(load_constant((const half2*)(w + i)));
                sum += pair.x * values[i] + pair.y * values[i + 1];
            }
        }
        COBRA_UNROLL
        for (int d = 4; d; d >>= 1) sum += shuffle_xor(sum, d);
        if (lane8 == 0 && row < n_rows) partials[(size_t)blockIdx.x * n_rows + row] = sum;
    }
    add_parts(partials, projected, arrived, room, n_rows);
}
COBRA_EXPORT(conv_step_w16)
