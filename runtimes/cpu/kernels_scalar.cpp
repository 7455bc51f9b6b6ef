// Plain C++: what runs where no instruction set is known, and what the others are tested against besides numpy.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace cobra_edge {
namespace {

#include "elementwise.inl"

void quantize(const float* x, const Matrix& m, int64_t token, int64_t from, int64_t to, const Int8Rows& rows) {
    for (int64_t g = from; g < to; ++g) {
        int8_t* codes = rows.codes + token * rows.width + g * m.group;
        rows.scales[token * rows.groups + g] = round_group(x + g * m.group, m.group, codes);
        int32_t sum = 0;
        for (int64_t i = 0; i < m.group; ++i) sum += codes[i];
        int32_t* offsets = rows.offsets + (token * rows.groups + g) * kOffsetLanes;
        offsets[0] = -sum * (m.storage == Storage::kInt4 ? 8 : 128);
    }
}

int32_t group_dot(const Matrix& m, const uint8_t* codes, const int8_t* a, int32_t sum) {
    if (m.storage == Storage::kInt8) {
        for (int64_t i = 0; i < m.group; ++i) sum += codes[i] * a[i];
        return sum;
    }
    for (int64_t b = 0; b < m.group; b += kBlock, codes += kBlock / 2, a += kBlock)
        for (int64_t i = 0; i < kBlock / 2; ++i) sum += (codes[i] & 0xf) * a[i] + (codes[i] >> 4) * a[i + kBlock / 2];
    return sum;
}

void multiply_int8(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
                   bool add) {
    const int64_t group_bytes = m.storage == Storage::kInt4 ? m.group / 2 : m.group;
    for (int64_t r = from; r < to; ++r) {
        const uint16_t* scales = m.scales + r * m.groups();
        for (int64_t t = 0; t < tokens; ++t) {
            float sum = 0.0f;
            for (int64_t g = 0; g < m.groups(); ++g) {
                const int64_t at = t * rows.groups + g;
                const int8_t* a = rows.codes + t * rows.width + g * m.group;
                const int32_t part = group_dot(m, m.row(r) + g * group_bytes, a, rows.offsets[at * kOffsetLanes]);
                sum += static_cast<float>(part) * (half_to_float(scales[g]) * rows.scales[at]);
            }
            float& o = out[t * stride + r];
            o = add ? o + sum : sum;
        }
    }
}

}  // namespace

extern const Kernels kScalarKernels;
const Kernels kScalarKernels = {"scalar",       rms_norm,  quantize,       multiply_int8, multiply_float,
                                dequantize_row, conv_silu, selective_scan, exponential};

}  // namespace cobra_edge
