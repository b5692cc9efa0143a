// bf16 in pairs of inputs, as AVX-512's bf16 instructions and AMX take them.
#pragma once

#include "kernels_avx512.h"

namespace strace {
namespace {

struct Bf16Pairs : Dense<Bf16Pairs> {
  static constexpr int FORMAT = ST_BF16, STEPS = GROUP / 2;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(uint16_t);

  static void prepare(const float *x, void *out) {
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
    _mm512_storeu_si512(out, (__m512i)both);
  }

  template <int T>
  static void add_step(const __m512i (&pairs)[VECTORS], const uint8_t *x, size_t stride, __m512 (&sum)[T][VECTORS]) {
    for (int t = 0; t < T; t++) {
      const __m512bh pair = (__m512bh)broadcast(x + t * stride);
      for (int v = 0; v < VECTORS; v++) sum[t][v] = _mm512_dpbf16_ps(sum[t][v], (__m512bh)pairs[v], pair);
    }
  }
};

}  // namespace
}  // namespace strace
