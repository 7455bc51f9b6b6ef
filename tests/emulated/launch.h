// What the fake driver asks of the emulator: memory that kernels may touch, and launches.
#pragma once
#include <stddef.h>

#include "emulator.h"

namespace emulated {
// Device memory of n bytes at a multiple of 256, all 0xff: NaN as a float, -1 as an integer.
void* allocate(size_t n);
bool release(void* p);  // false where nothing was allocated there
bool owns(const void* p, size_t n);
const Kernel* find(const char* name);
// Run a kernel to its end. Throws std::runtime_error of what it did wrong.
void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void** parameters);
void seed(uint64_t s);
}  // namespace emulated
