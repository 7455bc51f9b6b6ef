#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace cobra_edge {
namespace {

constexpr int64_t kRows = 16;  // granularity of splitting rows: a multiple of every kernel's tile
constexpr int64_t kWidestGroup = INT32_MAX / ((255 + 128) * 127);

void expect(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

void expect_matrix(const Matrix& m, const char* name, int64_t rows, int64_t cols) {
    const std::string shape = "(" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + ")";
    const std::string wanted = "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
    expect(m.rows == rows && m.cols == cols, std::string(name) + " is " + shape + ", the config asks for " + wanted);
    if (!m.quantized()) return;
    const int64_t block = block_of(m.storage);
    expect(m.group > 0 && m.group % block == 0 && m.cols % m.group == 0,
           std::string(name) + ": groups of " + std::to_string(m.group) + " do not divide " + std::to_string(m.cols) +
               " inputs into multiples of " + std::to_string(block));
    expect(m.scales != nullptr, std::string(name) + " has no scales");
    // Worst case of the partial sum of a group: (255 + 128) · 127 per input.
    expect(m.group <= kWidestGroup, std::string(name) + ": groups of " + std::to_string(m.group) +
                                        " inputs could overflow sums of 32 bits, at most " + std::to_string(kWidestGroup));
}

// The order of a rotation's matrix, 0 for no rotation.
int64_t order_of(const Floats& matrix, int64_t width) {
    if (matrix.empty()) return 0;
    const auto entries = static_cast<int64_t>(matrix.size());
    const auto order = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(entries))));
    const int64_t power = width / order;
    expect(order * order == entries && order * power == width && (power & (power - 1)) == 0,
           "the rotation's matrix has " + std::to_string(entries) + " entries, which make no rotation of " +
               std::to_string(width) + " channels");
    return order;
}

void expect_floats(const Floats& f, const char* name, int64_t size) {
    expect(static_cast<int64_t>(f.size()) == size,
           std::string(name) + " has " + std::to_string(f.size()) + " values, the config asks for " + std::to_string(size));
}

}  // namespace

Decoder::Decoder(const Config& config, Weights weights, const Kernels& kernels, int threads, bool int8_activations)
    : config_(config), weights_(std::move(weights)), kernels_(kernels), int8_(int8_activations), team_(threads) {
    check();
    for (auto& l : weights_.layers) {
        // Layout for the kernels: A itself, and taps as rows so that channels are adjacent.
        for (auto& a : l.A_log) a = -std::exp(a);
        Floats taps(l.conv_weight.size());
        for (int64_t c = 0; c < config_.d_inner; ++c)
            for (int64_t k = 0; k < config_.d_conv; ++k)
                taps[static_cast<size_t>(k * config_.d_inner + c)] =
                    l.conv_weight[static_cast<size_t>(c * config_.d_conv + k)];
        l.conv_weight = std::move(taps);
    }
    allocate();
}

void Decoder::check() const {
    const Config& c = config_;
    expect(c.d_conv >= 2 && c.d_conv <= 8, "d_conv is " + std::to_string(c.d_conv) + ", the kernels take 2 to 8");
    expect(c.d_state >= 1 && c.d_state <= 256, "d_state is " + std::to_string(c.d_state) + ", the kernels take 1 to 256");
    expect(static_cast<int64_t>(weights_.layers.size()) == c.n_layer, "the number of layers is not the config's");
    expect_matrix(weights_.embedding, "embedding", c.vocab, c.d_model);
    expect_matrix(weights_.head, "head", c.vocab, c.d_model);
    expect_floats(weights_.norm_f, "norm_f", c.d_model);
    for (const auto& l : weights_.layers) {
        expect_floats(l.norm, "norm", c.d_model);
        expect_matrix(l.in_proj, "in_proj", 2 * c.d_inner, c.d_model);
        expect_floats(l.conv_weight, "conv1d.weight", c.d_inner * c.d_conv);
        expect_floats(l.conv_bias, "conv1d.bias", c.d_inner);
        expect_matrix(l.x_proj, "x_proj", c.dt_rank + 2 * c.d_state, c.d_inner);
        expect_matrix(l.dt_proj, "dt_proj", c.d_inner, c.dt_rank);
        expect_floats(l.dt_bias, "dt_proj.bias", c.d_inner);
        expect_floats(l.A_log, "A_log", c.d_inner * c.d_state);
        expect_floats(l.D, "D", c.d_inner);
        expect_matrix(l.out_proj, "out_proj", c.d_model, c.d_inner);
    }
}

void Decoder::allocate() {
    const Config& c = config_;
    const auto rows = [](int64_t width) { return static_cast<size_t>(kChunk * width); };
    for (const auto& l : weights_.layers)
        for (const Matrix* m : {&l.x_proj, &l.out_proj})
            if (as_int8(*m) && !rounded_by_token(*m)) grain_ = std::lcm(grain_, m->group);
    rotation_order_ = order_of(weights_.rotation, c.d_inner);
    residual_order_ = order_of(weights_.residual_rotation, c.d_model);
    residual_back_.resize(weights_.residual_rotation.size());
    for (int64_t i = 0; i < residual_order_; ++i)
        for (int64_t j = 0; j < residual_order_; ++j)
            residual_back_[static_cast<size_t>(j * residual_order_ + i)] =
                weights_.residual_rotation[static_cast<size_t>(i * residual_order_ + j)];
    const int64_t widest = std::max({c.d_model, c.d_inner, c.dt_rank});
    residual_.resize(rows(c.d_model));
    normed_.resize(rows(c.d_model));
    xz_.resize(rows(2 * c.d_inner));
    u_.resize(rows(c.d_inner));
    low_.resize(rows(c.dt_rank + 2 * c.d_state));
    dt_.resize(rows(c.d_inner));
    scratch_.assign(static_cast<size_t>(team_.size()), Floats(static_cast<size_t>(scratch_floats(widest))));
    if (!int8_) return;
    codes_.resize(rows(widest));
    code_scales_.resize(rows(widest / kSmallestBlock + 1));
    code_sums_.resize(rows(widest / kSmallestBlock + 1) + kSpareSums);
}

Decoder::Range Decoder::share(int64_t total, int64_t grain, int rank) const {
    const int64_t grains = (total + grain - 1) / grain, size = team_.size();
    return {std::min(total, grains * rank / size * grain), std::min(total, grains * (rank + 1) / size * grain)};
}

void Decoder::embed(const int64_t* tokens, int64_t n, float* out) {
    Floats spare(rotates_residual() ? static_cast<size_t>(config_.d_model)
                                    : 0);  // not the shared scratch: a forward may be running
    for (int64_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= config_.vocab)
            throw std::out_of_range("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                                    std::to_string(config_.vocab));
        float* row = out + i * config_.d_model;
        kernels_.dequantize_row(weights_.embedding, tokens[i], row);
        if (rotates_residual()) kernels_.rotate(row, residual_back_.data(), residual_order_, config_.d_model, spare.data());
    }
}

void Decoder::forward(const float* embeddings, int64_t n, float* conv, float* ssm, float* logits, bool every_position) {
    const int64_t width = config_.d_model;
    team_.run([&](int rank) {
        for (int64_t start = 0; start < n; start += kChunk) {
            const int64_t tokens = std::min(kChunk, n - start);
            const Range mine = share(tokens, 1, rank);  // the tokens this thread normalizes: no barrier needed
            std::copy(embeddings + (start + mine.from) * width, embeddings + (start + mine.to) * width,
                      residual_.data() + mine.from * width);
            for (int64_t t = mine.from; rotates_residual() && t < mine.to; ++t)
                kernels_.rotate(residual_.data() + t * width, weights_.residual_rotation.data(), residual_order_, width,
                                scratch_[static_cast<size_t>(rank)].data());
            chunk(rank, tokens, conv, ssm);
            if (every_position)
                head(rank, 0, tokens, logits + start * config_.vocab);
            else if (start + tokens == n)
                head(rank, tokens - 1, 1, logits);
        }
    });
}

void Decoder::chunk(int rank, int64_t tokens, float* conv, float* ssm) {
    const int64_t conv_size = config_.d_inner * config_.d_conv, ssm_size = config_.d_inner * config_.d_state;
    for (int64_t i = 0; i < config_.n_layer; ++i)
        layer(rank, weights_.layers[static_cast<size_t>(i)], tokens, conv + i * conv_size, ssm + i * ssm_size);
}

// Quantize columns of x (tokens, stride) for a matmul with m, if that matmul takes int8.
void Decoder::quantize_columns(const Matrix& m, const float* x, int64_t stride, Range tokens, Range columns) {
    if (!as_int8(m)) return;
    for (int64_t t = tokens.from; t < tokens.to; ++t)
        kernels_.quantize(x + t * stride, m, t, columns.from / m.group, columns.to / m.group, rows_of(m));
}

// Quantize channels of u for a matmul with m: each thread its own channels, or whole tokens after a barrier.
void Decoder::quantize_channels(const Matrix& m, int rank, int64_t tokens, Range channels) {
    const int64_t inner = config_.d_inner;
    if (!rounded_by_token(m)) return quantize_columns(m, u_.data(), inner, {0, tokens}, channels);
    team_.barrier();
    quantize_columns(m, u_.data(), inner, share(tokens, 1, rank), {0, inner});
}

void Decoder::matmul(const Matrix& m, int rank, Range rows, const float* x, int64_t x_stride, int64_t tokens, float* out,
                     int64_t stride, bool add) {
    float* scratch = scratch_[static_cast<size_t>(rank)].data();
    if (as_int8(m)) return kernels_.matmul_int8(m, rows.from, rows.to, rows_of(m), tokens, out, stride, add, scratch);
    kernels_.matmul_float(m, rows.from, rows.to, x, x_stride, tokens, out, stride, add, scratch);
}

void Decoder::layer(int rank, const LayerWeights& w, int64_t tokens, float* conv, float* ssm) {
    const Config& c = config_;
    const int64_t inner = c.d_inner, low_width = c.dt_rank + 2 * c.d_state;
    const Range own = share(tokens, 1, rank), channels = share(inner, grain_, rank);
    float *normed = normed_.data(), *xz = xz_.data(), *u = u_.data(), *low = low_.data(), *dt = dt_.data();

    for (int64_t t = own.from; t < own.to; ++t)
        kernels_.rms_norm(residual_.data() + t * c.d_model, w.norm.data(), c.norm_eps, c.d_model, normed + t * c.d_model);
    quantize_columns(w.in_proj, normed, c.d_model, own, {0, c.d_model});
    team_.barrier();
    matmul(w.in_proj, rank, share(2 * inner, kRows, rank), normed, c.d_model, tokens, xz, 2 * inner, false);
    team_.barrier();

    const Conv taps{w.conv_weight.data(), w.conv_bias.data(), c.d_conv, inner};
    kernels_.conv_silu(taps, channels.from, channels.to, xz, 2 * inner, tokens, conv, u, inner);
    quantize_channels(w.x_proj, rank, tokens, channels);
    team_.barrier();
    matmul(w.x_proj, rank, share(low_width, kRows, rank), u, inner, tokens, low, low_width, false);
    team_.barrier();

    // dt_proj is the only matrix whose rows are channels: each thread computes those it scans next.
    if (as_int8(w.dt_proj)) {
        quantize_columns(w.dt_proj, low, low_width, own, {0, c.dt_rank});
        team_.barrier();
    }
    matmul(w.dt_proj, rank, channels, low, low_width, tokens, dt, inner, false);
    if (as_int8(w.dt_proj)) team_.barrier();
    const Scan scan{w.A_log.data(), w.D.data(), w.dt_bias.data(), inner, c.d_state};
    const float *B = low + c.dt_rank, *C = B + c.d_state;
    kernels_.selective_scan(scan, channels.from, channels.to, tokens, dt, inner, B, C, low_width, xz + inner, 2 * inner, ssm,
                            u, u, inner);
    if (weights_.rotation.empty()) {
        quantize_channels(w.out_proj, rank, tokens, channels);
    } else {
        team_.barrier();  // a rotation mixes the channels of all threads
        for (int64_t t = own.from; t < own.to; ++t)
            kernels_.rotate(u + t * inner, weights_.rotation.data(), rotation_order_, inner,
                            scratch_[static_cast<size_t>(rank)].data());
        quantize_columns(w.out_proj, u, inner, own, {0, inner});
    }
    team_.barrier();
    matmul(w.out_proj, rank, share(c.d_model, kRows, rank), u, inner, tokens, residual_.data(), c.d_model, true);
    team_.barrier();
}

void Decoder::head(int rank, int64_t first, int64_t tokens, float* logits) {
    const int64_t width = config_.d_model;
    const Range own = share(tokens, 1, rank);
    float *normed = normed_.data(), *residual = residual_.data() + first * width;
    float* spare = scratch_[static_cast<size_t>(rank)].data();
    for (int64_t t = own.from; t < own.to; ++t) {
        float *from = residual + t * width, *to = normed + t * width;
        if (rotates_residual()) kernels_.rotate(from, residual_back_.data(), residual_order_, width, spare);
        kernels_.rms_norm(from, weights_.norm_f.data(), config_.norm_eps, width, to);
        if (rotates_residual()) kernels_.rotate(to, weights_.residual_rotation.data(), residual_order_, width, spare);
    }
    quantize_columns(weights_.head, normed, width, own, {0, width});
    team_.barrier();
    const Range rows = share(config_.vocab, kRows, rank);
    matmul(weights_.head, rank, rows, normed, width, tokens, logits, config_.vocab, false);
    team_.barrier();
}

}  // namespace cobra_edge
