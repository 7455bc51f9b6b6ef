#include "replay.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>

namespace cobra_edge {
namespace {

// Reads a file of tests/decode/native_case.py in its order; owns the memory that matrices point to.
class Reader {
   public:
    explicit Reader(const char* file) : stream_(file, std::ios::binary) {}

    int64_t number() {
        int64_t value = 0;
        read(&value, sizeof value);
        return value;
    }

    Floats floats() {
        Floats values(static_cast<size_t>(number()));
        read(values.data(), values.size() * sizeof(float));
        return values;
    }

    std::vector<int64_t> numbers() {
        std::vector<int64_t> values(static_cast<size_t>(number()));
        read(values.data(), values.size() * sizeof(int64_t));
        return values;
    }

    Matrix matrix() {
        Matrix m;
        m.storage = static_cast<Storage>(number());
        m.rows = number();
        m.cols = number();
        m.group = number();
        m.values = bytes(static_cast<size_t>(m.rows * m.row_bytes()));
        if (!m.quantized()) return m;
        m.scales = reinterpret_cast<const uint16_t*>(bytes(static_cast<size_t>(m.rows * m.groups() * 2)));
        const auto clips = static_cast<size_t>(number());
        if (clips) m.clips = reinterpret_cast<const float*>(bytes(clips * sizeof(float)));
        return m;
    }

   private:
    void read(void* to, size_t size) {
        if (!stream_.read(static_cast<char*>(to), static_cast<std::streamsize>(size)))
            throw std::runtime_error("the case is missing or cut short");
    }

    const char* bytes(size_t size) {
        kept_.push_back(std::make_unique<char[]>(size));
        read(kept_.back().get(), size);
        return kept_.back().get();
    }

    std::ifstream stream_;
    std::vector<std::unique_ptr<char[]>> kept_;
};

}  // namespace

Replayed replay(const char* file, const Kernels& kernels) {
    Reader in(file);
    Config c{};
    for (int64_t* size : {&c.d_model, &c.n_layer, &c.vocab, &c.d_inner, &c.d_state, &c.d_conv, &c.dt_rank})
        *size = in.number();
    c.tied = in.number() != 0;
    const bool int8 = in.number() != 0;
    c.norm_eps = in.floats().at(0);
    Weights w;
    w.embedding = in.matrix();
    for (int64_t i = 0; i < c.n_layer; ++i) {
        LayerWeights l;
        l.norm = in.floats();
        l.in_proj = in.matrix();
        l.conv_weight = in.floats();
        l.conv_bias = in.floats();
        l.x_proj = in.matrix();
        l.dt_proj = in.matrix();
        l.dt_bias = in.floats();
        l.A_log = in.floats();
        l.D = in.floats();
        l.out_proj = in.matrix();
        w.layers.push_back(std::move(l));
    }
    w.norm_f = in.floats();
    w.head = c.tied ? w.embedding : in.matrix();
    w.rotation = in.floats();
    w.residual_rotation = in.floats();
    Floats x = in.floats();
    const std::vector<int64_t> tokens = in.numbers();
    const Floats expected = in.floats();
    const auto seen = static_cast<int64_t>(x.size()) / c.d_model, n = seen + static_cast<int64_t>(tokens.size());
    Decoder decoder(c, std::move(w), kernels, 2, int8);
    x.resize(static_cast<size_t>(n * c.d_model));
    decoder.embed(tokens.data(), n - seen, x.data() + seen * c.d_model);
    Floats logits(static_cast<size_t>(n * c.vocab), std::numeric_limits<float>::quiet_NaN());
    Floats conv(static_cast<size_t>(c.n_layer * c.d_inner * c.d_conv)),
        ssm(static_cast<size_t>(c.n_layer * c.d_inner * c.d_state));
    decoder.forward(x.data(), seen, conv.data(), ssm.data(), logits.data(), true);
    for (int64_t t = seen; t < n; ++t)  // the question token by token
        decoder.forward(x.data() + t * c.d_model, 1, conv.data(), ssm.data(), logits.data() + t * c.vocab, false);
    if (expected.size() != logits.size()) throw std::runtime_error("the case has logits of another number of positions");
    double difference = 0, size = 1e-30;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(logits[i])) return {std::numeric_limits<double>::infinity(), int8};
        difference += (logits[i] - expected[i]) * static_cast<double>(logits[i] - expected[i]);
        size += static_cast<double>(expected[i]) * expected[i];
    }
    return {std::sqrt(difference / size), int8};
}

}  // namespace cobra_edge
