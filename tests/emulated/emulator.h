// CUDA C++ on a processor, for tests: runtimes/cuda/device.cuh in the form g++ compiles. A block's threads are fibers of one
// thread of the host, blocks run one after the other. What a GPU leaves open is made hostile: threads and blocks run in a
// shuffled order, shared memory begins as NaN, a barrier or warp operation that not all reach is an error, wide accesses have
// to be aligned, copies ahead land when they are waited for. With COBRA_CHECKED (and -fsanitize=thread, whose calls
// emulator.cpp answers) every access is checked: inside an allocation, and ordered by barriers with every other thread's
// access of the same byte of which one is a write.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

// All of this is static: a function that kernels share with the emulator would be instrumented in one and called by the other.
#define COBRA_DEVICE static inline
#define COBRA_DEVICE_MEMBER inline
#define COBRA_UNROLL
#define COBRA_UNROLL_BY(n)
#define COBRA_KERNEL(threads, name) static void name
#define COBRA_KERNEL_OCCUPANCY(threads, blocks, name) static void name
#define COBRA_EXPORT(name) static const emulated::Registered registered_##name(#name, name);
#define COBRA_SHARED(name) unsigned char* const name = emulated::shared_memory()
#define __restrict__ __restrict
#define UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("undefined")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#ifdef __aarch64__
using HostHalf = __fp16;
#else
using HostHalf = _Float16;
#endif
struct half {
    HostHalf v;
};
struct alignas(4) half2 {
    half x, y;
};

constexpr unsigned kWholeWarp = 0xffffffffu;

namespace emulated {
// What a warp's lanes leave for one another.
struct Slot {
    uint32_t words[10];
};

// Of a fiber they are constant.
__attribute__((const)) dim3 thread_index();
__attribute__((const)) dim3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) int lane();
__attribute__((const)) unsigned char* shared_memory();
void barrier();
void warp_barrier();
// All lanes of the mask leave a slot; returns the 32 of them.
const Slot* meet(unsigned mask, const Slot& mine);
[[noreturn]] void fail(const char* why);
// An access of n bytes that has to begin at a multiple of n, noted and checked.
void touch(const void* p, size_t n, bool writes);
void copy_ahead(void* shared, const void* global, size_t n, bool valid);
void commit_copies();
void wait_copies(int left);
bool last_block(unsigned* counter, unsigned* flag);
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

// A kernel by its name: how it is called with parameters that lie in memory, as cuLaunchKernel has them.
struct Kernel {
    const char* name;
    void (*call)(void* function, void** parameters);
    void* function;
    const size_t* sizes;  // of its parameters
    size_t n_parameters;
};
void enlist(const Kernel& kernel);

namespace {
template <class... A>
struct Caller {
    template <size_t... I>
    static void spread(void (*f)(A...), void** p, std::index_sequence<I...>) {
        f(*static_cast<std::decay_t<A>*>(p[I])...);
    }
    static void call(void* f, void** p) { spread(reinterpret_cast<void (*)(A...)>(f), p, std::index_sequence_for<A...>{}); }
};
struct Registered {
    template <class... A>
    Registered(const char* name, void (*f)(A...)) {
        static const size_t sizes[] = {sizeof(A)...};
        enlist({name, Caller<A...>::call, reinterpret_cast<void*>(f), sizes, sizeof...(A)});
    }
};
}  // namespace

template <class T>
UNCHECKED static inline T exchange(T v, int from, unsigned mask) {
    static_assert(sizeof(T) <= 8, "4 or 8 bytes are exchanged");
    Slot mine{};
    memcpy(mine.words, &v, sizeof v);
    const Slot* slots = meet(mask, mine);
    if (from < 0 || from > 31) return v;
    if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
    memcpy(&v, slots[from].words, sizeof v);
    return v;
}
}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define blockDim (emulated::block_size())
#define gridDim (emulated::grid_size())

static inline void sync_block() { emulated::barrier(); }
static inline void sync_warp() { emulated::warp_barrier(); }
template <class T>
static inline T shuffle(T v, int from, unsigned mask = kWholeWarp) {
    return emulated::exchange(v, from & 31, mask);
}
template <class T>
static inline T shuffle_xor(T v, int with, unsigned mask = kWholeWarp) {
    return emulated::exchange(v, emulated::lane() ^ with, mask);
}
template <class T>
static inline T shuffle_down(T v, int by, unsigned mask = kWholeWarp) {
    return emulated::exchange(v, emulated::lane() + by, mask);
}
template <class T>
static inline T shuffle_up(T v, int by, unsigned mask = kWholeWarp) {
    return emulated::exchange(v, emulated::lane() - by, mask);
}
UNCHECKED static inline unsigned ballot(bool p, unsigned mask = kWholeWarp) {
    emulated::Slot mine{};
    mine.words[0] = p;
    const emulated::Slot* slots = emulated::meet(mask, mine);
    unsigned r = 0;
    for (int l = 0; l < 32; ++l) r |= (mask >> l & 1) && slots[l].words[0] ? 1u << l : 0;
    return r;
}
UNCHECKED static inline uint32_t max_of_warp(uint32_t v) {
    emulated::Slot mine{};
    mine.words[0] = v;
    const emulated::Slot* slots = emulated::meet(kWholeWarp, mine);
    for (int l = 0; l < 32; ++l) v = v < slots[l].words[0] ? slots[l].words[0] : v;
    return v;
}
static inline bool last_block(unsigned* counter, unsigned* flag) { return emulated::last_block(counter, flag); }

template <class T>
UNCHECKED static inline T load(const T* p) {
    T v;
    emulated::touch(p, sizeof(T), false);
    memcpy(&v, p, sizeof(T));
    return v;
}
template <class T>
UNCHECKED static inline void store(T* p, const T& v) {
    emulated::touch(p, sizeof(T), true);
    memcpy(p, &v, sizeof(T));
}
template <class T>
static inline T load_constant(const T* p) {
    return load(p);
}
template <class T>
static inline T load_streaming(const T* p) {
    return load(p);
}
template <class T>
static inline T load_coherent(const T* p) {
    return load(p);
}
static inline void copy_ahead_16(void* shared, const void* global, bool valid = true) {
    emulated::copy_ahead(shared, global, 16, valid);
}
template <int BYTES>
static inline void copy_ahead(void* shared, const void* global, bool valid = true) {
    static_assert(BYTES == 4 || BYTES == 8, "cp.async.ca copies 4, 8 or 16 bytes");
    emulated::copy_ahead(shared, global, BYTES, valid);
}
static inline void commit_copies() { emulated::commit_copies(); }
template <int LEFT>
static inline void wait_copies() {
    emulated::wait_copies(LEFT);
}

static inline int dot4(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
static inline int dot4_unsigned(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 4; ++i) c += int(uint8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
static inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t digit = selector >> 4 * i & 15, byte = uint32_t(both >> 8 * (digit & 7)) & 255;
        if (digit & 8) byte = byte & 128 ? 255 : 0;
        r |= byte << 8 * i;
    }
    return r;
}
// NaN becomes 0, and what is too large the nearest integer, as cvt.rni.s32.f32 has it.
static inline int round_to_int(float v) {
    if (v != v) return 0;
    if (v >= 2147483648.f) return INT32_MAX;
    if (v <= -2147483648.f) return INT32_MIN;
    return int(nearbyintf(v));
}

static inline uint32_t bits_of(float v) {
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
}
static inline float float_of(uint32_t v) {
    float r;
    memcpy(&r, &v, 4);
    return r;
}
static inline float to_float(half h) { return float(h.v); }
static inline half to_half(float f) { return {HostHalf(f)}; }
static inline float saturated(float v) { return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v; }
static inline float2 to_floats(half2 h) { return {float(h.x.v), float(h.y.v)}; }
static inline half2 to_halves(float low, float high) { return {{HostHalf(low)}, {HostHalf(high)}}; }
static inline uint32_t bits_of(half2 v) {
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
}
static inline half2 halves_of(uint32_t v) {
    half2 r;
    memcpy(&r, &v, 4);
    return r;
}
static inline half2 twice(half v) { return {v, v}; }
static inline half2 add(half2 a, half2 b) { return to_halves(float(a.x.v) + float(b.x.v), float(a.y.v) + float(b.y.v)); }
static inline half2 subtract(half2 a, half2 b) { return to_halves(float(a.x.v) - float(b.x.v), float(a.y.v) - float(b.y.v)); }
static inline half2 multiply(half2 a, half2 b) { return to_halves(float(a.x.v) * float(b.x.v), float(a.y.v) * float(b.y.v)); }
static inline half2 multiply_add(
    half2 a, half2 b, half2 c) {  // a product of halves is exact as a double, and so is this sum but for its rounding
    return {{HostHalf(double(a.x.v) * double(b.x.v) + double(c.x.v))},
            {HostHalf(double(a.y.v) * double(b.y.v) + double(c.y.v))}};
}
static inline float reciprocal_root(float v) { return 1.f / sqrtf(v); }
static inline float fast_exp(float v) { return expf(v); }
static inline float fast_exp2(float v) { return exp2f(v); }
static inline float fast_divide(float a, float b) { return fabsf(b) > 8.5e37f && fabsf(b) < INFINITY ? 0.f : a / b; }
static inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
template <class T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}

static inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated::mma(d, a, b); }
static inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, false); }
static inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load_matrices(r, row, true); }
