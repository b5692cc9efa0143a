// Kernels for AVX-512 with VNNI and bf16.
#include "kernels_avx512bf16.h"

namespace strace {

extern const Kernels AVX512_BF16;
const Kernels AVX512_BF16 = make_kernels<Fp32, Bf16Pairs, Int8, Int4>("avx512bf16");

}  // namespace strace
