// Kernels for AVX2.
#define STRACE_KERNELS AVX2
#define STRACE_ISA_NAME "avx2"
#include "kernels_plain.h"
