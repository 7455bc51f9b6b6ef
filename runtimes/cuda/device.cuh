// Every device-specific type and instruction of the CUDA runtime, in one place. Kernels include this header and use nothing
// else of CUDA: the same sources are compiled by NVRTC for GPUs and by g++ for the tests (COBRA_EMULATED,
// tests/emulated/emulator.h), where threads are fibers.
//
// Rules that the emulator holds kernels to:
//  - Shared memory is dynamic only: COBRA_SHARED(room), once in a kernel or function; `__shared__` is not known.
//  - A warp is whole: every warp operation is reached by all lanes of its mask, kWholeWarp unless told otherwise.
//  - 8 and 16 bytes at once go through load, load_streaming and store, whose address is a multiple of their size.
//  - No float atomics. What one block writes no other block of the launch reads, but for `last_block`.
//  - A kernel is defined by COBRA_KERNEL(threads, name)(parameters) { ... } and named again by COBRA_EXPORT(name) after it.
#pragma once

#ifdef COBRA_EMULATED
#include "emulator.h"
#else

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <stdint.h>
#endif
#include <cuda_fp16.h>

#define COBRA_KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
// Of kernels that need so few registers that `blocks` of them fit on a multiprocessor.
#define COBRA_KERNEL_OCCUPANCY(threads, blocks, name) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#define COBRA_EXPORT(name)
#define COBRA_DEVICE __device__ __forceinline__
#define COBRA_DEVICE_MEMBER __device__ __forceinline__
#define COBRA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define COBRA_UNROLL _Pragma("unroll")
#define COBRA_PRAGMA(text) _Pragma(#text)
#define COBRA_UNROLL_BY(n) COBRA_PRAGMA(unroll n)

typedef __half half;    // 16 bits
typedef __half2 half2;  // two of them, the first in the low bits

constexpr unsigned kWholeWarp = 0xffffffffu;

// --- Threads ---

COBRA_DEVICE void sync_block() {
    __syncthreads();
}
COBRA_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
COBRA_DEVICE T shuffle(T v, int from, unsigned mask = kWholeWarp) {
    return __shfl_sync(mask, v, from);
}
template <class T>
COBRA_DEVICE T shuffle_xor(T v, int with, unsigned mask = kWholeWarp) {
    return __shfl_xor_sync(mask, v, with);
}
template <class T>
COBRA_DEVICE T shuffle_down(T v, int by, unsigned mask = kWholeWarp) {
    return __shfl_down_sync(mask, v, by);
}
template <class T>
COBRA_DEVICE T shuffle_up(T v, int by, unsigned mask = kWholeWarp) {
    return __shfl_up_sync(mask, v, by);
}
COBRA_DEVICE uint32_t max_of_warp(uint32_t v) { return __reduce_max_sync(kWholeWarp, v); }
COBRA_DEVICE unsigned ballot(bool p, unsigned mask = kWholeWarp) { return __ballot_sync(mask, p); }

// Reached by all threads of all blocks of a launch: true in all threads of the block that comes last, which may then read what
// the others wrote, through load_coherent. `counter` is 0 before and after. `flag` is a word of shared memory.
COBRA_DEVICE bool last_block(unsigned* counter, unsigned* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
        *flag = atomicAdd(counter, 1u) == blocks - 1;
        if (*flag) *counter = 0;
    }
    __syncthreads();
    if (*flag) __threadfence();
    return *flag != 0;
}

// --- Memory ---

// sizeof(T) bytes, 1 to 16, at a multiple of sizeof(T).
template <class T>
COBRA_DEVICE T load(const T* p) {
    return *p;
}
template <class T>
COBRA_DEVICE void store(T* p, const T& v) {
    *p = v;
}
// What nobody writes during the launch, through the read-only path.
template <class T>
COBRA_DEVICE T load_constant(const T* p) {
    return __ldg(p);
}
// The same, of what is read once: it does not displace what is in the caches.
template <class T>
COBRA_DEVICE T load_streaming(const T* p) {
    return __ldcs(p);
}
// What other blocks wrote in this launch.
template <class T>
COBRA_DEVICE T load_coherent(const T* p) {
    return __ldcg(p);
}

COBRA_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Begin to copy 16 bytes from global to shared memory; where not `valid`, zeros, and nothing is read.
COBRA_DEVICE void copy_ahead_16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// 4 or 8 bytes.
template <int BYTES>
COBRA_DEVICE void copy_ahead(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(valid ? BYTES : 0)
                 : "memory");
}
COBRA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most LEFT of this thread's committed groups are under way. Other threads see the copies after a barrier.
template <int LEFT>
COBRA_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// --- Integers ---

// c + the sum of four products of signed bytes.
COBRA_DEVICE int dot4(uint32_t a, uint32_t b, int c) {
    return __dp4a((int)a, (int)b, c);
}
// c + the sum of four products of an unsigned byte of a with a signed byte of b.
COBRA_DEVICE int dot4_unsigned(uint32_t a, uint32_t b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// Bytes of the eight of b:a, chosen by the four hexadecimal digits of `selector`.
COBRA_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
COBRA_DEVICE int round_to_int(float v) { return __float2int_rn(v); }

// --- Floats ---

COBRA_DEVICE uint32_t bits_of(float v) {
    return __float_as_uint(v);
}
COBRA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
COBRA_DEVICE float to_float(half v) { return __half2float(v); }
COBRA_DEVICE half to_half(float v) { return __float2half_rn(v); }  // infinity beyond 65504
// Within what float16 holds; NaN stays NaN, so that it reaches the logits and is told.
COBRA_DEVICE float saturated(float v) {
    float r;
    asm("{\n.reg .f32 low;\nmax.NaN.f32 low, %1, 0fC77FE000;\nmin.NaN.f32 %0, low, 0f477FE000;\n}" : "=f"(r) : "f"(v));
    return r;
}
COBRA_DEVICE float2 to_floats(half2 v) { return __half22float2(v); }
COBRA_DEVICE half2 to_halves(float low, float high) { return __floats2half2_rn(low, high); }
COBRA_DEVICE uint32_t bits_of(half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
COBRA_DEVICE half2 halves_of(uint32_t bits) { return *reinterpret_cast<half2*>(&bits); }
COBRA_DEVICE half2 twice(half v) { return __half2half2(v); }
COBRA_DEVICE half2 add(half2 a, half2 b) { return __hadd2(a, b); }
COBRA_DEVICE half2 subtract(half2 a, half2 b) { return __hsub2(a, b); }
COBRA_DEVICE half2 multiply(half2 a, half2 b) { return __hmul2(a, b); }
COBRA_DEVICE half2 multiply_add(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
COBRA_DEVICE float reciprocal_root(float v) { return rsqrtf(v); }
COBRA_DEVICE float fast_exp(float v) { return __expf(v); }  // some 2 units in the last place for |v| < 1
COBRA_DEVICE float fast_exp2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
COBRA_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }  // 0 for 2^126 < |b|

// --- Tensor cores ---

// d = a b + d for a (16, 16), b (16, 8) in float16 and d (16, 8) in float32, lanes holding them as PTX says of mma.m16n8k16:
// with g = lane / 4, t = lane % 4: a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2] row g, columns 2t + 8 and 2t + 9;
// a[3] row g + 8 of those; b[0] rows 2t and 2t + 1 of column g; b[1] rows 2t + 8 and 2t + 9; d[0], d[1] row g, columns 2t and
// 2t + 1; d[2], d[3] row g + 8.
COBRA_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices (8, 8) of float16 from shared memory: lane l names row l % 8 of matrix l / 8 (16 bytes, at a multiple of 16);
// r[i] are columns 2 (lane % 4) and the next of row lane / 4 of matrix i.
COBRA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, of the matrices transposed.
COBRA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif
