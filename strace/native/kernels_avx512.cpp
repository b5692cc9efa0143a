// Kernels for AVX-512 with VNNI.
#include "kernels_avx512.h"

namespace strace {

extern const Kernels AVX512;
const Kernels AVX512 = make_kernels<Fp32, Bf16, Int8, Int4>("avx512vnni");

}  // namespace strace
