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

// The features that the kernels use, as the processor and the operating system state them: not every compiler's library fills
// in what __builtin_cpu_supports reads. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
struct Features {
    bool avx2 = false, avx_vnni = false, avx512_vnni = false;

    Features() {
        constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, ecx
        constexpr unsigned kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;   // leaf 7, ebx: F DQ BW VL
        constexpr unsigned kAvx512Vnni = 1u << 11, kAvxVnni = 1u << 4;                             // leaf 7, ecx; 7.1, eax
        constexpr unsigned kFirst = kFma | kXsave | kAvx | kF16c, kWide = 0x6, kWidest = 0xe6;     // saved registers
        unsigned a = 0, b = 0, c = 0, d = 0, saved = 0;
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return;
        asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
        if ((saved & kWide) != kWide || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = b & kAvx2;
        avx512_vnni = avx2 && (saved & kWidest) == kWidest && (b & kAvx512) == kAvx512 && (c & kAvx512Vnni);
        avx_vnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
    }
};
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotKernels;
#endif

const Kernels* const* available_kernels(int* count) {
    static const Kernels* found[5];
    static const int n = [] {
        int k = 0;
#if defined(__x86_64__)
        const Features features;
        if (features.avx512_vnni) found[k++] = &kAvx512Kernels;
        if (features.avx_vnni) found[k++] = &kAvx2VnniKernels;
        if (features.avx2) found[k++] = &kAvx2Kernels;
#elif defined(__aarch64__)
#if defined(__APPLE__)
        found[k++] = &kNeonDotKernels;
#else
#if defined(__linux__)
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[k++] = &kNeonDotKernels;
#endif
        found[k++] = &kNeonKernels;
#endif
#endif
        found[k++] = &kScalarKernels;
        return k;
    }();
    *count = n;
    return found;
}

}  // namespace cobra_edge
