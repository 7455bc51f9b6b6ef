// The Python module cobra_edge.decode._cpu: checks arguments, releases the GIL, runs the decoder.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>

#include "arguments.h"
#include "decoder.h"

namespace cobra_edge {
namespace {

using Tokens = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Floats floats_of(const nb::dict& tensors, const std::string& name) {
    const Array array = array_of(tensors, name);
    const auto dtype = array.dtype();
    if (dtype != nb::dtype<float>()) throw std::invalid_argument("tensor " + name + " is not float32");
    const auto* values = static_cast<const float*>(array.data());
    return Floats(values, values + array.size());
}

// The matrix `name` with `cols` inputs: either one float array, or name.codes and name.scales, optionally with name.clips.
Matrix matrix_of(const nb::dict& tensors, const std::string& name, int64_t cols) {
    if (tensors.contains(name.c_str())) return matrix_from(name, array_of(tensors, name), nullptr, nullptr, cols);
    const Array codes = array_of(tensors, name + ".codes"), scales = array_of(tensors, name + ".scales");
    if (!tensors.contains((name + ".clips").c_str())) return matrix_from(name, codes, &scales, nullptr, cols);
    const Array clips = array_of(tensors, name + ".clips");
    return matrix_from(name, codes, &scales, &clips, cols);
}

Weights weights_of(const Config& c, const nb::dict& tensors) {
    Weights w;
    w.embedding = matrix_of(tensors, "backbone.embedding.weight", c.d_model);
    for (int64_t i = 0; i < c.n_layer; ++i) {
        const std::string layer = "backbone.layers." + std::to_string(i) + ".", mixer = layer + "mixer.";
        w.layers.push_back({
            floats_of(tensors, layer + "norm.weight"),
            matrix_of(tensors, mixer + "in_proj.weight", c.d_model),
            floats_of(tensors, mixer + "conv1d.weight"),
            floats_of(tensors, mixer + "conv1d.bias"),
            matrix_of(tensors, mixer + "x_proj.weight", c.d_inner),
            matrix_of(tensors, mixer + "dt_proj.weight", c.dt_rank),
            floats_of(tensors, mixer + "dt_proj.bias"),
            floats_of(tensors, mixer + "A_log"),
            floats_of(tensors, mixer + "D"),
            matrix_of(tensors, mixer + "out_proj.weight", c.d_inner),
        });
    }
    w.norm_f = floats_of(tensors, "backbone.norm_f.weight");
    if (tensors.contains("rotation")) w.rotation = floats_of(tensors, "rotation");
    if (tensors.contains("residual_rotation")) w.residual_rotation = floats_of(tensors, "residual_rotation");
    w.head = c.tied ? w.embedding : matrix_of(tensors, "lm_head.weight", c.d_model);
    return w;
}

// A decoder, the references that keep its weights alive, and a lock for use from several Python threads.
class Module {
   public:
    Module(Config config, nb::dict tensors, const std::string& kernels, int threads, bool int8_activations)
        : tensors_(nb::steal<nb::dict>(PyDict_Copy(tensors.ptr()))),
          decoder_(config, weights_of(config, tensors_), kernels_named(kernels), checked(threads), int8_activations) {}

    std::string kernels() const { return decoder_.kernels().name; }
    int threads() const { return decoder_.threads(); }

    Out embed(const Tokens& tokens) {
        const size_t n = tokens.shape(0), width = static_cast<size_t>(decoder_.config().d_model);
        auto out = fresh({n, width});
        decoder_.embed(tokens.data(), static_cast<int64_t>(n), out.data());
        return out;
    }

    Out forward(const In<2>& embeddings, const InOut<3>& conv, const InOut<3>& ssm, bool every_position) {
        const Config& c = decoder_.config();
        const size_t n = embeddings.shape(0), vocab = static_cast<size_t>(c.vocab);
        if (n == 0 || static_cast<int64_t>(embeddings.shape(1)) != c.d_model)
            throw std::invalid_argument("embeddings must be (seq, d_model) with at least one position");
        require(conv, c.n_layer, c.d_inner, c.d_conv, "conv");
        require(ssm, c.n_layer, c.d_inner, c.d_state, "ssm");
        auto out = every_position ? fresh({n, vocab}) : fresh({vocab});
        const nb::gil_scoped_release unlocked;
        const std::lock_guard<std::mutex> alone(mutex_);
        decoder_.forward(embeddings.data(), static_cast<int64_t>(n), conv.data(), ssm.data(), out.data(), every_position);
        return out;
    }

   private:
    static int checked(int threads) {
        if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
        return threads;
    }

    static void require(const InOut<3>& state, int64_t a, int64_t b, int64_t c, const char* name) {
        const bool fits = static_cast<int64_t>(state.shape(0)) == a && static_cast<int64_t>(state.shape(1)) == b &&
                          static_cast<int64_t>(state.shape(2)) == c;
        if (!fits) throw std::invalid_argument(std::string("the state's ") + name + " is not of this model's shape");
    }

    nb::dict tensors_;
    Decoder decoder_;
    std::mutex mutex_;
};

}  // namespace
}  // namespace cobra_edge

NB_MODULE(_cpu, m) {
    using namespace cobra_edge;
    m.doc() = "The native CPU decoder; cobra_edge.decode.cpu is its Python interface.";
    m.def("kernel_names", &kernel_names, "Kernels this processor supports, best first.");
    auto kernels = m.def_submodule("kernels");
    bind_kernels(kernels);
    nb::class_<Module>(m, "Decoder", "A quantized Mamba over borrowed arrays.")
        .def(
            "__init__",
            [](Module* self, const nb::dict& sizes, const nb::dict& tensors, const std::string& kernels, int threads,
               bool int8_activations) {
                const auto size = [&](const char* name) { return nb::cast<int64_t>(sizes[name]); };
                const Config config{size("d_model"),
                                    size("n_layer"),
                                    size("vocab"),
                                    size("d_inner"),
                                    size("d_state"),
                                    size("d_conv"),
                                    size("dt_rank"),
                                    nb::cast<float>(sizes["norm_eps"]),
                                    nb::cast<bool>(sizes["tied"])};
                new (self) Module(config, tensors, kernels, threads, int8_activations);
            },
            nb::arg("sizes"), nb::arg("tensors"), nb::arg("kernels"), nb::arg("threads"), nb::arg("int8_activations"))
        .def_prop_ro("kernels", &Module::kernels)
        .def_prop_ro("threads", &Module::threads)
        .def("embed", &Module::embed, nb::arg("tokens"))
        .def("forward", &Module::forward, nb::arg("embeddings"), nb::arg("conv").noconvert(), nb::arg("ssm").noconvert(),
             nb::arg("every_position"));
}
