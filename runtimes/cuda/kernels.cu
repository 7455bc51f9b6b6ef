// All kernels, one unit: one cubin an architecture.
#include "gemm.cu"
