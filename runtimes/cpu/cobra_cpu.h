// The C interface of the native decoder: all that the shared library exports. Python calls it by ctypes
// (cobra_edge/decode/native), so that one library serves every Python.
//
// Functions that return int return 0, or one of the codes below; cobra_error then has the message. Arrays are contiguous, in
// row-major order; who calls vouches for that and for their size, everything else is checked here.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define COBRA_API extern "C" __declspec(dllexport)
#else
#define COBRA_API extern "C" [[gnu::visibility("default")]]
#endif

// Changes whenever a declaration below does: a library of another version is refused before anything else is called.
constexpr int32_t kCobraInterface = 1;

enum CobraCode : int { kCobraOk, kCobraInvalid, kCobraOutOfRange, kCobraNoMemory, kCobraFailed };
enum CobraDtype : int32_t { kCobraOther, kCobraFloat32, kCobraFloat16, kCobraUint8 };

constexpr int kCobraMaxRank = 4;

struct CobraArray {
    void* data;
    int64_t shape[kCobraMaxRank];
    int32_t rank;
    int32_t dtype;
};

struct CobraConfig {
    int64_t d_model, n_layer, vocab, d_inner, d_state, d_conv, dt_rank;
    float norm_eps;
    int32_t tied;
};

struct CobraDecoder;

COBRA_API int32_t cobra_interface();
// The message of this thread's last call that failed.
COBRA_API const char* cobra_error();
// The name of the i-th set of kernels that this processor supports, best first; null after the last.
COBRA_API const char* cobra_kernels(int32_t i);

// A decoder over borrowed arrays, which must outlive it.
COBRA_API int cobra_open(const CobraConfig* config, const char* const* names, const CobraArray* arrays, int64_t count,
                         const char* kernels, int32_t threads, int32_t int8_activations, CobraDecoder** out);
COBRA_API void cobra_close(CobraDecoder* decoder);
COBRA_API const char* cobra_kernels_of(const CobraDecoder* decoder);
// Embeddings (n, d_model) of tokens.
COBRA_API int cobra_embed(CobraDecoder* decoder, const int64_t* tokens, int64_t n, float* out);
// Read one token. The counts are those of the state's values, to be compared with the model's.
COBRA_API int cobra_step(CobraDecoder* decoder, int64_t token, float* conv, int64_t conv_size, float* ssm, int64_t ssm_size,
                         float* logits);
// Read n embeddings; logits are (n, vocab) with every_position, else (vocab).
COBRA_API int cobra_forward(CobraDecoder* decoder, const float* embeddings, int64_t n, float* conv, int64_t conv_size,
                            float* ssm, int64_t ssm_size, float* logits, int32_t every_position);

// Individual kernels, for the float model's sequential operations, for tests and measurements; `out` has the result's shape.
COBRA_API int cobra_exponential(const CobraArray* x, const CobraArray* out, const char* kernels);
COBRA_API int cobra_rms_norm(const CobraArray* x, const CobraArray* weight, float eps, const CobraArray* out,
                             const char* kernels);
// x (tokens, cols) times the transposed matrix, (tokens, rows); `add` to what out holds. scales and clips may be null.
COBRA_API int cobra_multiply(const CobraArray* values, const CobraArray* scales, const CobraArray* clips, const CobraArray* x,
                             int32_t int8, int32_t add, const CobraArray* out, const char* kernels);
COBRA_API int cobra_dequantize(const CobraArray* values, const CobraArray* scales, const CobraArray* out, const char* kernels);
// x (tokens, channels), state (channels, taps) updated in place, weight (taps, channels), bias (channels). This and the scan's
// functions share the channels out to threads; the bits do not depend on their number.
COBRA_API int cobra_conv_silu(const CobraArray* x, const CobraArray* state, const CobraArray* weight, const CobraArray* bias,
                              const CobraArray* out, const char* kernels, int32_t threads);
// u, dt, z (tokens, channels); A (channels, d_state); B, C (tokens, d_state); D, dt_bias (channels); h updated in place. The
// inputs are in this order.
COBRA_API int cobra_selective_scan(const CobraArray* const inputs[9], const CobraArray* out, const char* kernels,
                                   int32_t threads);
// Gradients of the scan's inputs, each of its shape and in their order; what `inputs` holds is followed by the gradients of
// the output and of the final state.
COBRA_API int cobra_scan_gradient(const CobraArray* const inputs[11], const CobraArray* const out[9], const char* kernels,
                                  int32_t threads);
// x (tokens, width) rotated in place, matrix (order, order).
COBRA_API int cobra_rotate(const CobraArray* x, const CobraArray* matrix, const char* kernels);
// Read every 8-byte word once, one sequential stream per thread; the sum is a checksum: measures the memory bandwidth, the
// limit of a decoder's step.
COBRA_API int cobra_read_once(const uint64_t* words, int64_t count, int32_t threads, uint64_t* sum);
// Multiply-accumulates per second of these kernels on registers only, with that many threads in total.
COBRA_API int cobra_peak_macs(const char* kernels, int32_t threads, double* per_second);
