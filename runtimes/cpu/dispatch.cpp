// Run-time dispatch: the instruction sets that this build contains and this processor supports.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace cobra_edge {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx2VnniKernels, kAvx512Kernels;

// 256-bit VNNI; compilers have no common feature name for it.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotKernels;
#endif

const Kernels* const* available_kernels(int* count) {
    static const Kernels* found[5];
    static const int n = [] {
        int k = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        // The compiler's check includes operating system support for the wide registers.
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
            found[k++] = &kAvx512Kernels;
        if (avx2 && has_avx_vnni()) found[k++] = &kAvx2VnniKernels;
        if (avx2) found[k++] = &kAvx2Kernels;
#elif defined(__aarch64__)
#if defined(__linux__)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[k++] = &kNeonDotKernels;
#elif defined(__APPLE__)
        found[k++] = &kNeonDotKernels;
#endif
        found[k++] = &kNeonKernels;
#endif
        found[k++] = &kScalarKernels;
        return k;
    }();
    *count = n;
    return found;
}

}  // namespace cobra_edge
