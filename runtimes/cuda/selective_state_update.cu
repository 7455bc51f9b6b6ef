// One token's recurrence: dt_proj, softplus, the state's step and the gate.
//
//   dt = softplus(dt_proj · low + dt_bias);  h = exp(dt · A) h + dt · B · u;  y = (C · h + D · u) · silu(z)          (Gu and
//   Dao 2023, algorithm 2)
//
// projected (dt_rank + 2 d_state,) float32: low, B, C. dt_proj (n_inner, dt_rank): float16 with rows row_stride apart,
// an even number, zeros behind dt_rank (selective_state_update_w16), or 8-bit codes with
// scales as for gemv (selective_state_update_w8). dt_bias, D, u, y (n_inner,) float32; A (n_inner, d_state) float32, negative;
// xz (2 n_inner,) float32, its second half is z. *state: (n_layer, n_inner, d_state) float32; `layer`'s is changed.
//
// 8 lanes a channel, 16 channels a block. Grid: n_inner / 16 rounded up, 128 threads.
// Shared memory: 4 · (dt_rank + 2 d_state) bytes rounded up to 16, and for _w8 also Rounded::bytes(dt_rank).
#include "rounded.cuh"

namespace state_update {

using namespace cobra;

constexpr int kChannels = kThreads / 8;

COBRA_DEVICE float sum_of_eight(float v) {
    COBRA_UNROLL
    for (int d = 4; d; d >>= 1) v += shuffle_xor(v, d);
    return v;
}

struct Channel {
    int lane8, index;
    bool inside;
    COBRA_DEVICE_MEMBER explicit Channel(int n_inner) {
        lane8 = threadIdx.x & 7;
        index = blockIdx.x * kChannels + (threadIdx.x >> 3);
        inside = index < n_inner;
        index = min(index, n_inner - 1);
    }
};

// Copies what x_proj left into shared memory.
COBRA_DEVICE void fetch(const float* projected, float* low, int n) {
    for (int i = threadIdx.x; i < n; i += kThreads) low[i] = projected[i];
    sync_block();
}

// `before` is dt_proj · low + dt_bias, the same in the eight lanes.
COBRA_DEVICE void update(const Channel& c, float before, const float* B, const float* C, const float* A, const float* D,
                   const float* xz, const float* u, float* state, int layer, float* y, int n_inner, int d_state) {
    const float delta = softplus(before), value = u[c.index], inflow = delta * value;
    float* h = state + ((size_t)layer * n_inner + c.index) * d_state;
    const float* rate = A + (size_t)c.index * d_state;
    float sum = 0.f;
    if (d_state % 2 == 0) {
        for (int n = c.inside ? 2 * c.lane8 : d_state; n < d_state; n += 16) {
            const float2 a = load((const float2*)(rate + n));
            float2 v = load((const float2*)(h + n));
            v.x = expf(delta * a.x) * v.x + inflow * B[n];
            v.y = expf(delta * a.y) * v.y + inflow * B[n + 1];
            store((float2*)(h + n), v);
            sum += v.x * C[n] + v.y * C[n + 1];
        }
    } else {
        for (int n = c.inside ? c.lane8 : d_state; n < d_state; n += 8) {
            const float v = expf(delta * rate[n]) * h[n] + inflow * B[n];
            h[n] = v;
            sum += v * C[n];
        }
    }
    sum = sum_of_eight(sum);
    if (c.inside && c.lane8 == 0) y[c.index] = (sum + D[c.index] * value) * silu(xz[n_inner + c.index]);
}

}  // namespace state_update

COBRA_KERNEL(128, selective_state_update_w16)(const float* __restrict__ projected, const half* __restrict__ dt_proj,
                                              const float* __restrict__ dt_bias, const float* __restrict__ A,
                                              const float* __restrict__ D, const float* __restrict__ xz,
                                              const float* __restrict__ u, float* const* state, int layer, float* y,
                                              int n_inner, int dt_rank, int d_state, int row_stride) {
    using namespace state_update;
    COBRA_SHARED(room);
    float* low = (float*)room;
    const Channel c(n_inner);
    fetch(projected, low, dt_rank + 2 * d_state);
    const half* w = dt_proj + (size_t)c.index * row_stride;
    float sum = 0.f;
    for (int i = 2 * c.lane8; i < dt_rank;
         i += 16) {  // behind the last of low lies B, with a weight of 0: as finite as the rest
        const float2 pair = to_floats(load_constant((const half2*)(w + i)));
        sum += pair.x * low[i] + pair.y * low[i + 1];
    }
    const float *B = low + dt_rank, *C = B + d_state;
    update(c, sum_of_eight(sum) + dt_bias[c.index], B, C, A, D, xz, u, *state, layer, y, n_inner, d_state);
}
COBRA_EXPORT(selective_state_update_w16)

COBRA_KERNEL(128, selective_state_update_w8)(const float* __restrict__ projected, const uint8_t* __restrict__ codes,
                                             const half* __restrict__ scales, const float* __restrict__ dt_bias,
                                             const float* __restrict__ A, const float* __restrict__ D,
                                             const float* __restrict__ xz, const float* __restrict__ u, float* const* state,
                                             int layer, float* y, int n_inner, int dt_rank, int d_state, int group_shift) {
    using namespace state_update;
    using Block = Codes<8>;
    COBRA_SHARED(room);
    float* low = (float*)room;
    const int n = dt_rank + 2 * d_state;
    const Rounded<8> rounded(room + (4 * n + 15) / 16 * 16, dt_rank);
    const Channel c(n_inner);
    fetch(projected, low, n);
    rounded.fill(low, nullptr, nullptr, dt_rank, threadIdx.x >> 5, kWarps);
    sync_block();
    const int blocks = dt_rank / Block::kInputs, groups = groups_of(dt_rank, group_shift),
              shift = group_shift - Block::kLogInputs;
    float sum = 0.f;
    for (int b = c.lane8; b < blocks; b += 8) {
        const Block w[1] = {Block::at(codes, (uint32_t)c.index * blocks + b)};
        int total[1];
        multiply_blocks<8, 1>(w, rounded, b, total);
        sum += (float)total[0] * (rounded.scales[b / (kGroup / Block::kInputs)] *
                                  to_float(load_constant(scales + (size_t)c.index * groups + (b >> shift))));
    }
    const float *B = low + dt_rank, *C = B + d_state;
    update(c, sum_of_eight(sum) + dt_bias[c.index], B, C, A, D, xz, u, *state, layer, y, n_inner, d_state);
}
COBRA_EXPORT(selective_state_update_w8)
