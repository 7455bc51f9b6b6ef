// Kernels of a quantized Mamba: one table of functions per instruction set.
//
// Every function works on a range of rows, channels or groups, so that threads can split the work by range. None of
// them allocates, locks or throws. The caller checks all shapes. Rows of float32 activations are contiguous along the
// named width; `stride` is the distance between the rows of two tokens, in elements.
#pragma once

#include <cstdint>

namespace cobra_edge {

enum class Storage : int { kFloat32, kFloat16, kInt8, kInt4, kInt3 };

// This header is compiled for several instruction sets. Of an inline function that is not inlined the linker would keep
// one copy, possibly one that only the newest processors can run.
#define COBRA_INLINE [[gnu::always_inline]] inline

// Compiler barrier: the value is opaque and stays in its register, neither constant-folded nor reloaded.
template <typename Register>
COBRA_INLINE void keep_in_register(Register& v) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(v));
#else
    asm volatile("" : "+w"(v));
#endif
}

// Bytes of `count` values; `count` is a multiple of the block.
COBRA_INLINE constexpr int64_t bytes_of(Storage storage, int64_t count) {
    return storage == Storage::kFloat32   ? count * 4
           : storage == Storage::kFloat16 ? count * 2
           : storage == Storage::kInt8    ? count
           : storage == Storage::kInt4    ? count / 2
                                          : count / 8 * 3;
}

// A matrix as stored in a bundle (docs/bundle.md). Borrowed memory, usually a mapped file.
struct Matrix {
    Storage storage = Storage::kFloat32;
    const void* values = nullptr;      // float32, float16, or packed codes; (rows, cols)
    const uint16_t* scales = nullptr;  // float16, (rows, cols / group); codes only
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t group = 0;             // inputs that share a scale; codes only
    const float* clips = nullptr;  // (cols / group), upper bound of each group's input magnitude; null for no clipping

    COBRA_INLINE bool quantized() const { return storage != Storage::kFloat32 && storage != Storage::kFloat16; }
    COBRA_INLINE int64_t groups() const { return cols / group; }
    COBRA_INLINE int64_t row_bytes() const { return bytes_of(storage, cols); }
    COBRA_INLINE const uint8_t* row(int64_t r) const { return static_cast<const uint8_t*>(values) + r * row_bytes(); }
};

// Activations of several tokens as 8-bit integers, one scale per group of the matrix. Weight codes are unsigned, so
// zero_point · Σ activations must be subtracted from each group's dot product: the sums are kept beside the codes.
struct Int8Rows {
    int8_t* codes;  // (tokens, width)
    float* scales;  // (tokens, width / group)
    int32_t* sums;  // (tokens, width / group), sum of each group's codes
    int64_t width;
    int64_t groups;
};

constexpr int64_t kChannels = 16;  // channels per block of the scan

// Codes are packed in blocks along a row; every group is a multiple of its block and of the smallest register.
COBRA_INLINE constexpr int64_t block_of(Storage storage) { return storage == Storage::kInt3 ? 64 : 32; }
constexpr int64_t kSmallestBlock = 32;
constexpr int64_t kSpareSums = 4;  // padding after Int8Rows::sums: may be read, has no effect

// Floats of scratch memory that a thread needs for matmuls with up to `cols` inputs: a tile of unpacked rows
// with its scales, or four rows as float32.
constexpr int64_t scratch_floats(int64_t cols) { return 6 * cols + 1024; }

// One layer's convolution, (taps, channels) and (channels).
struct Conv {
    const float* weight;
    const float* bias;
    int64_t taps;
    int64_t channels;
};

// One layer's selective scan. A is (channels, d_state) and negative; B and C of a token are adjacent in a row of `low`.
struct Scan {
    const float* A;
    const float* D;
    const float* dt_bias;
    int64_t channels;
    int64_t d_state;
};

// What a scan reads besides its weights: rows of `channels` values per token, B and C (tokens, d_state), h (channels,
// d_state).
struct ScanInputs {
    const float *u, *dt, *B, *C, *z, *h;
};

// Gradients with respect to the inputs of a scan, and to A, D and dt_bias, each of the shape of what it belongs to. Those
// of B, C, A, D and dt_bias are added to what is there.
struct ScanGradient {
    float *u, *dt, *B, *C, *z, *h, *A, *D, *dt_bias;
};

// Tokens whose states a scan's gradient keeps at a time.
constexpr int64_t kScanSegment = 32;

// Floats of scratch memory of a scan's gradient: the plain one keeps the states of all tokens.
constexpr int64_t scan_gradient_floats(int64_t tokens, int64_t d_state) {
    return ((2 * (tokens + kScanSegment) + 8) * d_state + 2 * tokens) * kChannels;
}

struct Kernels {
    const char* name;

    // out = x / rms(x) * weight, over `width` values of one token.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t width, float* out);

    // Quantize groups [from, to) of token `token` to int8 for a matmul with `matrix`; x is that token's whole row. A
    // group's scale is min(largest magnitude, clip) / 127; values beyond the clip become ±127.
    void (*quantize)(const float* x, const Matrix& matrix, int64_t token, int64_t from, int64_t to, const Int8Rows& rows);

    // out[t * stride + r] (+)= matrix[r] · activations[t] for rows [from, to) and all tokens.
    void (*matmul_int8)(const Matrix& matrix, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out,
                        int64_t stride, bool add, float* scratch);

    // The same with float32 activations x (tokens, x_stride).
    void (*matmul_float)(const Matrix& matrix, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                         float* out, int64_t stride, bool add, float* scratch);

    // Write row r of a matrix as float32 (cols).
    void (*dequantize_row)(const Matrix& matrix, int64_t r, float* out);

    // u = silu(causal_conv(x)) for channels [from, to) of all tokens; state (channels, taps), newest last, is updated.
    // x and u are rows of token-major arrays, starting at channel 0.
    void (*conv_silu)(const Conv& conv, int64_t from, int64_t to, const float* x, int64_t x_stride, int64_t tokens,
                      float* state, float* u, int64_t u_stride);

    // out = (C·h + D·u) · silu(z), h = exp(Δ·A)·h + Δ·B·u, Δ = softplus(dt + dt_bias), for channels [from, to).
    // h (channels, d_state) is updated; out may alias u. Source: Gu and Dao 2023, algorithm 2.
    void (*selective_scan)(const Scan& scan, int64_t from, int64_t to, int64_t tokens, const float* dt, int64_t dt_stride,
                           const float* B, const float* C, int64_t bc_stride, const float* z, int64_t z_stride, float* h,
                           const float* u, float* out, int64_t u_stride);

    // Gradient of selective_scan over channels [from, to) of one sequence, from the gradients of its output (tokens, channels)
    // and of its final state (channels, d_state).
    void (*scan_gradient)(const Scan& scan, int64_t from, int64_t to, int64_t tokens, const ScanInputs& inputs,
                          const float* gradient, const float* last_gradient, const ScanGradient& out, float* scratch);

    // x = x · kron(matrix, H)ᵀ / √width in place, for ±1 entries of matrix (order, order) and Sylvester's Hadamard matrix H of
    // order width / order, a power of two; spare has room for `width` floats. Source: cobra_edge/formats/hadamard.py.
    void (*rotate)(float* x, const float* matrix, int64_t order, int64_t width, float* spare);

    // out[i] = exp(x[i]); exposed to test the error of the approximation.
    void (*exponential)(const float* x, int64_t n, float* out);

    // Execute int8 multiply-accumulates (MACs) on registers only, `rounds` times; returns the number of MACs. Their rate is
    // the compute limit of a matmul on this instruction set.
    int64_t (*macs_in_registers)(int64_t rounds, int32_t* checksum);
};

// The tables that this build contains and this processor supports, best first; the last one is plain C++.
// `count` receives their number.
const Kernels* const* available_kernels(int* count);

}  // namespace cobra_edge
