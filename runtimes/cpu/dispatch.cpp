// Which instruction sets this build has and this processor can run.
#include "kernels.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace cobra_edge {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotKernels;
#endif

const Kernels* const* available_kernels(int* count) {
    static const Kernels* found[4];
    static const int n = [] {
        int k = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        // The compiler's check includes that the operating system saves the wide registers.
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
            found[k++] = &kAvx512Kernels;
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
