// A program that compares every table of kernels this processor supports with naive references in double precision, and the
// whole decoder with itself and with the test cases named as arguments: for platforms without Python, such as an emulated
// ARM, and for sanitizers. Exit code 0 or 1.
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "replay.h"

namespace {

using namespace cobra_edge;

std::mt19937 random_bits(1);
int failures = 0;

Floats normal(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> d(0.0f, scale);
    Floats v(static_cast<size_t>(n));
    for (auto& x : v) x = d(random_bits);
    return v;
}

// Relative RMS error; infinite if a value was not written.
double distance(const Floats& got, const std::vector<double>& expected) {
    double difference = 0, size = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(got[i])) return std::numeric_limits<double>::infinity();
        difference += (got[i] - expected[i]) * (got[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return std::sqrt(difference / size);
}

void judge(const Kernels& k, const char* what, int64_t size, double found, double limit) {
    if (found <= limit) return;
    std::printf("FAILED  %s %s (%lld): distance %.3g, at most %.3g\n", k.name, what, static_cast<long long>(size), found,
                limit);
    ++failures;
}

Floats poisoned(int64_t n) { return Floats(static_cast<size_t>(n), std::numeric_limits<float>::quiet_NaN()); }

double half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

// A matrix of random codes with the memory it refers to, and its dequantized values.
struct Owned {
    Matrix m;
    std::vector<uint8_t> bytes;
    std::vector<uint16_t> scales;
    Floats clips;
    std::vector<double> dense;
};

// The signed value of code c of a row.
int value_of(Storage storage, const uint8_t* row, int64_t c) {
    if (storage == Storage::kInt8) return row[c] - 128;
    if (storage == Storage::kInt4) return (row[c / 32 * 16 + c % 16] >> (c % 32 / 16 * 4) & 15) - 8;
    const uint8_t* block = row + c / 64 * 24;
    const int64_t s = c % 64 / 16, j = c % 16;
    return ((block[j] >> (2 * s) & 3) | (block[16 + j % 8] >> (2 * s + j / 8) & 1) << 2) - 4;
}

Owned quantized(int64_t rows, int64_t cols, Storage storage, int64_t group, bool clipped, int scale_exponent = 10) {
    Owned o;
    o.m.storage = storage;
    o.m.rows = rows;
    o.m.cols = cols;
    o.m.group = group;
    o.bytes.resize(static_cast<size_t>(rows * o.m.row_bytes()));
    for (auto& b : o.bytes) b = static_cast<uint8_t>(random_bits());
    o.scales.resize(static_cast<size_t>(rows * o.m.groups()));
    for (auto& s : o.scales) s = static_cast<uint16_t>((random_bits() & 0x83ff) | static_cast<unsigned>(scale_exponent) << 10);
    o.m.values = o.bytes.data();
    o.m.scales = o.scales.data();
    if (clipped) {
        o.clips = normal(o.m.groups(), 0.5f);  // small enough that most take effect
        for (auto& c : o.clips) c = 1.5f + std::fabs(c);
        o.m.clips = o.clips.data();
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) {
            const double scale = half_value(o.scales[static_cast<size_t>(r * o.m.groups() + c / group)]);
            o.dense.push_back(value_of(storage, o.m.row(r), c) * scale);
        }
    return o;
}

std::vector<double> matmul(const Owned& o, const std::vector<double>& x, int64_t tokens) {
    std::vector<double> y;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < o.m.rows; ++r) {
            double sum = 0;
            for (int64_t c = 0; c < o.m.cols; ++c)
                sum += o.dense[static_cast<size_t>(r * o.m.cols + c)] * x[static_cast<size_t>(t * o.m.cols + c)];
            y.push_back(sum);
        }
    return y;
}

// Dequantized int8 activations: each group rounded to nearest with the scale min(largest magnitude, clip) / 127.
std::vector<double> rounded(const Floats& x, const Matrix& m) {
    std::vector<double> out;
    const auto group = static_cast<size_t>(m.group);
    for (size_t start = 0; start < x.size(); start += group) {
        float top = 0;
        for (size_t i = start; i < start + group; ++i) top = std::max(top, std::fabs(x[i]));
        if (m.clips) top = std::min(top, m.clips[start / group % static_cast<size_t>(m.groups())]);
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        for (size_t i = start; i < start + group; ++i) {
            const float code = std::nearbyint(std::max(-top, std::min(top, x[i])) * inverse);
            out.push_back(code * static_cast<double>(top / 127.0f));
        }
    }
    return out;
}

void test_matmuls(const Kernels& k, Storage storage, int64_t group, int64_t cols, bool clipped) {
    for (const int64_t tokens : {1, 3, 4, 9, 21}) {
        const int64_t rows = 13;
        const Owned o = quantized(rows, cols, storage, group, clipped);
        const Floats x = normal(tokens * cols);
        std::vector<int8_t> codes(x.size());
        Floats code_scales = poisoned(tokens * o.m.groups());
        std::vector<int32_t> code_sums(static_cast<size_t>(tokens * o.m.groups() + kSpareSums), 1 << 30);
        const Int8Rows packed{codes.data(), code_scales.data(), code_sums.data(), cols, o.m.groups()};
        for (int64_t t = 0; t < tokens; ++t) k.quantize(x.data() + t * cols, o.m, t, 0, o.m.groups(), packed);
        Floats y = poisoned(tokens * rows), scratch(static_cast<size_t>(scratch_floats(cols)));
        k.matmul_int8(o.m, 0, rows, packed, tokens, y.data(), rows, false, scratch.data());
        judge(k, "int8 matmul", group, distance(y, matmul(o, rounded(x, o.m), tokens)), 1e-5);
        y = poisoned(tokens * rows);
        k.matmul_float(o.m, 0, rows, x.data(), cols, tokens, y.data(), rows, false, scratch.data());
        const std::vector<double> wide(x.begin(), x.end());
        judge(k, "float matmul", group, distance(y, matmul(o, wide, tokens)), 1e-5);
    }
}

void test_exponential(const Kernels& k) {
    Floats x, y;
    for (double v = -87; v < 88; v += 0.0037) x.push_back(static_cast<float>(v));
    y = poisoned(static_cast<int64_t>(x.size()));
    k.exponential(x.data(), static_cast<int64_t>(x.size()), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::fabs(y[i] / std::exp(static_cast<double>(x[i])) - 1));
    judge(k, "exponential", static_cast<int64_t>(x.size()), worst, 2e-7);
}

// Infinities and NaN with several bit patterns, some of whose low bits look like an exponent.
Floats not_finite() {
    Floats values;
    for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00000u, 0x7fc001ffu, 0xffc00080u, 0x7fffffffu}) {
        float value;
        std::memcpy(&value, &bits, 4);
        values.push_back(value);
    }
    return values;
}

void require(const Kernels& k, const char* what, int64_t size, bool ok) { judge(k, what, size, ok ? 0 : 1, 0); }

// A token with one such value has only NaN results, and its neighbors have none.
void test_matmuls_carry_nan(const Kernels& k, Storage storage, int64_t group, bool clipped) {
    const int64_t rows = 13, cols = 2 * group, tokens = 5;
    const Owned o = quantized(rows, cols, storage, group, clipped);
    const Floats odd = not_finite();
    for (size_t i = 0; i < odd.size(); ++i) {
        Floats x = normal(tokens * cols);
        x[static_cast<size_t>(3 * cols + static_cast<int64_t>(i * 37) % cols)] = odd[i];
        std::vector<int8_t> codes(x.size());
        Floats code_scales = poisoned(tokens * o.m.groups());
        std::vector<int32_t> code_sums(static_cast<size_t>(tokens * o.m.groups() + kSpareSums), 1 << 30);
        const Int8Rows packed{codes.data(), code_scales.data(), code_sums.data(), cols, o.m.groups()};
        for (int64_t t = 0; t < tokens; ++t) k.quantize(x.data() + t * cols, o.m, t, 0, o.m.groups(), packed);
        for (const int64_t first : {0, 3}) {  // GEMM, and GEMV
            const int64_t n = tokens - first;
            const Int8Rows part{codes.data() + first * cols, code_scales.data() + first * o.m.groups(),
                                code_sums.data() + first * o.m.groups(), cols, o.m.groups()};
            Floats y = poisoned(n * rows), scratch(static_cast<size_t>(scratch_floats(cols)));
            k.matmul_int8(o.m, 0, rows, part, n, y.data(), rows, false, scratch.data());
            for (int64_t t = 0; t < n; ++t)
                for (int64_t r = 0; r < rows; ++r) {
                    const float value = y[static_cast<size_t>(t * rows + r)];
                    require(k, "NaN of int8 matmuls", group, first + t == 3 ? std::isnan(value) : std::isfinite(value));
                }
        }
    }
}

// NaN in any input of convolution or scan reaches the output of its channel, and no other.
void test_recurrence_carries_nan(const Kernels& k) {
    const int64_t channels = 37, taps = 4, d_state = 16;
    for (const float nan : not_finite()) {
        if (!std::isnan(nan)) continue;
        Floats e(5), x(5, nan);
        k.exponential(x.data(), 5, e.data());
        for (const float v : e) require(k, "NaN of the exponential", 5, std::isnan(v));
        for (const int64_t at : {int64_t{3}, channels - 1}) {  // in a block, and in the remainder
            const auto c = static_cast<size_t>(at);
            for (int which = 0; which < 7; ++which) {
                Floats in = normal(channels), weight = normal(taps * channels), bias = normal(channels);
                Floats past = normal(channels * taps), u = poisoned(channels);
                if (which < 3) (which == 0 ? in : which == 1 ? bias : past)[which == 2 ? c * 4 + 2 : c] = nan;
                const Conv conv{weight.data(), bias.data(), taps, channels};
                k.conv_silu(conv, 0, channels, in.data(), channels, 1, past.data(), u.data(), channels);
                if (which < 3)
                    for (size_t i = 0; i < u.size(); ++i)
                        require(k, "NaN of the convolution", which, std::isnan(u[i]) == (i == c));
                Floats dt = normal(channels), z = normal(channels), dt_bias = normal(channels), D = normal(channels);
                Floats B = normal(d_state), C = normal(d_state), A = normal(channels * d_state),
                       h = normal(channels * d_state);
                for (auto& a : A) a = -std::exp(a);
                u = normal(channels);
                Floats* const inputs[] = {&u, &dt, &z, &dt_bias, &D, &A, &h};
                (*inputs[which])[which < 5 ? c : c * d_state + 5] = nan;
                Floats out = poisoned(channels);
                const Scan scan{A.data(), D.data(), dt_bias.data(), channels, d_state};
                k.selective_scan(scan, 0, channels, 1, dt.data(), channels, B.data(), C.data(), d_state, z.data(), channels,
                                 h.data(), u.data(), out.data(), channels);
                for (size_t i = 0; i < out.size(); ++i) require(k, "NaN of the scan", which, std::isnan(out[i]) == (i == c));
            }
        }
    }
}

void test_scan(const Kernels& k, int64_t channels, int64_t d_state) {
    const int64_t tokens = 5;
    const Floats u = normal(tokens * channels), dt = normal(tokens * channels, 3), z = normal(tokens * channels);
    const Floats B = normal(tokens * d_state), C = normal(tokens * d_state), D = normal(channels), bias = normal(channels);
    Floats A = normal(channels * d_state), h = normal(channels * d_state), out = poisoned(tokens * channels);
    for (auto& a : A) a = -std::exp(a);
    std::vector<double> state(h.begin(), h.end()), expected;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < channels; ++c) {
            const auto at = static_cast<size_t>(t * channels + c);
            const double delta = std::log1p(std::exp(static_cast<double>(dt[at]) + bias[static_cast<size_t>(c)]));
            double y = static_cast<double>(D[static_cast<size_t>(c)]) * u[at];
            for (int64_t n = 0; n < d_state; ++n) {
                double& s = state[static_cast<size_t>(c * d_state + n)];
                s = std::exp(delta * A[static_cast<size_t>(c * d_state + n)]) * s +
                    delta * u[at] * B[static_cast<size_t>(t * d_state + n)];
                y += s * C[static_cast<size_t>(t * d_state + n)];
            }
            expected.push_back(y * z[at] / (1 + std::exp(-static_cast<double>(z[at]))));
        }
    const Scan scan{A.data(), D.data(), bias.data(), channels, d_state};
    k.selective_scan(scan, 0, channels, tokens, dt.data(), channels, B.data(), C.data(), d_state, z.data(), channels, h.data(),
                     u.data(), out.data(), channels);
    judge(k, "scan", d_state, distance(out, expected), 1e-5);
    judge(k, "state of the scan", d_state, distance(h, state), 1e-5);
}

// What a scan reads, in double precision: u, dt, B, C, z, h, A, D, dt_bias, as in ScanGradient.
using ScanValues = std::array<std::vector<double>, 9>;

// Sum of the scan's outputs and of its final state, weighed by `up` and `last`.
double weighed_scan(const ScanValues& v, const Floats& up, const Floats& last, int64_t tokens, int64_t channels,
                    int64_t d_state) {
    const auto& [u, dt, B, C, z, h, A, D, bias] = v;
    std::vector<double> state = h;
    double sum = 0;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < channels; ++c) {
            const auto at = static_cast<size_t>(t * channels + c), channel = static_cast<size_t>(c);
            const double delta = std::log1p(std::exp(dt[at] + bias[channel]));
            double y = D[channel] * u[at];
            for (int64_t n = 0; n < d_state; ++n) {
                const auto k = static_cast<size_t>(c * d_state + n), narrow = static_cast<size_t>(t * d_state + n);
                state[k] = std::exp(delta * A[k]) * state[k] + delta * u[at] * B[narrow];
                y += state[k] * C[narrow];
            }
            sum += up[at] * y * z[at] / (1 + std::exp(-z[at]));
        }
    for (size_t i = 0; i < state.size(); ++i) sum += last[i] * state[i];
    return sum;
}

// Gradients of the scan against central differences.
void test_scan_gradient(const Kernels& k, int64_t channels, int64_t d_state) {
    const int64_t tokens = 3, wide = tokens * channels, narrow = tokens * d_state, states = channels * d_state;
    const std::array<int64_t, 9> sizes = {wide, wide, narrow, narrow, wide, states, states, channels, channels};
    std::array<Floats, 9> inputs, found;
    ScanValues values;
    for (size_t i = 0; i < sizes.size(); ++i) {
        inputs[i] = normal(sizes[i]);
        found[i] = Floats(static_cast<size_t>(sizes[i]));
    }
    for (auto& a : inputs[6]) a = -std::exp(a);
    for (size_t i = 0; i < sizes.size(); ++i) values[i].assign(inputs[i].begin(), inputs[i].end());
    const Floats up = normal(wide), last = normal(states);
    const auto& [u, dt, B, C, z, h, A, D, bias] = inputs;
    const Scan scan{A.data(), D.data(), bias.data(), channels, d_state};
    const ScanInputs in{u.data(), dt.data(), B.data(), C.data(), z.data(), h.data()};
    const ScanGradient out{found[0].data(), found[1].data(), found[2].data(), found[3].data(), found[4].data(),
                           found[5].data(), found[6].data(), found[7].data(), found[8].data()};
    Floats scratch(static_cast<size_t>(scan_gradient_floats(tokens, d_state)));
    k.scan_gradient(scan, 0, channels, tokens, in, up.data(), last.data(), out, scratch.data());
    for (size_t i = 0; i < sizes.size(); ++i) {
        std::vector<double> expected;
        for (auto& value : values[i]) {
            const double kept = value, step = 1e-5;
            value = kept + step;
            const double above = weighed_scan(values, up, last, tokens, channels, d_state);
            value = kept - step;
            const double below = weighed_scan(values, up, last, tokens, channels, d_state);
            value = kept;
            expected.push_back((above - below) / (2 * step));
        }
        judge(k, "gradient of the scan", static_cast<int64_t>(i), distance(found[i], expected), 1e-5);
    }
}

void test_convolution(const Kernels& k, int64_t channels, int64_t taps) {
    const int64_t tokens = 5;
    const Floats x = normal(tokens * channels), weight = normal(taps * channels), bias = normal(channels);
    Floats state = normal(channels * taps), u = poisoned(tokens * channels);
    const Floats before = state;
    std::vector<double> expected;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < channels; ++c) {
            double sum = bias[static_cast<size_t>(c)];
            for (int64_t j = 0; j < taps; ++j) {
                const int64_t at = t + j - (taps - 1);
                const double in =
                    at >= 0 ? x[static_cast<size_t>(at * channels + c)] : before[static_cast<size_t>(c * taps + taps + at)];
                sum += in * weight[static_cast<size_t>(j * channels + c)];
            }
            expected.push_back(sum / (1 + std::exp(-sum)));
        }
    const Conv conv{weight.data(), bias.data(), taps, channels};
    k.conv_silu(conv, 0, channels, x.data(), channels, tokens, state.data(), u.data(), channels);
    judge(k, "convolution", channels, distance(u, expected), 1e-5);
}

void test_norm(const Kernels& k, int64_t width) {
    const Floats x = normal(width), weight = normal(width);
    Floats out = poisoned(width);
    double sum = 0;
    for (const float v : x) sum += static_cast<double>(v) * v;
    std::vector<double> expected;
    for (size_t i = 0; i < x.size(); ++i)
        expected.push_back(x[i] / std::sqrt(sum / static_cast<double>(width) + 1e-5) * weight[i]);
    k.rms_norm(x.data(), weight.data(), 1e-5f, width, out.data());
    judge(k, "norm", width, distance(out, expected), 1e-5);
}

void test_rotation(const Kernels& k, int64_t order, int64_t power) {
    const int64_t width = order * power;
    Floats x = normal(width), matrix = normal(order * order), spare = poisoned(width);
    for (auto& v : matrix) v = v < 0 ? -1.0f : 1.0f;
    std::vector<double> expected;
    for (int64_t r = 0; r < width; ++r) {
        double sum = 0;
        for (int64_t c = 0; c < width; ++c) {
            const bool odd = __builtin_popcountll(static_cast<unsigned long long>((r % power) & (c % power))) & 1;
            const double entry = matrix[static_cast<size_t>(r / power * order + c / power)] * (odd ? -1.0 : 1.0);
            sum += entry * x[static_cast<size_t>(c)];
        }
        expected.push_back(sum / std::sqrt(static_cast<double>(width)));
    }
    k.rotate(x.data(), matrix.data(), order, width, spare.data());
    judge(k, "rotation", width, distance(x, expected), 1e-5);
}

// A small random Mamba; the owned matrices must outlive the decoder.
struct Model {
    Config config{128, 2, 300, 256, 16, 4, 8, 1e-5f, true};
    std::vector<Owned> matrices;
    std::vector<Floats> floats;

    // Group 0 means whole rows. Rotated: both rotations, by a matrix that is not symmetric, and clipped.
    Weights weights(Storage storage, int64_t group, bool rotated) {
        const Config& c = config;
        const auto matrix = [&](int64_t rows, int64_t cols) {
            const int exponent = storage == Storage::kInt4 ? 7 : 3;
            matrices.push_back(quantized(rows, cols, storage, group ? group : cols, rotated, exponent));
            return matrices.back().m;
        };
        Weights w;
        matrices.reserve(16);
        w.embedding = w.head = matrix(c.vocab, c.d_model);
        for (int64_t i = 0; i < c.n_layer; ++i) {
            floats.push_back(normal(c.d_inner * c.dt_rank, 0.3f));
            Matrix dt;
            dt.values = floats.back().data();
            dt.rows = c.d_inner;
            dt.cols = c.dt_rank;
            w.layers.push_back({Floats(static_cast<size_t>(c.d_model), 1.0f), matrix(2 * c.d_inner, c.d_model),
                                normal(c.d_inner * c.d_conv, 0.5f), normal(c.d_inner, 0.1f),
                                matrix(c.dt_rank + 2 * c.d_state, c.d_inner), dt, normal(c.d_inner, 0.1f),
                                normal(c.d_inner * c.d_state), normal(c.d_inner), matrix(c.d_model, c.d_inner)});
        }
        if (rotated) w.rotation = w.residual_rotation = {1.0f, 1.0f, -1.0f, 1.0f};
        w.norm_f.assign(static_cast<size_t>(c.d_model), 1.0f);
        return w;
    }
};

Floats run(const Model& model, const Weights& weights, const Kernels& k, int threads, bool int8, int64_t split) {
    const Config& c = model.config;
    Decoder decoder(c, weights, k, threads, int8);
    std::vector<int64_t> tokens(70);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i * 37 % 300);
    const auto n = static_cast<int64_t>(tokens.size());
    Floats x = poisoned(n * c.d_model), logits = poisoned(n * c.vocab);
    Floats conv(static_cast<size_t>(c.n_layer * c.d_inner * c.d_conv)),
        ssm(static_cast<size_t>(c.n_layer * c.d_inner * c.d_state));
    decoder.embed(tokens.data(), n, x.data());
    decoder.forward(x.data(), split, conv.data(), ssm.data(), logits.data(), true);
    for (int64_t t = split; t < n; ++t)
        decoder.forward(x.data() + t * c.d_model, 1, conv.data(), ssm.data(), logits.data() + t * c.vocab, false);
    return logits;
}

// Embeddings are returned in the model's basis: rotated again they equal the rows of the table.
void test_embedding(const Kernels& k) {
    Model model;
    const Weights weights = model.weights(Storage::kInt8, 32, true);
    const int64_t width = model.config.d_model, row = 77;
    Floats x = poisoned(width), spare = poisoned(width);
    Decoder(model.config, weights, k, 1, false).embed(&row, 1, x.data());
    k.rotate(x.data(), weights.residual_rotation.data(), 2, width, spare.data());
    const double* stored = model.matrices[0].dense.data() + row * width;
    judge(k, "rotated embedding", width, distance(x, std::vector<double>(stored, stored + width)), 1e-5);
}

void test_decoder(const Kernels& k, const Kernels& plain, Storage storage, int64_t group, bool rotated = false) {
    Model model;
    const Weights weights = model.weights(storage, group, rotated);
    for (const bool int8 : {false, true}) {
        const Floats one = run(model, weights, k, 1, int8, 70);
        for (const int threads : {2, 3}) {
            const Floats other = run(model, weights, k, threads, int8, 7);
            judge(k, "decoder, threads and splits", threads, one == other ? 0 : 1, 0);
        }
        const Floats expected = run(model, weights, plain, 1, int8, 70);
        const std::vector<double> wide(expected.begin(), expected.end());
        // A value halfway between two integers may be rounded either way, and the recurrence carries it on.
        judge(k, "decoder against plain C++", group, distance(one, wide), int8 ? 3e-2 : 1e-4);
    }
}

void test_refusals(const Kernels& k) {
    Model model;
    const Weights weights = model.weights(Storage::kInt4, 32, false);
    const auto refused = [&](Config config, const char* what) {
        try {
            Decoder(config, weights, k, 1, true);
        } catch (const std::invalid_argument&) {
            return;
        }
        judge(k, what, 0, 1, 0);
    };
    Config c = model.config;
    c.d_model = 256;
    refused(c, "a wider model");
    c = model.config;
    c.vocab = 301;
    refused(c, "a larger vocabulary");
    c = model.config;
    c.d_conv = 9;
    refused(c, "too many taps");
    c = model.config;
    c.n_layer = 3;
    refused(c, "more layers");
    for (Floats Weights::* const matrix : {&Weights::rotation, &Weights::residual_rotation}) {
        Weights rotated = weights;
        (rotated.*matrix).assign(9, 1.0f);
        try {
            Decoder(model.config, rotated, k, 1, true);
            judge(k, "a rotation of another width", 0, 1, 0);
        } catch (const std::invalid_argument&) {
        }
    }
}

// Test cases of cobra-mini.
void test_replay(const Kernels& k, int files, char** names) {
    for (int i = 0; i < files; ++i) {
        const Replayed found = replay(names[i], k);
        std::printf("    %s: distance %.2g\n", names[i], found.distance);
        judge(k, names[i], i, found.distance, found.int8 ? 3e-2 : 1e-5);
    }
}

// No thread passes a barrier before all have reached it; if one is late, the others sleep.
void test_team(int size) {
    constexpr int kPhases = 400;
    Team team(size);
    std::vector<std::atomic<int>> there(kPhases);
    std::atomic<int> too_early{0}, slept{0};
    for (int run = 0; run < 3; ++run) {
        for (auto& count : there) count = 0;
        team.run([&](int rank) {
            rusage before{}, after{};
            getrusage(RUSAGE_THREAD, &before);
            for (int phase = 0; phase < kPhases; ++phase) {
                if (phase % 50 == 49 && rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
                there[static_cast<size_t>(phase)].fetch_add(1);
                team.barrier();
                if (there[static_cast<size_t>(phase)].load() != size) too_early.fetch_add(1);
            }
            getrusage(RUSAGE_THREAD, &after);
            if (rank && after.ru_nvcsw > before.ru_nvcsw) slept.fetch_add(1);  // yielding is not counted as a switch
        });
    }
    if (too_early || slept != 3 * (size - 1)) {
        std::printf("FAILED  team of %d: %d early, %d of %d slept\n", size, too_early.load(), slept.load(), 3 * (size - 1));
        ++failures;
    }
}

}  // namespace

int main(int arguments, char** argument) {
    for (const int size : {1, 2, 3, 8}) test_team(size);
    int count = 0;
    const Kernels* const* tables = available_kernels(&count);
    for (int i = 0; i < count; ++i) {
        const Kernels& k = *tables[i];
        std::printf("%s\n", k.name);
        for (const auto storage : {Storage::kInt3, Storage::kInt4, Storage::kInt8})
            for (const int64_t group : {32, 64, 128, 256})
                for (const bool clipped : {false, true})
                    if (group % block_of(storage) == 0)
                        test_matmuls(k, storage, group, 3 * std::max<int64_t>(group, 128), clipped);
        for (const int64_t cols : {32, 96, 160, 2560}) test_matmuls(k, Storage::kInt8, cols, cols, cols == 160);
        for (const auto storage : {Storage::kInt3, Storage::kInt4, Storage::kInt8})
            for (const bool clipped : {false, true}) test_matmuls_carry_nan(k, storage, 128, clipped);
        test_matmuls_carry_nan(k, Storage::kInt8, 32, true);
        test_exponential(k);
        test_recurrence_carries_nan(k);
        int32_t checksum = 0;
        k.macs_in_registers(1 << 20, &checksum);  // for the sanitizer
        for (const int64_t channels : {1, 16, 37}) {
            for (const int64_t d_state : {1, 16, 17}) test_scan(k, channels, d_state);
            for (const int64_t d_state : {5, 16}) test_scan_gradient(k, channels, d_state);
            for (const int64_t taps : {2, 4, 8}) test_convolution(k, channels, taps);
        }
        for (const int64_t width : {1, 63, 129, 2560}) test_norm(k, width);
        test_decoder(k, *tables[count - 1], Storage::kInt3, 64);
        for (const auto storage : {Storage::kInt4, Storage::kInt8})
            for (const int64_t group : {32, 128}) test_decoder(k, *tables[count - 1], storage, group);
        test_decoder(k, *tables[count - 1], Storage::kInt4, 128, true);
        for (const bool rotated : {false, true}) test_decoder(k, *tables[count - 1], Storage::kInt8, 0, rotated);
        test_embedding(k);
        for (const int64_t order : {1, 3, 20})
            for (const int64_t power : {1, 2, 64}) test_rotation(k, order, power);
        test_refusals(k);
        test_replay(k, arguments - 1, argument + 1);
    }
    std::printf(failures ? "%d failures\n" : "all tests passed\n", failures);
    return failures ? 1 : 0;
}
