// The decoder behind the C interface: checks arguments, holds the lock, runs it.
#include <memory>
#include <mutex>
#include <unordered_map>

#include "arguments.h"
#include "decoder.h"

using namespace cobra_edge;

namespace {

using Arrays = std::unordered_map<std::string, const CobraArray*>;

const CobraArray& array_of(const Arrays& arrays, const std::string& name) {
    const auto found = arrays.find(name);
    if (found == arrays.end()) throw std::invalid_argument("tensor " + name + " is missing");
    return *found->second;
}

Floats floats_of(const Arrays& arrays, const std::string& name) {
    const CobraArray& array = array_of(arrays, name);
    const float* values = floats_in(name, array);
    return Floats(values, values + size_of(name, array));
}

// The matrix `name` with `cols` inputs: either one float array, or name.codes and name.scales, optionally with name.clips.
Matrix matrix_of(const Arrays& arrays, const std::string& name, int64_t cols) {
    if (arrays.count(name)) return matrix_from(name, array_of(arrays, name), nullptr, nullptr, cols);
    const CobraArray &codes = array_of(arrays, name + ".codes"), &scales = array_of(arrays, name + ".scales");
    const auto clips = arrays.find(name + ".clips");
    return matrix_from(name, codes, &scales, clips == arrays.end() ? nullptr : clips->second, cols);
}

Weights weights_of(const Config& c, const Arrays& arrays) {
    Weights w;
    w.embedding = matrix_of(arrays, "backbone.embedding.weight", c.d_model);
    for (int64_t i = 0; i < c.n_layer; ++i) {
        const std::string layer = "backbone.layers." + std::to_string(i) + ".", mixer = layer + "mixer.";
        w.layers.push_back({
            floats_of(arrays, layer + "norm.weight"),
            matrix_of(arrays, mixer + "in_proj.weight", c.d_model),
            floats_of(arrays, mixer + "conv1d.weight"),
            floats_of(arrays, mixer + "conv1d.bias"),
            matrix_of(arrays, mixer + "x_proj.weight", c.d_inner),
            matrix_of(arrays, mixer + "dt_proj.weight", c.dt_rank),
            floats_of(arrays, mixer + "dt_proj.bias"),
            floats_of(arrays, mixer + "A_log"),
            floats_of(arrays, mixer + "D"),
            matrix_of(arrays, mixer + "out_proj.weight", c.d_inner),
        });
    }
    w.norm_f = floats_of(arrays, "backbone.norm_f.weight");
    if (arrays.count("rotation")) w.rotation = floats_of(arrays, "rotation");
    if (arrays.count("residual_rotation")) w.residual_rotation = floats_of(arrays, "residual_rotation");
    w.head = c.tied ? w.embedding : matrix_of(arrays, "lm_head.weight", c.d_model);
    return w;
}

int checked(int32_t threads) {
    expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    return threads;
}

void expect_size(int64_t size, int64_t a, int64_t b, int64_t c, const char* name) {
    if (size != a * b * c) throw std::invalid_argument(std::string("the state's ") + name + " is not of this model's shape");
}

}  // namespace

// A decoder, and a lock for use from several threads.
struct CobraDecoder {
    CobraDecoder(const Config& config, const Arrays& arrays, const char* kernels, int threads, bool int8_activations)
        : decoder(config, weights_of(config, arrays), kernels_named(kernels), threads, int8_activations) {}

    void forward(const float* embeddings, int64_t n, float* conv, int64_t conv_size, float* ssm, int64_t ssm_size,
                 float* logits, bool every_position) {
        const Config& c = decoder.config();
        expect_size(conv_size, c.n_layer, c.d_inner, c.d_conv, "conv");
        expect_size(ssm_size, c.n_layer, c.d_inner, c.d_state, "ssm");
        const std::lock_guard<std::mutex> alone(mutex);
        decoder.forward(embeddings, n, conv, ssm, logits, every_position);
    }

    Decoder decoder;
    std::mutex mutex;
};

int32_t cobra_interface() { return kCobraInterface; }

const char* cobra_kernels(int32_t i) {
    int count = 0;
    const Kernels* const* found = available_kernels(&count);
    return i >= 0 && i < count ? found[i]->name : nullptr;
}

int cobra_open(const CobraConfig* config, const char* const* names, const CobraArray* arrays, int64_t count,
               const char* kernels, int32_t threads, int32_t int8_activations, CobraDecoder** out) {
    return guarded([&] {
        Arrays by_name;
        for (int64_t i = 0; i < count; ++i) by_name[names[i]] = &arrays[i];
        const Config sizes{config->d_model, config->n_layer, config->vocab,    config->d_inner,  config->d_state,
                           config->d_conv,  config->dt_rank, config->norm_eps, config->tied != 0};
        *out = std::make_unique<CobraDecoder>(sizes, by_name, kernels, checked(threads), int8_activations != 0).release();
    });
}

void cobra_close(CobraDecoder* decoder) { delete decoder; }

const char* cobra_kernels_of(const CobraDecoder* decoder) { return decoder->decoder.kernels().name; }

int cobra_embed(CobraDecoder* decoder, const int64_t* tokens, int64_t n, float* out) {
    return guarded([&] { decoder->decoder.embed(tokens, n, out); });
}

int cobra_step(CobraDecoder* decoder, int64_t token, float* conv, int64_t conv_size, float* ssm, int64_t ssm_size,
               float* logits) {
    return guarded([&] {
        Floats row(static_cast<size_t>(decoder->decoder.config().d_model));
        decoder->decoder.embed(&token, 1, row.data());
        decoder->forward(row.data(), 1, conv, conv_size, ssm, ssm_size, logits, false);
    });
}

int cobra_forward(CobraDecoder* decoder, const float* embeddings, int64_t n, float* conv, int64_t conv_size, float* ssm,
                  int64_t ssm_size, float* logits, int32_t every_position) {
    return guarded([&] {
        expect(n >= 1, "embeddings must be (seq, d_model) with at least one position");
        decoder->forward(embeddings, n, conv, conv_size, ssm, ssm_size, logits, every_position != 0);
    });
}
