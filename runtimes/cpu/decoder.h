// The quantized Mamba-1 decoder over borrowed weights.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace cobra_edge {

struct Config {
    int64_t d_model, n_layer, vocab, d_inner, d_state, d_conv, dt_rank;
    float norm_eps;
    bool tied;
};

// A small float32 tensor, copied.
using Floats = std::vector<float>;

struct LayerWeights {
    Floats norm;         // (d_model)
    Matrix in_proj;      // (2 d_inner, d_model)
    Floats conv_weight;  // (d_inner, d_conv)
    Floats conv_bias;    // (d_inner)
    Matrix x_proj;       // (dt_rank + 2 d_state, d_inner)
    Matrix dt_proj;      // (d_inner, dt_rank)
    Floats dt_bias;      // (d_inner)
    Floats A_log;        // (d_inner, d_state)
    Floats D;            // (d_inner)
    Matrix out_proj;     // (d_model, d_inner)
};

struct Weights {
    Matrix embedding;  // (vocab, d_model)
    std::vector<LayerWeights> layers;
    Floats norm_f;  // (d_model)
    Matrix head;    // (vocab, d_model); the embedding where tied
    // (order, order) entries ±1, see Kernels::rotate; empty for no rotation.
    Floats rotation;           // of out_proj's input
    Floats residual_rotation;  // of the residual stream: embedding, layers and head are in its basis, norm_f is not
};

class Decoder {
   public:
    // Raises std::invalid_argument if a shape does not match the config or a matrix is not supported, std::bad_alloc.
    // Borrowed memory must outlive the decoder.
    Decoder(const Config& config, Weights weights, const Kernels& kernels, int threads, bool int8_activations);

    const Config& config() const { return config_; }
    const Kernels& kernels() const { return kernels_; }
    int threads() const { return team_.size(); }

    // Rows of the embedding in the model's basis, (n, d_model). Raises std::out_of_range for a token outside the
    // vocabulary.
    void embed(const int64_t* tokens, int64_t n, float* out);

    // Read n embeddings (n, d_model); conv (n_layer, d_inner, d_conv) and ssm (n_layer, d_inner, d_state) are updated.
    // logits is (n, vocab) with every_position, else (vocab) of the last position.
    void forward(const float* embeddings, int64_t n, float* conv, float* ssm, float* logits, bool every_position);

   private:
    struct Range {
        int64_t from, to;
    };
    Range share(int64_t total, int64_t grain, int rank) const;
    void check() const;
    void allocate();
    bool rotates_residual() const { return residual_order_ > 0; }
    void chunk(int rank, int64_t tokens, float* conv, float* ssm);
    void layer(int rank, const LayerWeights& w, int64_t tokens, float* conv, float* ssm);
    void head(int rank, int64_t first, int64_t tokens, float* logits);
    void quantize_columns(const Matrix& m, const float* x, int64_t stride, Range tokens, Range columns);
    void quantize_channels(const Matrix& m, int rank, int64_t tokens, Range channels);
    void matmul(const Matrix& m, int rank, Range rows, const float* x, int64_t x_stride, int64_t tokens, float* out,
                int64_t stride, bool add);
    Int8Rows rows_of(const Matrix& m) { return {codes_.data(), code_scales_.data(), code_sums_.data(), m.cols, m.groups()}; }
    bool as_int8(const Matrix& m) const { return int8_ && m.quantized(); }
    // Groups too wide to give each thread whole ones.
    bool rounded_by_token(const Matrix& m) const { return as_int8(m) && m.group > kWidestOwned; }

    const Config config_;
    Weights weights_;
    const Kernels& kernels_;
    const bool int8_;
    Team team_;

    // A thread's channels form whole groups of the matrices that read them, so that it can quantize its own output.
    int64_t grain_ = kChannels;
    static constexpr int64_t kWidestOwned = 128;
    // Tokens per chunk; activation buffers have this many rows.
    static constexpr int64_t kChunk = 128;
    int64_t rotation_order_ = 0, residual_order_ = 0;
    Floats residual_back_;  // residual_rotation transposed, its inverse: Sylvester's factor is symmetric
    Floats residual_, normed_, xz_, u_, low_, dt_;
    std::vector<Floats> scratch_;  // per thread: unpacked or dequantized rows
    std::vector<int8_t> codes_;
    Floats code_scales_;
    std::vector<int32_t> code_sums_;
};

}  // namespace cobra_edge
