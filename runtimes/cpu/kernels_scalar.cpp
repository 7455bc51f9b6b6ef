// Plain C++: the fallback for unknown instruction sets, and a second reference in tests besides numpy.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace cobra_edge {
namespace {

#include "elementwise.inl"
#include "plain_scan_gradient.inl"

// Unpack codes [start, start + 16) of a row, unsigned.
void unpack16(const Matrix& m, const uint8_t* row, int64_t start, int32_t* out) {
    const int64_t s = start % block_of(m.storage) / 16;
    if (m.storage == Storage::kInt8) {
        for (int64_t j = 0; j < 16; ++j) out[j] = row[start + j];
    } else if (m.storage == Storage::kInt4) {
        const uint8_t* block = row + start / 32 * 16;
        for (int64_t j = 0; j < 16; ++j) out[j] = block[j] >> (4 * s) & 15;
    } else {
        const uint8_t* block = row + start / 64 * 24;
        for (int64_t j = 0; j < 16; ++j)
            out[j] = (block[j] >> (2 * s) & 3) | (block[16 + (j & 7)] >> (2 * s + (j >> 3)) & 1) << 2;
    }
}

void matmul_int8(const Matrix& m, int64_t from, int64_t to, const Int8Rows& rows, int64_t tokens, float* out, int64_t stride,
                 bool add, float*) {
    const uint32_t zero = m.storage == Storage::kInt8 ? 128 : m.storage == Storage::kInt4 ? 8 : 4;
    for (int64_t r = from; r < to; ++r) {
        const uint16_t* scales = m.scales + r * m.groups();
        for (int64_t t = 0; t < tokens; ++t) {
            float total = 0.0f;
            for (int64_t g = 0; g < m.groups(); ++g) {
                const int64_t at = t * rows.groups + g;
                auto sum = static_cast<int32_t>(0u - zero * static_cast<uint32_t>(rows.sums[at]));
                int32_t codes[16];
                for (int64_t i = g * m.group; i < (g + 1) * m.group; i += 16) {
                    const int8_t* a = rows.codes + t * rows.width + i;
                    unpack16(m, m.row(r), i, codes);
                    for (int64_t j = 0; j < 16; ++j) sum += codes[j] * a[j];
                }
                total += static_cast<float>(sum) * (half_to_float(scales[g]) * rows.scales[at]);
            }
            float& o = out[t * stride + r];
            o = add ? o + total : total;
        }
    }
}

int64_t macs_in_registers(int64_t rounds, int32_t* checksum) {
    uint32_t sums[8] = {}, all = 0;  // unsigned: may wrap around
    for (int64_t i = 0; i < rounds; ++i)
        for (uint32_t& s : sums) {
            asm volatile("" : "+r"(s));  // otherwise the compiler folds the loop
            s += static_cast<uint32_t>(static_cast<int8_t>(i) * static_cast<int8_t>(s));
        }
    for (const uint32_t s : sums) all += s;
    *checksum = static_cast<int32_t>(all);
    return rounds * 8;
}

}  // namespace

extern const Kernels kScalarKernels;
const Kernels kScalarKernels = {"scalar",
                                rms_norm,
                                quantize,
                                matmul_int8,
                                plain_matmul_float,
                                dequantize_row,
                                plain_conv_silu,
                                plain_selective_scan,
                                plain_scan_gradient,
                                rotate,
                                exponential,
                                macs_in_registers};

}  // namespace cobra_edge
