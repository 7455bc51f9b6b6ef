// Rows of a stored matrix as float32: the embeddings of many tokens.
#include "device.cuh"

namespace embed_rows {

constexpr int kThreads = 128;

// Code i of a row as the bundle packs it (cobra_edge/formats/packing.py).
template <int BITS>
COBRA_DEVICE int code(const uint8_t* row, int i) {
    if (BITS == 8) return load_constant(row + i);
    if (BITS == 4) return load_constant(row + i / 32 * 16 + i % 16) >> (i % 32 / 16 * 4) & 15;
    const uint8_t* block = row + i / 64 * 24;
    const int at = i % 64;
    return (load_constant(block + at % 16) >> at / 16 * 2 & 3) | (load_constant(block + 16 + at % 8) >> at / 8 & 1) << 2;
}

template <int BITS>
COBRA_DEVICE void look_up(const uint8_t* codes, const half* scales, const int* tokens, float* out, int width, int group_shift) {
    const size_t row = load_constant(tokens + blockIdx.x);
    COBRA_UNROLL_BY(1) for (int i = threadIdx.x; i < width; i += kThreads) {
        float v;
        if (BITS == 16) {
            v = to_float(load_constant(reinterpret_cast<const half*>(codes) + row * width + i));
        } else {
            const int groups = group_shift < 31 ? width >> group_shift : 1;
            v = (code<BITS>(codes + row * (width / 8 * BITS), i) - (1 << (BITS - 1))) *
                to_float(load_constant(scales + row * groups + (i >> group_shift)));
        }
        store(out + (size_t)blockIdx.x * width + i, v);
    }
}

}  // namespace embed_rows

// tokens: (n,) int32, each a row of the matrix; out: (n, width) float32. A block a token.
#define COBRA_EMBED(BITS)                                                                                \
    COBRA_KERNEL(embed_rows::kThreads, embed_rows_w##BITS)                                               \
    (const uint8_t* __restrict__ codes, const half* __restrict__ scales, const int* __restrict__ tokens, \
     float* __restrict__ out, int width, int group_shift) {                                              \
        embed_rows::look_up<BITS>(codes, scales, tokens, out, width, group_shift);                       \
    }                                                                                                    \
    COBRA_EXPORT(embed_rows_w##BITS)

COBRA_EMBED(3)
COBRA_EMBED(4)
COBRA_EMBED(8)
COBRA_EMBED(16)
