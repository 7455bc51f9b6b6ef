// Rotations by R = kron(H_m, H_p) / sqrt(m · p), as cobra_edge/formats/hadamard.py has it.
//
//   out[row] = after · (x[row] Rᵀ), or with the other signs after · (x[row] R)
//
// H_p is cut into H_a and H_c, c at most 1024: `signs` (base, base) is H_m kron H_a with base = m · a, as float32, or its
// transpose to turn back. A block makes `power` = c neighbouring values of a row: it adds the row's `base` parts by their
// signs, and runs log2(c) rounds of sums and differences over what it got. x and out (rows, base · power) float32; after (base
// · power,) float32, null for ones. Grid: (base, rows), 256 threads. Shared memory: 4 · power bytes.
#include "device.cuh"

COBRA_KERNEL(256, rotate)(const float* __restrict__ x, const float* __restrict__ signs, const float* __restrict__ after,
                          float* out, int base, int power, float factor) {
    COBRA_SHARED(room);
    float* values = (float*)room;
    const int width = base * power;
    const float* row = x + (size_t)blockIdx.y * width;
    const float* sign = signs + (size_t)blockIdx.x * base;
    for (int c = threadIdx.x; c < power; c += blockDim.x) {
        float sum = 0.f;
        COBRA_UNROLL_BY(4)
        for (int j = 0; j < base; ++j) sum += sign[j] * row[j * power + c];
        values[c] = sum;
    }
    sync_block();
    for (int apart = 1; apart < power; apart *= 2) {
        for (int pair = threadIdx.x; pair < power / 2; pair += blockDim.x) {
            const int i = pair / apart * 2 * apart + pair % apart;
            const float a = values[i], b = values[i + apart];
            values[i] = a + b;
            values[i + apart] = a - b;
        }
        sync_block();
    }
    for (int c = threadIdx.x; c < power; c += blockDim.x) {
        const int i = blockIdx.x * power + c;
        out[(size_t)blockIdx.y * width + i] = values[c] * factor * (after ? after[i] : 1.f);
    }
}
COBRA_EXPORT(rotate)
