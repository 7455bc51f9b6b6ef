// The whole quantized Mamba-1 decoder over borrowed weights.
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

// A tensor that stays float32 and is small, by value: it is copied.
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
    Floats residual_rotation;  // of the residual stream: in its basis embedding, layers and head are, norm_f is not
};

class Decoder {
   public:
    // Raises std::invalid_argument where a shape does not fit the config or a matrix cannot be run, std::bad_alloc.
    // Borrowed memory has to outlive the decoder.
    Decoder(const Config& config, Weights weights, const Kernels& kernels, int threads, bool int8_activations);

    const Config& config() const { return config_; }
    const Kernels& kernels() const { return kernels_; }
    int threads() const { return team_.size(); }

    // Rows of the embedding in the model's own basis, (n, d_model). Raises std::out_of_range for a token beyond the
    // vocabulary.
    void embed(const int64_t* tokens, int64_t n, float* out);

    // Read n embeddings (n, d_model); conv (n_layer, d_inner, d_conv) and ssm (n_layer, d_inner, d_state) move on.
    // logits is (n, vocab) with every_position, else (vocab) after the last one.
    void forward(const float* embeddings, int64_t n, float* conv, float* ssm, float* logits, bool every_position);

   private:
    struct Range {
        int64_t from, to;
    };
    Range share(int64_t total, int64_t grain, int rank) const;
    void check() const;
    void allocate();
    bool turned() const { return residual_order_ > 0; }
    void chunk(int rank, int64_t tokens, float* conv, float* ssm);
    void layer(int rank, const LayerWeights& w, int64_t tokens, float* conv, float* ssm);
    void head(int rank, int64_t first, int64_t tokens, float* logits);
    void prepare(const Matrix& m, const float* x, int64_t stride, Range tokens, Range columns);
    void prepare_channels(const Matrix& m, int rank, int64_t tokens, Range channels);
    void multiply(const Matrix& m, int rank, Range rows, const float* x, int64_t x_stride, int64_t tokens, float* out,
                  int64_t stride, bool add);
    Int8Rows rows_of(const Matrix& m) { return {codes_.data(), code_scales_.data(), code_sums_.data(), m.cols, m.groups()}; }
    bool as_int8(const Matrix& m) const { return int8_ && m.quantized(); }
    // Groups so wide that threads which own whole ones would be few.
    bool rounded_by_token(const Matrix& m) const { return as_int8(m) && m.group > kWidestOwned; }

    const Config config_;
    Weights weights_;
    const Kernels& kernels_;
    const bool int8_;
    Team team_;

    // Channels of one thread come in whole groups of the matrices they go into, so that it can round what it computed.
    int64_t grain_ = kChannels;
    static constexpr int64_t kWidestOwned = 128;
    // Activations of up to kChunk tokens.
    static constexpr int64_t kChunk = 128;
    int64_t rotation_order_ = 0, residual_order_ = 0;
    Floats residual_back_;  // residual_rotation transposed, which undoes it: Sylvester's part is symmetric
    Floats residual_, normed_, xz_, u_, low_, dt_;
    std::vector<Floats> scratch_;  // a thread's unpacked or dequantized rows
    std::vector<int8_t> codes_;
    Floats code_scales_;
    std::vector<int32_t> code_sums_;
};

}  // namespace cobra_edge
