// The two sequential parts of a Mamba-1 mixer, causal convolution and selective scan, with their gradients, for training
// cobra-mini on a CPU. Contracts as in cobra_edge.model.mamba (causal_conv, selective_scan), which are the references the test
// compares with. Everything is float32; rows of x and z may be strided, the last axis is contiguous.
//
// The backward scan walks channels in blocks small enough that the block's history of states stays in the second-level
// cache, so states are recomputed and never stored.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>  // and not torch/extension.h, which takes six times as long to compile

#include <cmath>
#include <vector>

namespace {

constexpr int64_t kState = 16;  // d_state of every published Mamba-1
constexpr int64_t kTaps = 4;    // d_conv of every published Mamba-1
constexpr int64_t kBlock = 32;  // channels a block

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// log(1 + exp(x)) written so that neither end overflows.
float softplus(float x) { return std::max(x, 0.0f) + std::log(1.0f + std::exp(-std::abs(x))); }

void check(const at::Tensor& x, const char* name) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.stride(-1) == 1, name, " must be float32 with a contiguous last axis");
}

void check_rows(const at::Tensor& x, const char* name) {
    check(x, name);
    TORCH_CHECK(x.dim() == 3 && x.stride(0) == x.size(1) * x.stride(1), name, " must be (batch, seq, width), evenly strided");
    TORCH_CHECK(x.size(2) % kBlock == 0, name, " has width ", x.size(2), ", expected a multiple of ", kBlock);
}

}  // namespace

// x (batch, seq, d_inner), state (batch, d_inner, kTaps), weight (d_inner, kTaps), bias (d_inner).
at::Tensor conv_forward(at::Tensor x, at::Tensor state, at::Tensor weight, at::Tensor bias) {
    check_rows(x, "x");
    TORCH_CHECK(weight.size(1) == kTaps, "d_conv is ", weight.size(1), ", this kernel is built for ", kTaps);
    const int64_t batch = x.size(0), seq = x.size(1), inner = x.size(2), row = x.stride(1);
    auto u = at::empty({batch, seq, inner}, x.options());
    const auto past = state.transpose(1, 2).contiguous(), taps = weight.t().contiguous();
    const float *xp = x.data_ptr<float>(), *pp = past.data_ptr<float>(), *wp = taps.data_ptr<float>();
    const float* biasp = bias.data_ptr<float>();
    float* up = u.data_ptr<float>();
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
        for (int64_t b = from; b < to; ++b)
            for (int64_t t = 0; t < seq; ++t) {
                const float* in[kTaps];
                for (int64_t k = 0; k < kTaps; ++k) {
                    const int64_t at = t + k - (kTaps - 1);
                    in[k] = at >= 0 ? xp + (b * seq + at) * row : pp + (b * kTaps + kTaps + at) * inner;
                }
                float* __restrict out = up + (b * seq + t) * inner;
                for (int64_t d = 0; d < inner; ++d) {
                    const float s = biasp[d] + wp[d] * in[0][d] + wp[inner + d] * in[1][d] + wp[2 * inner + d] * in[2][d] +
                                    wp[3 * inner + d] * in[3][d];
                    out[d] = s * sigmoid(s);
                }
            }
    });
    return u;
}

std::vector<at::Tensor> conv_backward(at::Tensor x, at::Tensor state, at::Tensor weight, at::Tensor bias, at::Tensor gu) {
    const int64_t batch = x.size(0), seq = x.size(1), inner = x.size(2), row = x.stride(1);
    const auto past = state.transpose(1, 2).contiguous(), taps = weight.t().contiguous();
    auto gx = at::zeros({batch, seq, inner}, x.options()), gpast = at::zeros_like(past);
    const int64_t threads = at::get_num_threads();
    auto gweights = at::zeros({threads, kTaps + 1, inner}, x.options());  // the last row is the bias
    const float *xp = x.data_ptr<float>(), *pp = past.data_ptr<float>(), *wp = taps.data_ptr<float>();
    const float *biasp = bias.data_ptr<float>(), *gup = gu.data_ptr<float>();
    float *gxp = gx.data_ptr<float>(), *gpp = gpast.data_ptr<float>(), *gwp = gweights.data_ptr<float>();
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
        float* mine = gwp + at::get_thread_num() * (kTaps + 1) * inner;
        std::vector<float> gs(inner);
        for (int64_t b = from; b < to; ++b)
            for (int64_t t = 0; t < seq; ++t) {
                const float* in[kTaps];
                float* gin[kTaps];
                for (int64_t k = 0; k < kTaps; ++k) {
                    const int64_t at = t + k - (kTaps - 1);
                    in[k] = at >= 0 ? xp + (b * seq + at) * row : pp + (b * kTaps + kTaps + at) * inner;
                    gin[k] = at >= 0 ? gxp + (b * seq + at) * inner : gpp + (b * kTaps + kTaps + at) * inner;
                }
                const float* g = gup + (b * seq + t) * inner;
                float* __restrict gsp = gs.data();
                float* __restrict gb = mine + kTaps * inner;
                for (int64_t d = 0; d < inner; ++d) {
                    const float s = biasp[d] + wp[d] * in[0][d] + wp[inner + d] * in[1][d] + wp[2 * inner + d] * in[2][d] +
                                    wp[3 * inner + d] * in[3][d];
                    const float sg = sigmoid(s);
                    gsp[d] = g[d] * sg * (1.0f + s * (1.0f - sg));
                    gb[d] += gsp[d];
                }
                for (int64_t k = 0; k < kTaps; ++k) {
                    float* __restrict gw = mine + k * inner;
                    float* __restrict gi = gin[k];
                    const float *w = wp + k * inner, *i = in[k];
                    for (int64_t d = 0; d < inner; ++d) {
                        gw[d] += gsp[d] * i[d];
                        gi[d] += gsp[d] * w[d];
                    }
                }
            }
    });
    const auto sum = gweights.sum(0);
    return {gx, gpast.transpose(1, 2).contiguous(), sum.narrow(0, 0, kTaps).t().contiguous(), sum[kTaps].clone()};
}

// u, dt, z (batch, seq, d_inner); A (d_inner, kState); B, C (batch, seq, kState); D, bias (d_inner); h (batch, d_inner,
// kState).
//
// Inside a block, channels are the vector lanes and the state's 16 parts a loop around them: [n][k], not [k][n], so that no
// sum runs across a vector but those of B's and C's gradients.
namespace {

using Block = float[kState][kBlock];

void load_block(Block& to, const float* from) {  // (kBlock, kState) in memory
    for (int64_t k = 0; k < kBlock; ++k)
        for (int64_t n = 0; n < kState; ++n) to[n][k] = from[k * kState + n];
}

void store_block(float* to, const Block& from) {
    for (int64_t k = 0; k < kBlock; ++k)
        for (int64_t n = 0; n < kState; ++n) to[k * kState + n] = from[n][k];
}

}  // namespace

std::vector<at::Tensor> scan_forward(at::Tensor u, at::Tensor dt, at::Tensor A, at::Tensor B, at::Tensor C, at::Tensor D,
                                     at::Tensor z, at::Tensor bias, at::Tensor h0) {
    check_rows(u, "u");
    check_rows(z, "z");
    TORCH_CHECK(A.size(1) == kState, "d_state is ", A.size(1), ", this kernel is built for ", kState);
    const int64_t batch = u.size(0), seq = u.size(1), inner = u.size(2), zrow = z.stride(1);
    auto out = at::empty_like(u), last = at::empty_like(h0);
    const float *up = u.data_ptr<float>(), *dp = dt.data_ptr<float>(), *ap = A.data_ptr<float>();
    const float *bp = B.data_ptr<float>(), *cp = C.data_ptr<float>(), *skip = D.data_ptr<float>();
    const float *zp = z.data_ptr<float>(), *biasp = bias.data_ptr<float>(), *h0p = h0.data_ptr<float>();
    float *op = out.data_ptr<float>(), *hp = last.data_ptr<float>();
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
        Block a, h;
        for (int64_t b = from; b < to; ++b)
            for (int64_t block = 0; block < inner; block += kBlock) {
                load_block(a, ap + block * kState);
                load_block(h, h0p + (b * inner + block) * kState);
                for (int64_t t = 0; t < seq; ++t) {
                    const int64_t at = b * seq + t;
                    const float *Bt = bp + at * kState, *Ct = cp + at * kState;
                    const float *x = up + at * inner + block, *raw = dp + at * inner + block;
                    const float* gate = zp + at * zrow + block;
                    float step[kBlock], in[kBlock], y[kBlock];
                    for (int64_t k = 0; k < kBlock; ++k) {
                        step[k] = softplus(raw[k] + biasp[block + k]);
                        in[k] = step[k] * x[k];
                        y[k] = skip[block + k] * x[k];
                    }
                    for (int64_t n = 0; n < kState; ++n) {
                        const float bn = Bt[n], cn = Ct[n];
#pragma omp simd
                        for (int64_t k = 0; k < kBlock; ++k) {
                            h[n][k] = std::exp(step[k] * a[n][k]) * h[n][k] + in[k] * bn;
                            y[k] += h[n][k] * cn;
                        }
                    }
                    float* __restrict o = op + at * inner + block;
                    for (int64_t k = 0; k < kBlock; ++k) o[k] = y[k] * gate[k] * sigmoid(gate[k]);
                }
                store_block(hp + (b * inner + block) * kState, h);
            }
    });
    return {out, last};
}

std::vector<at::Tensor> scan_backward(at::Tensor u, at::Tensor dt, at::Tensor A, at::Tensor B, at::Tensor C, at::Tensor D,
                                      at::Tensor z, at::Tensor bias, at::Tensor h0, at::Tensor gout, at::Tensor glast) {
    const int64_t batch = u.size(0), seq = u.size(1), inner = u.size(2), zrow = z.stride(1);
    auto gu = at::empty_like(u), gdt = at::empty_like(u), gz = at::empty({batch, seq, inner}, u.options());
    auto gB = at::zeros_like(B), gC = at::zeros_like(C), gh = at::empty_like(glast);
    const int64_t threads = at::get_num_threads();
    auto gA = at::zeros({threads, inner, kState}, A.options());
    auto gvec = at::zeros({threads, 2, inner}, A.options());  // D, then the bias of dt
    const float *up = u.data_ptr<float>(), *dp = dt.data_ptr<float>(), *ap = A.data_ptr<float>();
    const float *bp = B.data_ptr<float>(), *cp = C.data_ptr<float>(), *skip = D.data_ptr<float>();
    const float *zp = z.data_ptr<float>(), *biasp = bias.data_ptr<float>(), *h0p = h0.data_ptr<float>();
    const float *gop = gout.data_ptr<float>(), *glp = glast.data_ptr<float>();
    float *gup = gu.data_ptr<float>(), *gdp = gdt.data_ptr<float>(), *gzp = gz.data_ptr<float>();
    float *gbp = gB.data_ptr<float>(), *gcp = gC.data_ptr<float>(), *ghp = gh.data_ptr<float>();
    float *gap = gA.data_ptr<float>(), *gvp = gvec.data_ptr<float>();
    at::parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
        std::vector<float> history_store(static_cast<size_t>(seq + 1) * kState * kBlock);
        std::vector<float> decay_store(static_cast<size_t>(seq) * kState * kBlock);
        std::vector<float> step_store(static_cast<size_t>(seq) * kBlock), y_store(static_cast<size_t>(seq) * kBlock);
        auto* history = reinterpret_cast<Block*>(history_store.data());
        auto* decays = reinterpret_cast<Block*>(decay_store.data());
        const int64_t thread = at::get_thread_num();
        Block a, g, gAb;
        for (int64_t b = from; b < to; ++b)
            for (int64_t block = 0; block < inner; block += kBlock) {
                load_block(a, ap + block * kState);
                load_block(g, glp + (b * inner + block) * kState);
                load_block(gAb, gap + (thread * inner + block) * kState);
                load_block(history[0], h0p + (b * inner + block) * kState);
                for (int64_t t = 0; t < seq; ++t) {
                    const int64_t at = b * seq + t;
                    const float *Bt = bp + at * kState, *Ct = cp + at * kState;
                    const float *x = up + at * inner + block, *raw = dp + at * inner + block;
                    float* __restrict step = step_store.data() + t * kBlock;
                    float* __restrict y = y_store.data() + t * kBlock;
                    float in[kBlock];
                    for (int64_t k = 0; k < kBlock; ++k) {
                        step[k] = softplus(raw[k] + biasp[block + k]);
                        in[k] = step[k] * x[k];
                        y[k] = skip[block + k] * x[k];
                    }
                    const Block& before = history[t];
                    Block &after = history[t + 1], &decay = decays[t];
                    for (int64_t n = 0; n < kState; ++n) {
                        const float bn = Bt[n], cn = Ct[n];
#pragma omp simd
                        for (int64_t k = 0; k < kBlock; ++k) {
                            decay[n][k] = std::exp(step[k] * a[n][k]);
                            after[n][k] = decay[n][k] * before[n][k] + in[k] * bn;
                            y[k] += after[n][k] * cn;
                        }
                    }
                }
                float *gD = gvp + thread * 2 * inner + block, *gbias = gD + inner;
                for (int64_t t = seq - 1; t >= 0; --t) {
                    const int64_t at = b * seq + t, here = at * inner + block;
                    const float *Bt = bp + at * kState, *Ct = cp + at * kState, *x = up + here, *go = gop + here;
                    const float *gate = zp + at * zrow + block, *step = step_store.data() + t * kBlock;
                    const float* y = y_store.data() + t * kBlock;
                    float dy[kBlock], in[kBlock], gin[kBlock] = {}, gstep[kBlock] = {};
#pragma omp simd
                    for (int64_t k = 0; k < kBlock; ++k) {
                        const float sg = sigmoid(gate[k]), open = gate[k] * sg;
                        dy[k] = go[k] * open;
                        in[k] = step[k] * x[k];
                        gzp[here + k] = go[k] * y[k] * (sg + open * (1.0f - sg));
                        gD[k] += dy[k] * x[k];
                    }
                    const Block &before = history[t], &after = history[t + 1], &decay = decays[t];
                    for (int64_t n = 0; n < kState; ++n) {
                        const float bn = Bt[n], cn = Ct[n];
                        float sumB = 0, sumC = 0;
#pragma omp simd reduction(+ : sumB, sumC)
                        for (int64_t k = 0; k < kBlock; ++k) {
                            const float total = g[n][k] + dy[k] * cn;
                            const float through = total * decay[n][k];
                            const float gexp = through * before[n][k];
                            sumC += dy[k] * after[n][k];
                            sumB += total * in[k];
                            gstep[k] += gexp * a[n][k];
                            gAb[n][k] += gexp * step[k];
                            gin[k] += total * bn;
                            g[n][k] = through;
                        }
                        gbp[at * kState + n] += sumB;
                        gcp[at * kState + n] += sumC;
                    }
#pragma omp simd
                    for (int64_t k = 0; k < kBlock; ++k) {
                        gup[here + k] = gin[k] * step[k] + dy[k] * skip[block + k];
                        const float graw =
                            (gstep[k] + gin[k] * x[k]) * (1.0f - std::exp(-step[k]));  // softplus' from softplus
                        gdp[here + k] = graw;
                        gbias[k] += graw;
                    }
                }
                store_block(gap + (thread * inner + block) * kState, gAb);
                store_block(ghp + (b * inner + block) * kState, g);
            }
    });
    const auto vectors = gvec.sum(0);
    return {gu, gdt, gA.sum(0), gB, gC, vectors[0].clone(), gz, vectors[1].clone(), gh};
}

TORCH_LIBRARY(cobra_edge_training, m) {
    m.def("conv_forward", conv_forward);
    m.def("conv_backward", conv_backward);
    m.def("scan_forward", scan_forward);
    m.def("scan_backward", scan_backward);
}
