// Kernels for any CPU: Arm, and an x86 without AVX2.
#define STRACE_KERNELS PORTABLE
#define STRACE_ISA_NAME "portable"
#include "kernels_plain.h"
