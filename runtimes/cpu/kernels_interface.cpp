// Individual kernels behind the C interface, so that each can be compared with its numpy reference.
#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <vector>

#include "arguments.h"
#include "team.h"

using namespace cobra_edge;

namespace {

// The values of a float32 array that must have this shape; -1 for any size.
float* floats(const CobraArray& array, std::initializer_list<int64_t> shape, const char* what) {
    float* values = floats_in(what, array);
    bool fits = array.rank == static_cast<int32_t>(shape.size());
    int axis = 0;
    for (const int64_t n : shape) {
        fits = fits && (n < 0 || array.shape[axis] == n);
        ++axis;
    }
    if (!fits) throw std::invalid_argument(std::string(what) + " has another shape than the other arrays ask for");
    return values;
}

constexpr int64_t kAny = -1;

// Channels are shared out in a fixed number of parts, so that sums over channels do not depend on the number of threads.
constexpr int64_t kParts = 8;

// Run part(i, from, to) for every part that has channels.
template <typename Part>
void for_parts(int64_t channels, int32_t threads, const Part& part) {
    expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
    const int64_t each = (channels + kParts * kChannels - 1) / (kParts * kChannels) * kChannels;
    const int64_t of = threads < kParts ? threads : kParts;
    const auto run = [&](int64_t rank) {
        for (int64_t i = rank; i < kParts; i += of)
            if (i * each < channels) part(i, i * each, std::min((i + 1) * each, channels));
    };
    if (of == 1) return run(0);
    Team team(static_cast<int>(of));
    team.run([&](int rank) { run(rank); });
}

// The inputs of a scan that fit each other.
struct ScanArguments {
    explicit ScanArguments(const CobraArray* const a[])
        : u(floats(*a[0], {kAny, kAny}, "u")), tokens(a[0]->shape[0]), channels(a[0]->shape[1]) {
        dt = floats(*a[1], {tokens, channels}, "dt");
        A = floats(*a[2], {channels, kAny}, "A");
        d_state = a[2]->shape[1];
        B = floats(*a[3], {tokens, d_state}, "B");
        C = floats(*a[4], {tokens, d_state}, "C");
        D = floats(*a[5], {channels}, "D");
        z = floats(*a[6], {tokens, channels}, "z");
        dt_bias = floats(*a[7], {channels}, "dt_bias");
        h = floats(*a[8], {channels, d_state}, "h");
        expect(d_state >= 1 && d_state <= 256, "d_state must be 1 to 256");
    }
    Scan scan() const { return {A, D, dt_bias, channels, d_state}; }

    float *u, *dt, *A, *B, *C, *D, *z, *dt_bias, *h;
    int64_t tokens, channels, d_state;
};

}  // namespace

int cobra_exponential(const CobraArray* x, const CobraArray* out, const char* kernels) {
    return guarded([&] {
        const float* values = floats(*x, {kAny}, "x");
        const int64_t n = x->shape[0];
        kernels_named(kernels).exponential(values, n, floats(*out, {n}, "out"));
    });
}

int cobra_rms_norm(const CobraArray* x, const CobraArray* weight, float eps, const CobraArray* out, const char* kernels) {
    return guarded([&] {
        const float* values = floats(*x, {kAny}, "x");
        const int64_t n = x->shape[0];
        kernels_named(kernels).rms_norm(values, floats(*weight, {n}, "weight"), eps, n, floats(*out, {n}, "out"));
    });
}

int cobra_multiply(const CobraArray* values, const CobraArray* scales, const CobraArray* clips, const CobraArray* x,
                   int32_t int8, int32_t add, const CobraArray* out, const char* kernels) {
    return guarded([&] {
        const float* inputs = floats(*x, {kAny, kAny}, "x");
        const int64_t tokens = x->shape[0], cols = x->shape[1];
        const Matrix m = matrix_from("values", *values, scales, clips, cols);
        expect(m.cols == cols, "x is not as wide as the matrix");
        expect(!int8 || m.quantized(), "int8 activations need a quantized matrix");
        float* to = floats(*out, {tokens, m.rows}, "out");
        const Kernels& k = kernels_named(kernels);
        std::vector<float> scratch(static_cast<size_t>(scratch_floats(cols)));
        if (!int8) {
            k.matmul_float(m, 0, m.rows, inputs, cols, tokens, to, m.rows, add != 0, scratch.data());
            return;
        }
        std::vector<int8_t> codes(static_cast<size_t>(tokens * cols));
        std::vector<float> code_scales(static_cast<size_t>(tokens * m.groups()));
        std::vector<int32_t> code_sums(static_cast<size_t>(tokens * m.groups() + kSpareSums));
        const Int8Rows rows{codes.data(), code_scales.data(), code_sums.data(), cols, m.groups()};
        for (int64_t t = 0; t < tokens; ++t) k.quantize(inputs + t * cols, m, t, 0, m.groups(), rows);
        k.matmul_int8(m, 0, m.rows, rows, tokens, to, m.rows, add != 0, scratch.data());
    });
}

int cobra_dequantize(const CobraArray* values, const CobraArray* scales, const CobraArray* out, const char* kernels) {
    return guarded([&] {
        float* to = floats(*out, {kAny, kAny}, "out");
        const Matrix m = matrix_from("values", *values, scales, nullptr, out->shape[1]);
        floats(*out, {m.rows, m.cols}, "out");
        for (int64_t r = 0; r < m.rows; ++r) kernels_named(kernels).dequantize_row(m, r, to + r * m.cols);
    });
}

int cobra_conv_silu(const CobraArray* x, const CobraArray* state, const CobraArray* weight, const CobraArray* bias,
                    const CobraArray* out, const char* kernels, int32_t threads) {
    return guarded([&] {
        const float* inputs = floats(*x, {kAny, kAny}, "x");
        const int64_t tokens = x->shape[0], channels = x->shape[1];
        const float* taps = floats(*weight, {kAny, channels}, "weight");
        const Conv conv{taps, floats(*bias, {channels}, "bias"), weight->shape[0], channels};
        expect(conv.taps >= 2 && conv.taps <= 8, "a convolution has 2 to 8 taps");
        float* carried = floats(*state, {channels, conv.taps}, "state");
        float* to = floats(*out, {tokens, channels}, "out");
        const Kernels& k = kernels_named(kernels);
        for_parts(channels, threads, [&](int64_t, int64_t from, int64_t until) {
            k.conv_silu(conv, from, until, inputs, channels, tokens, carried, to, channels);
        });
    });
}

int cobra_selective_scan(const CobraArray* const inputs[9], const CobraArray* out, const char* kernels, int32_t threads) {
    return guarded([&] {
        const ScanArguments a(inputs);
        float* to = floats(*out, {a.tokens, a.channels}, "out");
        const Kernels& k = kernels_named(kernels);
        for_parts(a.channels, threads, [&](int64_t, int64_t from, int64_t until) {
            k.selective_scan(a.scan(), from, until, a.tokens, a.dt, a.channels, a.B, a.C, a.d_state, a.z, a.channels, a.h, a.u,
                             to, a.channels);
        });
    });
}

int cobra_scan_gradient(const CobraArray* const inputs[11], const CobraArray* const out[9], const char* kernels,
                        int32_t threads) {
    return guarded([&] {
        const ScanArguments a(inputs);
        const float* gradient = floats(*inputs[9], {a.tokens, a.channels}, "gradient");
        const float* last_gradient = floats(*inputs[10], {a.channels, a.d_state}, "last_gradient");
        const ScanArguments to(out);
        expect(to.tokens == a.tokens && to.channels == a.channels && to.d_state == a.d_state,
               "the gradients have another shape than the inputs");
        const Kernels& k = kernels_named(kernels);
        const int64_t sums = a.tokens * a.d_state;
        std::fill_n(to.A, a.channels * a.d_state, 0.0f);
        for (float* sum : {to.D, to.dt_bias}) std::fill_n(sum, a.channels, 0.0f);
        std::vector<float> of_B(static_cast<size_t>(kParts * sums)), of_C(of_B.size());  // of each part
        for_parts(a.channels, threads, [&](int64_t i, int64_t from, int64_t until) {
            std::vector<float> scratch(static_cast<size_t>(scan_gradient_floats(a.tokens, a.d_state)));
            const ScanGradient part{to.u, to.dt,     of_B.data() + i * sums, of_C.data() + i * sums, to.z, to.h, to.A,
                                    to.D, to.dt_bias};
            k.scan_gradient(a.scan(), from, until, a.tokens, {a.u, a.dt, a.B, a.C, a.z, a.h}, gradient, last_gradient, part,
                            scratch.data());
        });
        for (int64_t at = 0; at < sums; ++at) {
            to.B[at] = to.C[at] = 0.0f;
            for (int64_t i = 0; i < kParts; ++i)
                to.B[at] += of_B[static_cast<size_t>(i * sums + at)], to.C[at] += of_C[static_cast<size_t>(i * sums + at)];
        }
    });
}

int cobra_rotate(const CobraArray* x, const CobraArray* matrix, const char* kernels) {
    return guarded([&] {
        float* values = floats(*x, {kAny, kAny}, "x");
        const int64_t width = x->shape[1], order = matrix->shape[0];
        const float* entries = floats(*matrix, {order, order}, "matrix");
        const int64_t power = order ? width / order : 0;
        expect(power > 0 && power * order == width && (power & (power - 1)) == 0, "the matrix does not fit the width");
        std::vector<float> spare(static_cast<size_t>(width));
        for (int64_t t = 0; t < x->shape[0]; ++t)
            kernels_named(kernels).rotate(values + t * width, entries, order, width, spare.data());
    });
}

int cobra_read_once(const uint64_t* words, int64_t count, int32_t threads, uint64_t* sum) {
    return guarded([&] {
        expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
        const auto n = static_cast<size_t>(count);
        std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);  // 64 bytes apart
        Team team(threads);
        team.run([&](int rank) {
            const auto r = static_cast<size_t>(rank), of = static_cast<size_t>(threads);
            constexpr size_t kLine = 8, kAhead = 128;  // in words; prefetched as in the decoder, which is fastest
            const size_t end = n * (r + 1) / of;
            size_t i = n * r / of;
            uint64_t lanes[kLine] = {};
            for (; i + kLine <= end; i += kLine) {
                __builtin_prefetch(words + i + kAhead, 0, 3);
                for (size_t k = 0; k < kLine; ++k) lanes[k] += words[i + k];
            }
            for (; i < end; ++i) lanes[0] += words[i];
            for (const uint64_t lane : lanes) sums[r * 8] += lane;
        });
        *sum = 0;
        for (const uint64_t s : sums) *sum += s;
    });
}

int cobra_peak_macs(const char* kernels, int32_t threads, double* per_second) {
    return guarded([&] {
        expect(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
        const Kernels& k = kernels_named(kernels);
        constexpr int64_t kRounds = 1 << 20;
        std::vector<int32_t> checksums(static_cast<size_t>(threads) * 16);  // 64 bytes apart
        std::vector<int64_t> done(static_cast<size_t>(threads) * 8);
        Team team(threads);
        const auto began = std::chrono::steady_clock::now();
        team.run([&](int rank) {
            const auto r = static_cast<size_t>(rank);
            done[r * 8] = k.macs_in_registers(kRounds, &checksums[r * 16]);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
        *per_second = static_cast<double>(done[0] * threads) / seconds.count();
    });
}
