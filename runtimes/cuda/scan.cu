// The selective scan over many tokens, in float32: h = exp(delta A) h + delta B u, y = (C h + D u) silu(z), token after token.
// Source: Gu and Dao 2023, equation 2a and algorithm 2.
//
// A thread owns 16 states of a channel, so that a sum over states stays within it (within 2 to 16 neighbouring lanes, where
// there are more states). Where channels alone do not fill a GPU, tokens are cut into chunks that run at the same time. A
// chunk's last state is linear in its first: h = exp(A sum delta) h + what the chunk adds from zero. So scan_chunks runs all
// chunks but the last, the first from the state that came in and the others from zero, and keeps their last states and sums of
// delta; then in scan_rows each chunk carries the state over those before it, in their order, and runs again for its outputs.
// What bounds both are the exponentials: one a state, exp2 of A log2(e) delta.
//
// Layouts: u, z: (tokens, d_inner) float16, strides apart; delta: (tokens, d_inner) float32, behind softplus; bc: (tokens, 2
// S) float32, B and then C, S = 16 lanes, zeros beyond d_state; A, state: (d_inner, d_state) float32; local: (chunks, S,
// d_inner) float32; sums: (chunks, d_inner) float32. Slot 0 of local is the state that came in, slot c + 1 the last state of
// chunk c.
#include "device.cuh"

namespace scan {

constexpr int kStates = 16, kThreads = 128, kAhead = 4;
constexpr float kLog2E = 1.4426950408889634f;

// Which states of which channel are a thread's.
struct Place {
    int channel, first;  // of its states
    bool inside;
    COBRA_DEVICE_MEMBER Place(int lanes, int d_inner) {
        const int i = blockIdx.x * kThreads + threadIdx.x;
        channel = i / lanes, first = i % lanes * kStates, inside = channel < d_inner;
        channel = min(channel, d_inner - 1);
    }
};

COBRA_DEVICE void read_states(const float* rows, const Place& place, int d_state, float scale, float (&v)[kStates]) {
    const float* row = rows + (size_t)place.channel * d_state + place.first;
    if (d_state % kStates == 0) {
        COBRA_UNROLL
        for (int n = 0; n < kStates; n += 4) {
            const float4 f = load(reinterpret_cast<const float4*>(row + n));
            v[n] = f.x * scale, v[n + 1] = f.y * scale, v[n + 2] = f.z * scale, v[n + 3] = f.w * scale;
        }
    } else {
        COBRA_UNROLL
        for (int n = 0; n < kStates; ++n) v[n] = place.first + n < d_state ? load(row + n) * scale : 0.f;
    }
}

COBRA_DEVICE void write_states(float* rows, const Place& place, int d_state, const float (&v)[kStates]) {
    if (!place.inside) return;
    float* row = rows + (size_t)place.channel * d_state + place.first;
    if (d_state % kStates == 0) {
        COBRA_UNROLL
        for (int n = 0; n < kStates; n += 4)
            store(reinterpret_cast<float4*>(row + n), make_float4(v[n], v[n + 1], v[n + 2], v[n + 3]));
    } else {
        COBRA_UNROLL
        for (int n = 0; n < kStates; ++n)
            if (place.first + n < d_state) store(row + n, v[n]);
    }
}

COBRA_DEVICE float* slot(float* local, int index, int states, int d_inner, const Place& place) {
    return local + ((size_t)index * states + place.first) * d_inner + place.channel;
}

// h = exp2(delta rate) h + inflow B, for 16 states.
COBRA_DEVICE void step(float (&h)[kStates], const float (&rate)[kStates], float delta, float inflow, const float* b) {
    COBRA_UNROLL
    for (int n = 0; n < kStates; n += 4) {
        const float4 into = load_constant(reinterpret_cast<const float4*>(b + n));
        h[n] = fast_exp2(delta * rate[n]) * h[n] + inflow * into.x;
        h[n + 1] = fast_exp2(delta * rate[n + 1]) * h[n + 1] + inflow * into.y;
        h[n + 2] = fast_exp2(delta * rate[n + 2]) * h[n + 2] + inflow * into.z;
        h[n + 3] = fast_exp2(delta * rate[n + 3]) * h[n + 3] + inflow * into.w;
    }
}

// The next tokens' delta and u, on their way while others are used; behind the last token it is loaded again.
struct Ahead {
    float delta[kAhead], u[kAhead];
    const float* delta_at;
    const half* u_at;
    int left, delta_stride, u_stride;  // tokens from the next one on
    COBRA_DEVICE_MEMBER Ahead(const float* d, const half* v, int tokens, int d_stride, int v_stride)
        : delta_at(d), u_at(v), left(tokens), delta_stride(d_stride), u_stride(v_stride) {}
    COBRA_DEVICE_MEMBER void load_next(int i) {
        delta[i] = load_constant(delta_at), u[i] = to_float(load_constant(u_at));
        --left;
        delta_at += left > 0 ? delta_stride : 0, u_at += left > 0 ? u_stride : 0;
    }
};

}  // namespace scan

// A grid of (ceil(d_inner lanes / 128), chunks - 1), each chunk of `length` tokens.
COBRA_KERNEL(scan::kThreads, scan_chunks)
(const half* __restrict__ u, const float* __restrict__ delta, const float* __restrict__ A, const float* __restrict__ bc,
 const float* __restrict__ state, float* local, float* sums, int length, int d_inner, int d_state, int lanes, int u_stride) {
    using namespace scan;
    const Place place(lanes, d_inner);
    const int states = lanes * kStates, chunk = blockIdx.y;
    float rate[kStates], h[kStates] = {};
    read_states(A, place, d_state, kLog2E, rate);
    if (chunk == 0) {
        read_states(state, place, d_state, 1.f, h);
        float* at = slot(local, 0, states, d_inner, place);
        if (place.inside) {
            COBRA_UNROLL
            for (int n = 0; n < kStates; ++n) store(at + (size_t)n * d_inner, h[n]);
        }
    }
    const size_t first = (size_t)chunk * length;
    Ahead inputs(delta + first * d_inner + place.channel, u + first * u_stride + place.channel, length, d_inner, u_stride);
    const float* row = bc + first * 2 * states + place.first;
    float total = 0.f;
    COBRA_UNROLL
    for (int i = 0; i < kAhead; ++i) inputs.load_next(i);
    const auto turn = [&](int t, bool whole) {
        COBRA_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            const float now = inputs.delta[i], inflow = now * inputs.u[i];
            inputs.load_next(i);
            if (whole || t + i < length) {
                step(h, rate, now, inflow, row);
                total += now;
                row += 2 * states;
            }
        }
    };
    int t = 0;
    COBRA_UNROLL_BY(1) for (; t + kAhead <= length; t += kAhead) turn(t, true);
    if (t < length) turn(t, false);
    if (!place.inside) return;
    float* at = slot(local, chunk + 1, states, d_inner, place);
    COBRA_UNROLL
    for (int n = 0; n < kStates; ++n) store(at + (size_t)n * d_inner, h[n]);
    if (place.first == 0) store(sums + (size_t)chunk * d_inner + place.channel, total);
}
COBRA_EXPORT(scan_chunks)

// A grid of (ceil(d_inner lanes / 128), chunks), each chunk of `length` tokens, the last of those that are left. Of one chunk,
// local and sums are not read. out: (tokens, d_inner) float16, saturated, out_stride apart.
COBRA_KERNEL(scan::kThreads, scan_rows)
(const half* __restrict__ u, const float* __restrict__ delta, const float* __restrict__ A, const float* __restrict__ bc,
 const float* __restrict__ D, const half* __restrict__ z, float* state, const float* local, const float* sums, half* out,
 int tokens, int length, int d_inner, int d_state, int lanes, int u_stride, int z_stride, int out_stride) {
    using namespace scan;
    const Place place(lanes, d_inner);
    const int states = lanes * kStates, chunk = blockIdx.y, begin = chunk * length, n_tokens = min(length, tokens - begin);
    float rate[kStates], h[kStates] = {};
    read_states(A, place, d_state, kLog2E, rate);
    if (gridDim.y == 1) {
        if (place.inside) read_states(state, place, d_state, 1.f, h);  // who is outside would read what a neighbour writes
    } else {
        const float* at = slot(const_cast<float*>(local), min(chunk, 1), states, d_inner, place);
        COBRA_UNROLL
        for (int n = 0; n < kStates; ++n) h[n] = load(at + (size_t)n * d_inner);
        COBRA_UNROLL_BY(1) for (int before = 1; before < chunk; ++before) {
            const float total = load(sums + (size_t)before * d_inner + place.channel);
            const float* added = slot(const_cast<float*>(local), before + 1, states, d_inner, place);
            COBRA_UNROLL
            for (int n = 0; n < kStates; ++n) h[n] = fast_exp2(total * rate[n]) * h[n] + load(added + (size_t)n * d_inner);
        }
    }
    const float skip = load_constant(D + place.channel);
    const size_t first = begin;
    Ahead inputs(delta + first * d_inner + place.channel, u + first * u_stride + place.channel, n_tokens, d_inner, u_stride);
    const half* z_at = z + first * z_stride + place.channel;
    const float* row = bc + first * 2 * states + place.first;
    half* to = out + first * out_stride + place.channel;
    float gate[kAhead];
    COBRA_UNROLL
    for (int i = 0; i < kAhead; ++i) {
        inputs.load_next(i);
        gate[i] = to_float(load_constant(z_at));
        z_at += i + 1 < n_tokens ? z_stride : 0;
    }
    // kAhead tokens, whose inputs are there; those of the next ones are on their way meanwhile.
    const auto turn = [&](int t, bool whole) {
        COBRA_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            const float now = inputs.delta[i], value = inputs.u[i], g = gate[i];
            inputs.load_next(i);
            gate[i] = to_float(load_constant(z_at));
            z_at += t + kAhead + i + 1 < n_tokens ? z_stride : 0;
            if (whole || t + i < n_tokens) {
                step(h, rate, now, now * value, row);
                float part[4] = {};
                COBRA_UNROLL
                for (int n = 0; n < kStates; n += 4) {
                    const float4 outof = load_constant(reinterpret_cast<const float4*>(row + states + n));
                    part[0] += h[n] * outof.x, part[1] += h[n + 1] * outof.y;
                    part[2] += h[n + 2] * outof.z, part[3] += h[n + 3] * outof.w;
                }
                float y = part[0] + part[1] + (part[2] + part[3]);
                if (lanes > 1) {
                    COBRA_UNROLL_BY(1) for (int w = lanes >> 1; w; w >>= 1) y += shuffle_xor(y, w);
                }
                y = (y + skip * value) * fast_divide(g, 1.f + fast_exp2(-kLog2E * g));
                if (place.inside && place.first == 0) store(to, to_half(saturated(y)));
                row += 2 * states, to += out_stride;
            }
        }
    };
    int t = 0;
    COBRA_UNROLL_BY(1) for (; t + kAhead <= n_tokens; t += kAhead) turn(t, true);
    if (t < n_tokens) turn(t, false);
    if (chunk == (int)gridDim.y - 1) write_states(state, place, d_state, h);
}
COBRA_EXPORT(scan_rows)
