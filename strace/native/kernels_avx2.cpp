// Kernels for AVX2: a vector is 8 output rows by 4 bytes of inputs. Activations are prepared as the products take them,
// so that a token's number is one broadcast: bf16 as float32, the codes for int8 weights as 16 bits.
#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "tiles.h"

namespace strace {
namespace {

constexpr int LANES = 8;
constexpr int WIDE_TOKENS = 2, TOKENS_AT_ONCE = 6;  // so many tokens' sums over a panel, or over half of one, fit 16 registers

inline __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }

inline __m256i broadcast(const void *four) {
  int32_t value;
  memcpy(&value, four, sizeof value);
  return _mm256_set1_epi32(value);
}

inline __m256 broadcast_float(const void *one) { return _mm256_castsi256_ps(broadcast(one)); }

// The processor does not look far enough ahead for the next weights by itself. Where products take the longer, what is
// to come has time to reach the L2 cache before it is wanted in L1.
constexpr int AHEAD = 4096, NEAR = 2048, FAR = 16384;

template <int V>
inline void fetch_ahead(const uint8_t *weights) {
  for (const uint8_t *line = weights, *end = weights + 32 * V; line < end; line += 64) {
    if constexpr (V == PANEL / LANES) {
      _mm_prefetch(line + AHEAD, _MM_HINT_T0);
    } else {
      _mm_prefetch(line + NEAR, _MM_HINT_T0);
      _mm_prefetch(line + FAR, _MM_HINT_T1);
    }
  }
}

// Adds groups by F::add_group<T, V>, which takes V vectors of a panel's rows from the `first` on, and these rows' sums. It
// is told to be inlined: the compiler would call it, and make its constants anew, for every group.
template <class F>
struct InParts : Stateless {
  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    constexpr int ALL = PANEL / LANES, V = T <= WIDE_TOKENS ? ALL : ALL / 2;
    for (int g = 0; g < groups; g++, weights += group_bytes(F::FORMAT), x += F::ACTIVATION_BYTES)
      for (int first = 0; first < ALL; first += V)
        F::template add_group<T, V>(weights, first, x, stride, sums + first * LANES);
  }
};

template <int T, int V>
inline void load_sums(const float *sums, __m256 (&into)[T][V]) {
  for (int t = 0; t < T; t++)
    for (int v = 0; v < V; v++) into[t][v] = _mm256_load_ps(sums + t * PANEL + v * LANES);
}

template <int T, int V>
inline void store_sums(const __m256 (&from)[T][V], float *sums) {
  for (int t = 0; t < T; t++)
    for (int v = 0; v < V; v++) _mm256_store_ps(sums + t * PANEL + v * LANES, from[t][v]);
}

// Adds a product to the sum where it lies. The compiler's own choice of multiply-add overwrites the token's number by
// turns, for which six tokens need more registers than there are.
inline __m256 add_product(__m256 a, __m256 b, __m256 sum) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

// One input of all tokens; widen(v) gives a vector of its rows. What there is less of stays in the registers: the
// tokens' numbers, or the weights.
template <int T, int V, class Widen>
inline void add_input(Widen widen, const uint8_t *x, size_t stride, __m256 (&sum)[T][V]) {
  if constexpr (T < V) {
    __m256 ones[T];
    for (int t = 0; t < T; t++) ones[t] = broadcast_float(x + t * stride);
    for (int v = 0; v < V; v++) {
      const __m256 weights = widen(v);
      for (int t = 0; t < T; t++) sum[t][v] = add_product(weights, ones[t], sum[t][v]);
    }
  } else {
    __m256 weights[V];
    for (int v = 0; v < V; v++) weights[v] = widen(v);
    for (int t = 0; t < T; t++) {
      const __m256 one = broadcast_float(x + t * stride);
      for (int v = 0; v < V; v++) sum[t][v] = add_product(weights[v], one, sum[t][v]);
    }
  }
}

struct Fp32 : InParts<Fp32> {
  static constexpr int FORMAT = ST_FP32, TOKENS = TOKENS_AT_ONCE;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(float);

  static void prepare(const float *x, void *out) { memcpy(out, x, ACTIVATION_BYTES); }

  template <int T, int V>
  [[gnu::always_inline]] static void add_group(const uint8_t *weights, int first, const uint8_t *x, size_t stride, float *sums) {
    __m256 sum[T][V];
    load_sums(sums, sum);
    for (int i = 0; i < GROUP; i++, weights += STEP_BYTES, x += sizeof(float)) {
      const uint8_t *rows = weights + 32 * first;
      fetch_ahead<V>(rows);
      add_input([&](int v) { return _mm256_castsi256_ps(load(rows + 32 * v)); }, x, stride, sum);
    }
    store_sums(sum, sums);
  }
};

struct Bf16 : InParts<Bf16> {
  static constexpr int FORMAT = ST_BF16, TOKENS = TOKENS_AT_ONCE;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(float);
  static constexpr uint32_t HIGH = 0xFFFF0000;
  alignas(32) static constexpr uint32_t HIGH_HALVES[LANES] = {HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH};

  // To the nearest, ties to the even one.
  static void prepare(const float *x, void *out) {
    for (int i = 0; i < GROUP; i += LANES) {
      const __m256i bits = load(x + i), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
      _mm256_storeu_si256(static_cast<__m256i *>(out) + i / LANES, high_half(rounded));
    }
  }

  static __m256i high_half(__m256i words) {
    return _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(HIGH)));
  }

  // The odd inputs of 8 rows. The mask lies in memory where the sums of all tokens leave no register for it.
  template <int T>
  static __m256 widen_odd(const uint8_t *rows) {
    __m256i both = load(rows);
    if constexpr (T < TOKENS)
      both = high_half(both);
    else
      asm("vpand %1, %0, %0" : "+x"(both) : "m"(HIGH_HALVES));
    return _mm256_castsi256_ps(both);
  }

  template <int T, int V>
  [[gnu::always_inline]] static void add_group(const uint8_t *weights, int first, const uint8_t *x, size_t stride, float *sums) {
    __m256 sum[T][V];
    load_sums(sums, sum);
    for (int i = 0; i < GROUP; i += 2, weights += STEP_BYTES, x += 2 * sizeof(float)) {
      const uint8_t *rows = weights + 32 * first;
      fetch_ahead<V>(rows);
      add_input([&](int v) { return _mm256_castsi256_ps(_mm256_slli_epi32(load(rows + 32 * v), 16)); }, x, stride, sum);
      asm("" : "+r"(rows));  // loads them again, for which there is time, where keeping them costs registers
      add_input([&](int v) { return widen_odd<T>(rows + 32 * v); }, x + sizeof(float), stride, sum);
    }
    store_sums(sum, sums);
  }
};

// One token's group on its int8 grid.
struct Grid {
  float scale;
  int32_t sum;
  __m256i codes[GROUP / LANES];
};

inline Grid find_grid(const float *x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
  for (int i = 0; i < GROUP; i += LANES) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  most = _mm256_max_ps(most, _mm256_setzero_ps());  // NaN does not count
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  Grid grid{_mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two))) / 127, 0, {}};
  if (!(grid.scale > 0)) return grid;
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < GROUP / LANES; i++) {
    grid.codes[i] = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + i * LANES), _mm256_set1_ps(grid.scale)));
    sum = _mm256_add_epi32(sum, grid.codes[i]);
  }
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  grid.sum = _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
  return grid;
}

// The codes of a group as the products take them. start: what the offset of the stored weights adds to the group's sum,
// taken off beforehand.
template <class Code>
struct Codes {
  float scale;
  int32_t start;
  Code codes[GROUP];
};

// Adds a group's exact sum of one token and 8 rows, times its scale.
inline void add_exact(float *sums, __m256i exact, __m256 scale) {
  _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scale, _mm256_load_ps(sums)));
}

struct Int8 : InParts<Int8> {
  using Token = Codes<int16_t>;
  static constexpr int FORMAT = ST_INT8, TOKENS = TOKENS_AT_ONCE;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Token);

  // A step's codes in the order 0, 2, 1, 3. Products of 8 bits by 8 saturate in 16 for weights as large as these; those
  // of 16 by 16 do not, and the weights' bytes are widened by taking the even and the odd ones apart.
  static void prepare(const float *x, void *out) {
    const Grid grid = find_grid(x);
    Token token{grid.scale, -INT8_OFFSET * grid.sum, {}};
    for (int i = 0; i < GROUP / LANES; i++) {
      const __m256i narrow = _mm256_packs_epi32(grid.codes[i], grid.codes[i]);
      const __m256i ordered = _mm256_permute4x64_epi64(_mm256_shufflelo_epi16(narrow, 0xD8), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(token.codes + i * LANES), _mm256_castsi256_si128(ordered));
    }
    memcpy(out, &token, sizeof token);
  }

  template <int T, int V>
  [[gnu::always_inline]] static void add_group(const uint8_t *weights, int first, const uint8_t *x, size_t stride, float *sums) {
    __m256i exact[T][V], even[V], odd[V];
    for (int t = 0; t < T; t++)
      for (int v = 0; v < V; v++) exact[t][v] = broadcast(x + t * stride + offsetof(Token, start));
    const uint8_t *codes = x + offsetof(Token, codes);
#pragma GCC unroll 1  // steps taken together are more than the registers hold
    for (int step = 0; step < 8; step++, weights += STEP_BYTES, codes += 4 * sizeof(int16_t)) {
      fetch_ahead<V>(weights + 32 * first);
      for (int v = 0; v < V; v++) {
        const __m256i both = load(weights + 32 * (first + v));
        even[v] = _mm256_and_si256(both, _mm256_set1_epi16(0xFF));
        odd[v] = _mm256_srli_epi16(both, 8);
      }
      for (int t = 0; t < T; t++) {
        const uint8_t *four = codes + t * stride;
        const __m256i two = broadcast(four), other = broadcast(four + 2 * sizeof(int16_t));
        for (int v = 0; v < V; v++) {
          const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even[v], two), _mm256_madd_epi16(odd[v], other));
          exact[t][v] = _mm256_add_epi32(exact[t][v], sum);
        }
      }
    }
    for (int t = 0; t < T; t++)
      for (int v = 0; v < V; v++)
        add_exact(sums + t * PANEL + v * LANES, exact[t][v], broadcast_float(x + t * stride));
  }
};

struct Int4 : InParts<Int4> {
  using Token = Codes<int8_t>;
  static constexpr int FORMAT = ST_INT4, TOKENS = TOKENS_AT_ONCE;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Token);

  static void prepare(const float *x, void *out) {
    const Grid grid = find_grid(x);
    const __m256i low = _mm256_packs_epi32(grid.codes[0], grid.codes[1]);
    const __m256i high = _mm256_packs_epi32(grid.codes[2], grid.codes[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves of a vector
    auto &token = *static_cast<Token *>(out);
    token.scale = grid.scale;
    token.start = -INT4_OFFSET * grid.sum;
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(token.codes),
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
  }

  static __m256 widen(const uint8_t *bf16) {
    const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bf16)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
  }

  // One step of 4 inputs, two sums of 16 bits a row: a group's 8 steps add up to 8 * 2 * 15 * 127 at most, which fits.
  template <int T, int V>
  static void add_step(const __m256i (&weights)[V], const uint8_t *codes, size_t stride, __m256i (&exact)[T][V]) {
    static_assert(8 * 2 * 15 * 127 <= INT16_MAX);
    for (int t = 0; t < T; t++) {
      const __m256i four = broadcast(codes + t * stride);
      for (int v = 0; v < V; v++) exact[t][v] = _mm256_add_epi16(exact[t][v], _mm256_maddubs_epi16(weights[v], four));
    }
  }

  template <int T, int V>
  [[gnu::always_inline]] static void add_group(const uint8_t *weights, int first, const uint8_t *x, size_t stride, float *sums) {
    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i exact[T][V] = {}, even[V], odd[V];
    const uint8_t *step = weights + INT4_SCALE_BYTES, *codes = x + offsetof(Token, codes);
#pragma GCC unroll 1
    for (int pair = 0; pair < 4; pair++, step += STEP_BYTES, codes += 8) {
      fetch_ahead<V>(step + 32 * first);
      for (int v = 0; v < V; v++) {
        const __m256i both = load(step + 32 * (first + v));
        even[v] = _mm256_and_si256(both, low_half);
        odd[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
      }
      add_step(even, codes, stride, exact);
      add_step(odd, codes + 4, stride, exact);
    }
    for (int v = 0; v < V; v++) {
      const __m256 scales = widen(weights + 2 * LANES * (first + v));
      for (int t = 0; t < T; t++) {
        const __m256i start = broadcast(x + t * stride + offsetof(Token, start));
        const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(exact[t][v], _mm256_set1_epi16(1)), start);
        add_exact(sums + t * PANEL + v * LANES, sum, _mm256_mul_ps(scales, broadcast_float(x + t * stride)));
      }
    }
  }
};

}  // namespace

extern const Kernels AVX2;
const Kernels AVX2 = make_kernels<Fp32, Bf16, Int8, Int4>("avx2");

}  // namespace strace
