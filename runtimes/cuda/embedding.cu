// Rows of an embedding, as float32: out[t, i] = W[tokens[t], i], in the basis the table is stored in.
// tokens (seq,) int32, each of the vocabulary; out (seq, n_in) float32; codes and scales as for gemv. Grid: (n_in / 256 rounded up, seq), 256 threads.
#include "rounded.cuh"

namespace cobra {
namespace {

template <int BITS> COBRA_DEVICE int code_at(const uint8_t* row, int i) {
  if constexpr (BITS == 8) return row[i];
  constexpr int kInputs = Codes<BITS>::kInputs;
  const uint8_t* block = row + i / kInputs * Codes<BITS>::kBytes;
  const int lane = i % 16, run = i % kInputs / 16;
  if constexpr (BITS == 4) return block[lane] >> 4 * run & 15;
  return (block[lane] >> 2 * run & 3) | (block[16 + lane % 8] >> (2 * run + lane / 8) & 1) << 2;
}

template <int BITS>
COBRA_DEVICE void embed(const uint8_t* codes, const half* scales, const int* tokens, float* out, int n_in, int group_shift, int n_groups) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_in) return;
  const size_t row = (size_t)tokens[blockIdx.y];
  const int code = code_at<BITS>(codes + row * (n_in / Codes<BITS>::kInputs * Codes<BITS>::kBytes), i);
  const float scale = to_float(scales[row * n_groups + (i / Codes<BITS>::kInputs >> group_shift)]);
  out[(size_t)blockIdx.y * n_in + i] = (float)(code - Codes<BITS>::kZero) * scale;
}

}  // namespace
}  // namespace cobra

#define EMBED(name, BITS)                                                                                                                             \
  COBRA_KERNEL(256, name)(const uint8_t* __restrict__ codes, const half* __restrict__ scales, const int* __restrict__ tokens, float* out, int n_in,   \
                          int group_shift, int n_groups) {                                                                                            \
    cobra::embed<BITS>(codes, scales, tokens, out, n_in, group_shift, n_groups);                                                                      \
  }                                                                                                                                                   \
  COBRA_EXPORT(name)

EMBED(embed_w8, 8)
EMBED(embed_w4, 4)
EMBED(embed_w3, 3)

COBRA_KERNEL(256, embed_f16)(const half* __restrict__ weights, const int* __restrict__ tokens, float* out, int n_in) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n_in) out[(size_t)blockIdx.y * n_in + i] = to_float(weights[(size_t)tokens[blockIdx.y] * n_in + i]);
}
COBRA_EXPORT(embed_f16)
