// Individual kernels as Python functions, so that each can be compared with its numpy reference.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "arguments.h"
#include "team.h"

namespace cobra_edge {
namespace {

void expect(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// A new array filled with NaN: reveals values that a kernel does not write.
Out poisoned(std::initializer_list<size_t> shape) {
    auto out = fresh(shape);
    std::fill(out.data(), out.data() + out.size(), std::numeric_limits<float>::quiet_NaN());
    return out;
}

int64_t len(size_t n) { return static_cast<int64_t>(n); }

Out exponential(const In<1>& x, const std::string& kernels) {
    auto out = poisoned({x.shape(0)});
    kernels_named(kernels).exponential(x.data(), len(x.shape(0)), out.data());
    return out;
}

Out rms_norm(const In<1>& x, const In<1>& weight, float eps, const std::string& kernels) {
    expect(x.shape(0) == weight.shape(0), "x and weight differ in length");
    auto out = poisoned({x.shape(0)});
    kernels_named(kernels).rms_norm(x.data(), weight.data(), eps, len(x.shape(0)), out.data());
    return out;
}

// x (tokens, cols) times the transposed matrix, (tokens, rows); added to `onto` if given.
Out multiply(const Array& values, const std::optional<Array>& scales, const In<2>& x, bool int8,
             const std::optional<In<2>>& onto, const std::string& kernels, const std::optional<Array>& clips) {
    const int64_t tokens = len(x.shape(0)), cols = len(x.shape(1));
    const Matrix m = matrix_from("values", values, scales ? &*scales : nullptr, clips ? &*clips : nullptr, cols);
    expect(m.cols == cols, "x is not as wide as the matrix");
    expect(!int8 || m.quantized(), "int8 activations need a quantized matrix");
    auto out = poisoned({x.shape(0), static_cast<size_t>(m.rows)});
    if (onto) {
        expect(onto->shape(0) == x.shape(0) && len(onto->shape(1)) == m.rows, "onto has another shape than the result");
        for (size_t i = 0; i < onto->size(); ++i) out.data()[i] = onto->data()[i];
    }
    const Kernels& k = kernels_named(kernels);
    std::vector<float> scratch(static_cast<size_t>(scratch_floats(cols)));
    if (!int8) {
        k.matmul_float(m, 0, m.rows, x.data(), cols, tokens, out.data(), m.rows, onto.has_value(), scratch.data());
        return out;
    }
    std::vector<int8_t> codes(x.size());
    std::vector<float> code_scales(static_cast<size_t>(tokens * m.groups()));
    std::vector<int32_t> code_sums(static_cast<size_t>(tokens * m.groups() + kSpareSums));
    const Int8Rows rows{codes.data(), code_scales.data(), code_sums.data(), cols, m.groups()};
    for (int64_t t = 0; t < tokens; ++t) k.quantize(x.data() + t * cols, m, t, 0, m.groups(), rows);
    k.matmul_int8(m, 0, m.rows, rows, tokens, out.data(), m.rows, onto.has_value(), scratch.data());
    return out;
}

Out dequantize(const Array& values, const std::optional<Array>& scales, int64_t cols, const std::string& kernels) {
    const Matrix m = matrix_from("values", values, scales ? &*scales : nullptr, nullptr, cols);
    auto out = poisoned({static_cast<size_t>(m.rows), static_cast<size_t>(m.cols)});
    for (int64_t r = 0; r < m.rows; ++r) kernels_named(kernels).dequantize_row(m, r, out.data() + r * m.cols);
    return out;
}

// x (tokens, channels), state (channels, taps) updated in place, weight (taps, channels), bias (channels).
Out conv_silu(const In<2>& x, const InOut<2>& state, const In<2>& weight, const In<1>& bias, const std::string& kernels) {
    const int64_t taps = len(weight.shape(0)), channels = len(x.shape(1));
    expect(taps >= 2 && taps <= 8 && len(weight.shape(1)) == channels && len(bias.shape(0)) == channels &&
               len(state.shape(0)) == channels && len(state.shape(1)) == taps,
           "shapes do not fit each other");
    auto u = poisoned({x.shape(0), x.shape(1)});
    const Conv conv{weight.data(), bias.data(), taps, channels};
    const Kernels& k = kernels_named(kernels);
    const nb::gil_scoped_release unlocked;
    k.conv_silu(conv, 0, channels, x.data(), channels, len(x.shape(0)), state.data(), u.data(), channels);
    return u;
}

// u, dt, z (tokens, channels); A (channels, d_state); B, C (tokens, d_state); D, dt_bias (channels); h updated in place.
Out selective_scan(const In<2>& u, const In<2>& dt, const In<2>& A, const In<2>& B, const In<2>& C, const In<1>& D,
                   const In<2>& z, const In<1>& dt_bias, const InOut<2>& h, const std::string& kernels) {
    const int64_t tokens = len(u.shape(0)), channels = len(u.shape(1)), d_state = len(A.shape(1));
    for (const auto& x : {dt, z})
        expect(x.shape(0) == u.shape(0) && x.shape(1) == u.shape(1), "dt and z differ in shape from u");
    for (const auto& x : {B, C}) expect(x.shape(0) == u.shape(0) && len(x.shape(1)) == d_state, "B and C do not fit u and A");
    for (const auto& x : {D, dt_bias}) expect(len(x.shape(0)) == channels, "D and dt_bias do not fit u");
    expect(len(A.shape(0)) == channels && len(h.shape(0)) == channels && len(h.shape(1)) == d_state, "A and h do not fit u");
    expect(d_state >= 1 && d_state <= 256, "d_state must be 1 to 256");
    auto out = poisoned({u.shape(0), u.shape(1)});
    const Scan scan{A.data(), D.data(), dt_bias.data(), channels, d_state};
    const Kernels& k = kernels_named(kernels);
    const nb::gil_scoped_release unlocked;
    k.selective_scan(scan, 0, channels, tokens, dt.data(), channels, B.data(), C.data(), d_state, z.data(), channels, h.data(),
                     u.data(), out.data(), channels);
    return out;
}

// Gradients of selective_scan with respect to u, dt, B, C, z, h, A, D and dt_bias, in this order.
nb::tuple scan_gradient(const In<2>& u, const In<2>& dt, const In<2>& A, const In<2>& B, const In<2>& C, const In<1>& D,
                        const In<2>& z, const In<1>& dt_bias, const In<2>& h, const In<2>& gradient,
                        const In<2>& last_gradient, const std::string& kernels) {
    const size_t tokens = u.shape(0), channels = u.shape(1), d_state = A.shape(1);
    for (const auto& x : {dt, z, gradient})
        expect(x.shape(0) == tokens && x.shape(1) == channels, "dt, z and gradient differ in shape from u");
    for (const auto& x : {B, C}) expect(x.shape(0) == tokens && x.shape(1) == d_state, "B and C do not fit u and A");
    for (const auto& x : {D, dt_bias}) expect(x.shape(0) == channels, "D and dt_bias do not fit u");
    for (const auto& x : {A, h, last_gradient})
        expect(x.shape(0) == channels && x.shape(1) == d_state, "A, h and last_gradient do not fit u");
    expect(d_state >= 1 && d_state <= 256, "d_state must be 1 to 256");
    auto gu = poisoned({tokens, channels}), gdt = poisoned({tokens, channels}), gz = poisoned({tokens, channels});
    auto gB = fresh({tokens, d_state}), gC = fresh({tokens, d_state}), gh = poisoned({channels, d_state});
    auto gA = fresh({channels, d_state}), gD = fresh({channels}), gbias = fresh({channels});
    for (auto* sum : {&gB, &gC, &gA, &gD, &gbias}) std::fill(sum->data(), sum->data() + sum->size(), 0.0f);
    const Scan scan{A.data(), D.data(), dt_bias.data(), len(channels), len(d_state)};
    const ScanInputs inputs{u.data(), dt.data(), B.data(), C.data(), z.data(), h.data()};
    const ScanGradient out{gu.data(), gdt.data(), gB.data(), gC.data(),   gz.data(),
                           gh.data(), gA.data(),  gD.data(), gbias.data()};
    {
        const Kernels& k = kernels_named(kernels);
        const nb::gil_scoped_release unlocked;
        std::vector<float> scratch(static_cast<size_t>(scan_gradient_floats(len(tokens), len(d_state))));
        k.scan_gradient(scan, len(tokens), inputs, gradient.data(), last_gradient.data(), out, scratch.data());
    }
    return nb::make_tuple(gu, gdt, gB, gC, gz, gh, gA, gD, gbias);
}

// Read every byte once, one sequential stream per thread, and return the sum as a checksum: measures the memory bandwidth,
// the limit of a decoder's step.
uint64_t read_once(const nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& words, int threads) {
    expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    const uint64_t* data = words.data();
    const size_t n = words.size();
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);  // 64 bytes apart
    const nb::gil_scoped_release unlocked;
    Team team(threads);
    team.run([&](int rank) {
        const auto r = static_cast<size_t>(rank), of = static_cast<size_t>(threads);
        constexpr size_t kLine = 8, kAhead = 128;  // in words; prefetched as in the decoder, which is fastest
        const size_t end = n * (r + 1) / of;
        size_t i = n * r / of;
        uint64_t lanes[kLine] = {};
        for (; i + kLine <= end; i += kLine) {
            __builtin_prefetch(data + i + kAhead, 0, 3);
            for (size_t k = 0; k < kLine; ++k) lanes[k] += data[i + k];
        }
        for (; i < end; ++i) lanes[0] += data[i];
        for (const uint64_t lane : lanes) sums[r * 8] += lane;
    });
    uint64_t total = 0;
    for (const uint64_t s : sums) total += s;
    return total;
}

// x (tokens, width) rotated, matrix (order, order).
Out rotate(const In<2>& x, const In<2>& matrix, const std::string& kernels) {
    const int64_t width = len(x.shape(1)), order = len(matrix.shape(0));
    const int64_t power = order ? width / order : 0;
    expect(order == len(matrix.shape(1)) && power * order == width && power > 0 && (power & (power - 1)) == 0,
           "the matrix does not fit the width");
    auto out = fresh({x.shape(0), x.shape(1)});
    std::copy(x.data(), x.data() + x.size(), out.data());
    std::vector<float> spare(x.shape(1));
    for (size_t t = 0; t < x.shape(0); ++t)
        kernels_named(kernels).rotate(out.data() + t * x.shape(1), matrix.data(), order, width, spare.data());
    return out;
}

// Multiply-accumulates per second of these kernels on registers only, with that many threads in total.
double peak_macs(const std::string& name, int threads) {
    expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    const Kernels& k = kernels_named(name);
    constexpr int64_t kRounds = 1 << 20;
    std::vector<int32_t> checksums(static_cast<size_t>(threads) * 16);  // 64 bytes apart
    std::vector<int64_t> done(static_cast<size_t>(threads) * 8);
    const nb::gil_scoped_release unlocked;
    Team team(threads);
    const auto began = std::chrono::steady_clock::now();
    team.run([&](int rank) {
        const auto r = static_cast<size_t>(rank);
        done[r * 8] = k.macs_in_registers(kRounds, &checksums[r * 16]);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    return static_cast<double>(done[0] * threads) / seconds.count();
}

}  // namespace

void bind_kernels(nb::module_& m) {
    m.doc() = "Individual kernels, for tests and measurements.";
    m.def("read_once", &read_once, nb::arg("words"), nb::arg("threads"));
    m.def("peak_macs", &peak_macs, nb::arg("kernels"), nb::arg("threads"));
    m.def("rotate", &rotate, nb::arg("x"), nb::arg("matrix"), nb::arg("kernels"));
    m.def("exponential", &exponential, nb::arg("x"), nb::arg("kernels"));
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("kernels"));
    m.def("multiply", &multiply, nb::arg("values"), nb::arg("scales").none(), nb::arg("x"), nb::arg("int8"),
          nb::arg("onto").none(), nb::arg("kernels"), nb::arg("clips").none() = nb::none());
    m.def("dequantize", &dequantize, nb::arg("values"), nb::arg("scales").none(), nb::arg("cols"), nb::arg("kernels"));
    m.def("conv_silu", &conv_silu, nb::arg("x"), nb::arg("state"), nb::arg("weight"), nb::arg("bias"), nb::arg("kernels"));
    m.def("selective_scan", &selective_scan, nb::arg("u"), nb::arg("dt"), nb::arg("A"), nb::arg("B"), nb::arg("C"),
          nb::arg("D"), nb::arg("z"), nb::arg("dt_bias"), nb::arg("h"), nb::arg("kernels"));
    m.def("scan_gradient", &scan_gradient, nb::arg("u"), nb::arg("dt"), nb::arg("A"), nb::arg("B"), nb::arg("C"), nb::arg("D"),
          nb::arg("z"), nb::arg("dt_bias"), nb::arg("h"), nb::arg("gradient"), nb::arg("last_gradient"), nb::arg("kernels"));
}

}  // namespace cobra_edge
