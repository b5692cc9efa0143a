// Kernels for AVX-512 with bf16 and VNNI.
#include "kernels_avx512.h"

namespace strace {

extern const Kernels AVX512;
const Kernels AVX512 = make_kernels<Fp32, Bf16, Int8, Int4>("avx512bf16");

}  // namespace strace
