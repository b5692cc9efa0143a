// The formats of AVX-512 with VNNI: a vector is 16 output rows by 4 bytes of inputs. Included by the kernels_*.cpp of the
// instruction sets that have it.
#pragma once

#include <immintrin.h>

#include <utility>

#include "tiles.h"

namespace strace {
namespace {

constexpr int VECTORS = PANEL / 16;

inline __m512i broadcast(const uint8_t *four) {
  int32_t value;
  memcpy(&value, four, sizeof value);
  return _mm512_set1_epi32(value);
}

// The processor's own prefetchers stop at every page and ask too late: a core then waits for memory that it could have
// asked for. So every step asks for what comes FAR bytes later, as far as the second-level cache, which can wait for more
// lines at a time than the first, and NEAR bytes later from there.
constexpr size_t FAR = 4096, NEAR = 1024;

inline void fetch_ahead(const uint8_t *weights, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(weights + FAR + line, _MM_HINT_T1);
    _mm_prefetch(weights + NEAR + line, _MM_HINT_T0);
  }
}

template <int T>
inline void load_sums(const float *sums, __m512 (&into)[T][VECTORS]) {
  for (int t = 0; t < T; t++)
    for (int v = 0; v < VECTORS; v++) into[t][v] = _mm512_load_ps(sums + t * PANEL + v * 16);
}

template <int T>
inline void store_sums(const __m512 (&from)[T][VECTORS], float *sums) {
  for (int t = 0; t < T; t++)
    for (int v = 0; v < VECTORS; v++) _mm512_store_ps(sums + t * PANEL + v * 16, from[t][v]);
}

template <int T>
inline void add_input(const __m512 (&weights)[VECTORS], const uint8_t *x, size_t stride, __m512 (&sum)[T][VECTORS]) {
  for (int t = 0; t < T; t++) {
    const __m512 one = _mm512_castsi512_ps(broadcast(x + t * stride));
    for (int v = 0; v < VECTORS; v++) sum[t][v] = _mm512_fmadd_ps(weights[v], one, sum[t][v]);
  }
}

// Adds groups by F::add_step<T>, which takes one step of a panel's weights.
template <class F>
struct Dense : Stateless {
  static constexpr int TOKENS = 12;

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    __m512 sum[T][VECTORS];
    load_sums(sums, sum);
    for (int step = 0; step < groups * F::STEPS; step++, weights += STEP_BYTES, x += F::ACTIVATION_BYTES / F::STEPS) {
      __m512i w[VECTORS];
      for (int v = 0; v < VECTORS; v++) w[v] = _mm512_loadu_si512(weights + 64 * v);
      fetch_ahead(weights, STEP_BYTES);
      F::template add_step<T>(w, x, stride, sum);
    }
    store_sums(sum, sums);
  }
};

struct Fp32 : Dense<Fp32> {
  static constexpr int FORMAT = ST_FP32, STEPS = GROUP;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(float);

  static void prepare(const float *x, void *out) { memcpy(out, x, ACTIVATION_BYTES); }

  template <int T>
  static void add_step(const __m512i (&words)[VECTORS], const uint8_t *x, size_t stride, __m512 (&sum)[T][VECTORS]) {
    __m512 w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = _mm512_castsi512_ps(words[v]);
    add_input(w, x, stride, sum);
  }
};

// Widened to float32: Intel's cores do four multiply-adds of 16 numbers in the time of one `vdpbf16ps` of 32.
struct Bf16 : Dense<Bf16> {
  static constexpr int FORMAT = ST_BF16, STEPS = GROUP / 2;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(float);

  // To the nearest, ties to the even one.
  static void prepare(const float *x, void *out) {
    for (int i = 0; i < GROUP; i += 16) {
      const __m512i bits = _mm512_loadu_si512(x + i);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
      _mm512_storeu_ps(static_cast<float *>(out) + i, high_half(rounded));
    }
  }

  static __m512 low_half(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }

  static __m512 high_half(__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }

  template <int T>
  static void add_step(const __m512i (&both)[VECTORS], const uint8_t *x, size_t stride, __m512 (&sum)[T][VECTORS]) {
    __m512 even[VECTORS], odd[VECTORS];
    for (int v = 0; v < VECTORS; v++) even[v] = low_half(both[v]), odd[v] = high_half(both[v]);
    add_input(even, x, stride, sum);
    add_input(odd, x + sizeof(float), stride, sum);
  }
};

// One token's group on its int8 grid, and where its int32 sums start: what the offset of the stored codes adds, taken
// off beforehand.
struct Codes {
  float scale;
  int32_t start;
  int8_t codes[GROUP];
};

inline void prepare_codes(const float *x, int offset, void *out) {
  __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  float scale = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high))) / 127;
  Codes made{scale, 0, {}};
  if (scale > 0) {
    __m512i first = _mm512_cvtps_epi32(_mm512_div_ps(low, _mm512_set1_ps(scale)));
    __m512i second = _mm512_cvtps_epi32(_mm512_div_ps(high, _mm512_set1_ps(scale)));
    made.start = -offset * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(made.codes), _mm512_cvtsepi32_epi8(first));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(made.codes + 16), _mm512_cvtsepi32_epi8(second));
  }
  memcpy(out, &made, sizeof made);
}

template <int T>
inline void start_group(const uint8_t *x, size_t stride, __m512i (&sum)[T][VECTORS]) {
  for (int t = 0; t < T; t++) {
    __m512i start = broadcast(x + t * stride + offsetof(Codes, start));
    for (int v = 0; v < VECTORS; v++) sum[t][v] = start;
  }
}

// One step of 4 inputs for all tokens.
template <int T>
inline void add_step(const __m512i (&weights)[VECTORS], const uint8_t *x, size_t stride, int step,
                     __m512i (&sum)[T][VECTORS]) {
  for (int t = 0; t < T; t++) {
    __m512i four = broadcast(x + t * stride + offsetof(Codes, codes) + 4 * step);
    for (int v = 0; v < VECTORS; v++) sum[t][v] = _mm512_dpbusd_epi32(sum[t][v], weights[v], four);
  }
}

struct Int8 : Stateless {
  static constexpr int FORMAT = ST_INT8, TOKENS = 8;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Codes);

  static void prepare(const float *x, void *out) { prepare_codes(x, INT8_OFFSET, out); }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    __m512 sum[T][VECTORS];
    load_sums(sums, sum);
    for (int g = 0; g < groups; g++, weights += group_bytes(FORMAT), x += ACTIVATION_BYTES) {
      __m512i exact[T][VECTORS];
      start_group(x, stride, exact);
#pragma GCC unroll 8
      for (int step = 0; step < 8; step++) {
        __m512i w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = _mm512_loadu_si512(weights + step * STEP_BYTES + 64 * v);
        fetch_ahead(weights + step * STEP_BYTES, STEP_BYTES);
        add_step(w, x, stride, step, exact);
      }
      for (int t = 0; t < T; t++) {
        __m512 scale = _mm512_castsi512_ps(broadcast(x + t * stride));
        for (int v = 0; v < VECTORS; v++) sum[t][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[t][v]), scale, sum[t][v]);
      }
    }
    store_sums(sum, sums);
  }
};

struct Int4 : Stateless {
  static constexpr int FORMAT = ST_INT4, TOKENS = 8;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Codes);

  static void prepare(const float *x, void *out) { prepare_codes(x, INT4_OFFSET, out); }

  static __m512 widen(const uint8_t *bf16) {
    __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(bf16)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
  }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    const __m512i low_half = _mm512_set1_epi8(15);
    __m512 sum[T][VECTORS];
    load_sums(sums, sum);
    for (int g = 0; g < groups; g++, weights += group_bytes(FORMAT), x += ACTIVATION_BYTES) {
      fetch_ahead(weights, group_bytes(FORMAT));
      __m512i exact[T][VECTORS];
      start_group(x, stride, exact);
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {
        __m512i even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
          __m512i both = _mm512_loadu_si512(weights + INT4_SCALE_BYTES + pair * STEP_BYTES + 64 * v);
          even[v] = _mm512_and_si512(both, low_half);
          odd[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
        }
        add_step(even, x, stride, 2 * pair, exact);
        add_step(odd, x, stride, 2 * pair + 1, exact);
      }
      __m512 scales[VECTORS];
      for (int v = 0; v < VECTORS; v++) scales[v] = widen(weights + 32 * v);
      for (int t = 0; t < T; t++) {
        __m512 scale = _mm512_castsi512_ps(broadcast(x + t * stride));
        for (int v = 0; v < VECTORS; v++)
          sum[t][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[t][v]), _mm512_mul_ps(scales[v], scale), sum[t][v]);
      }
    }
    store_sums(sum, sums);
  }
};

}  // namespace
}  // namespace strace
