// The functions of vectors.h, once per instruction set: a file *_avx512.cpp and the like names its table in
// STRACE_VECTORS and includes this.
//
// All is in an unnamed namespace and takes nothing from the standard library's templates: of a function that two
// instruction sets both compile, the linker would keep one, and a lesser machine could meet the wrong one.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "vectors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace strace {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

typedef float Native __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integer __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH)));
// In memory, at any address. (A copy of several registers at once by memcpy goes through the stack with GCC 12.)
typedef float Loose __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

// 16 numbers, in as many registers as the machine needs for them.
struct Float {
  Native part[PARTS];
};

#define STRACE_EACH(expression)                     \
  Float r;                                          \
  for (int i = 0; i < PARTS; ++i) r.part[i] = expression; \
  return r

inline Native fused(Native a, Native b, Native c) {
#if defined(__AVX512F__)
  return (Native)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Native)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Native spread(float x) { return x - Native{}; }
inline Float set(float x) { STRACE_EACH(spread(x)); }
inline Float operator+(Float a, Float b) { STRACE_EACH(a.part[i] + b.part[i]); }
inline Float operator-(Float a, Float b) { STRACE_EACH(a.part[i] - b.part[i]); }
inline Float operator*(Float a, Float b) { STRACE_EACH(a.part[i] * b.part[i]); }
inline Float operator/(Float a, Float b) { STRACE_EACH(a.part[i] / b.part[i]); }
inline Float fma(Float a, Float b, Float c) { STRACE_EACH(fused(a.part[i], b.part[i], c.part[i])); }
inline Float larger(Float a, Float b) { STRACE_EACH(a.part[i] > b.part[i] ? a.part[i] : b.part[i]); }
// yes where a < b, else no.
inline Float choose_less(Float a, Float b, Float yes, Float no) {
  STRACE_EACH(a.part[i] < b.part[i] ? yes.part[i] : no.part[i]);
}

inline Float load(const float *x) { STRACE_EACH(reinterpret_cast<const Loose *>(x)[i]); }

inline void store(Float x, float *y) {
  for (int i = 0; i < PARTS; ++i) reinterpret_cast<Loose *>(y)[i] = x.part[i];
}

inline Float load(const uint16_t *x) {
  Float r;
#if defined(__AVX512F__)
  // GCC 12 takes the vector apart in the loop below, and puts it together again.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
  r.part[0] = (Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
  for (int i = 0; i < PARTS; ++i) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i * WIDTH));
    r.part[i] = (Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
  }
#else
  for (int i = 0; i < PARTS; ++i) {
    Half half;
    std::memcpy(&half, x + i * WIDTH, sizeof half);
    r.part[i] = (Native)(__builtin_convertvector(half, Integer) << 16);
  }
#endif
  return r;
}

// The first `count` numbers, zeros after them.
template <class T>
inline Float load_some(const T *x, int count) {
  T all[LANES] = {};
  std::memcpy(all, x, count * sizeof(T));
  return load(all);
}

inline void store_some(Float x, float *y, int count) {
  float all[LANES];
  store(x, all);
  std::memcpy(y, all, count * sizeof(float));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m128 low_half(Native x) { return _mm256_castps256_ps128((__m256)x); }
inline __m128 high_half(Native x) { return _mm256_extractf128_ps((__m256)x, 1); }
#endif

inline float sum(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x.part[0]);
#elif defined(__AVX2__)
  const Native eight = x.part[0] + x.part[1];
  const __m128 four = low_half(eight) + high_half(eight), two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
#else
  float all[LANES];
  store(x, all);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) all[i] += all[i + step];
  return all[0];
#endif
}

inline float largest(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x.part[0]);
#elif defined(__AVX2__)
  const __m256 eight = _mm256_max_ps((__m256)x.part[0], (__m256)x.part[1]);
  const __m128 four = _mm_max_ps(low_half((Native)eight), high_half((Native)eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return two[0] > two[1] ? two[0] : two[1];
#else
  float all[LANES];
  store(x, all);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) all[i] = all[i] > all[i + step] ? all[i] : all[i + step];
  return all[0];
#endif
}

// y[i] = f(x[i]).
template <class Function>
inline void map(int size, const float *x, float *y, Function f) {
  int i = 0;
  for (; i + LANES <= size; i += LANES) store(f(load(x + i), i), y + i);
  if (i < size) store_some(f(load_some(x + i, size - i), i), y + i, size - i);
}

// The sum of f(x[i]), where f(0) is 0.
template <class Function>
inline float total(int size, const float *x, Function f) {
  Float sums[4] = {set(0), set(0), set(0), set(0)};
  int i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + f(load(x + i + j * LANES));
  for (; i + LANES <= size; i += LANES) sums[0] = sums[0] + f(load(x + i));
  if (i < size) sums[1] = sums[1] + f(load_some(x + i, size - i));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// e^x to 1e-7 of itself; 0 below the least normal number, never more than the greatest.
inline Native exponential(Native x) {
  const Native low = spread(-87.33654f), bounded = x > low ? x : low;
  const Native upper = spread(88.37626f), y = bounded < upper ? bounded : upper;
  const Native magic = spread(12582912.0f);  // 1.5 * 2^23: added, it leaves the nearest integer in the low bits
  const Native shifted = fused(y, spread(1.44269504f), magic), n = shifted - magic;
  Native r = fused(n, spread(-0.693359375f), y);
  r = fused(n, spread(2.12194440e-4f), r);
  Native p = spread(1.9875691500e-4f);
  p = fused(p, r, spread(1.3981999507e-3f));
  p = fused(p, r, spread(8.3334519073e-3f));
  p = fused(p, r, spread(4.1665795894e-2f));
  p = fused(p, r, spread(1.6666665459e-1f));
  p = fused(p, r, spread(5.0000001201e-1f));
  p = fused(p * r, r, r) + spread(1.0f);
  p = (Native)((Integer)p + ((Integer)shifted << 23));
  return x < low ? spread(0) : p;
}

inline Float exponential(Float x) { STRACE_EACH(exponential(x.part[i])); }

inline float exponential(float x) { return exponential(spread(x))[0]; }

// Within 1e-7.
inline Float hyperbolic_tangent(Float x) {
  const Float one = set(1);
  return one - set(2) / (exponential(x + x) + one);
}

// Within 2e-7: Abramowitz and Stegun 7.1.26.
inline Float error_function(Float x) {
  const Float one = set(1), size = larger(x, set(0) - x), t = one / fma(size, set(0.3275911f), one);
  Float p = set(1.061405429f);
  p = fma(p, t, set(-1.453152027f));
  p = fma(p, t, set(1.421413741f));
  p = fma(p, t, set(-0.284496736f));
  p = fma(p, t, set(0.254829592f));
  const Float r = one - p * t * exponential(set(0) - size * size);
  return choose_less(x, set(0), set(0) - r, r);
}

inline Float silu(Float x) { return x / (set(1) + exponential(set(0) - x)); }

inline Float gelu(Float x) { return set(0.5f) * x * (set(1) + error_function(x * set(0.70710678f))); }

inline Float gelu_tanh(Float x) {
  const Float inner = set(0.79788456f) * fma(x * x * x, set(0.044715f), x);
  return set(0.5f) * x * (set(1) + hyperbolic_tangent(inner));
}

void normalise(const st_norm &norm, float eps, const float *x, float *y) {
  const int size = norm.size;
  const float mean = norm.kind == ST_LAYER ? total(size, x, [](Float v) { return v; }) / size : 0;
  float variance = 0;
  if (norm.kind == ST_RMS) {
    variance = total(size, x, [](Float v) { return v * v; }) / size;
  } else {
    // The padding of the last vector would count as numbers that are 0: it is given the mean instead.
    Float sums = set(0);
    for (int i = 0; i < size; i += LANES) {
      const int count = size - i < LANES ? size - i : LANES;
      float part[LANES];
      store(set(mean), part);
      std::memcpy(part, x + i, count * sizeof(float));
      const Float away = load(part) - set(mean);
      sums = fma(away, away, sums);
    }
    variance = sum(sums) / size;
  }
  const float scale = 1 / sqrtf(variance + eps);
  for (int i = 0; i < size; ++i) y[i] = (x[i] - mean) * scale * norm.weight[i];
  if (norm.bias)
    for (int i = 0; i < size; ++i) y[i] += norm.bias[i];
}

void rotate(const float *cos, const float *signed_sin, int rotary_dim, float *x) {
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] + b * signed_sin[i];
    x[i + half] = b * cos[i + half] + a * signed_sin[i + half];
  }
}

template <class Function>
inline void activate_with(bool gated, int neurons, const float *inner, float *y, Function f) {
  map(neurons, inner, y, [&](Float x, int) { return f(x); });
  if (gated)
    for (int i = 0; i < neurons; ++i) y[i] *= inner[neurons + i];
}

// Lambdas, which are compiled into the loop: functions would be called through a pointer, their numbers in memory.
void activate(int activation, bool gated, int neurons, const float *inner, float *y) {
  if (activation == ST_SILU) return activate_with(gated, neurons, inner, y, [](Float x) { return silu(x); });
  if (activation == ST_GELU) return activate_with(gated, neurons, inner, y, [](Float x) { return gelu(x); });
  activate_with(gated, neurons, inner, y, [](Float x) { return gelu_tanh(x); });
}

void add(int size, const float *part, float *stream) {
  for (int i = 0; i < size; ++i) stream[i] += part[i];
}

inline Float capped(float cap, Float x) { return set(cap) * hyperbolic_tangent(x / set(cap)); }

void cap(float cap, int size, float *x) {
  map(size, x, x, [&](Float v, int) { return capped(cap, v); });
}

void store_row(int format, int size, const float *from, void *to) {
  if (format == ST_FP32) {
    std::memcpy(to, from, size * sizeof(float));
    return;
  }
  uint16_t *halves = static_cast<uint16_t *>(to);
  for (int i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to even
    halves[i] = from[i] == from[i] ? rounded : 0x7fc0;
  }
}

#if defined(__AVX512F__)
// Neighbours STEP apart are added: those of a go to the lanes where bit STEP of the number is 0, those of b to the others.
template <int STEP>
inline Float fold(Float a, Float b) {
  alignas(64) int32_t first[LANES], second[LANES];
  for (int i = 0; i < LANES; ++i) {
    first[i] = (i & STEP ? LANES : 0) + (i & ~STEP);
    second[i] = first[i] + STEP;
  }
  const __m512 x = (__m512)a.part[0], y = (__m512)b.part[0];
  return {{(Native)_mm512_add_ps(_mm512_permutex2var_ps(x, _mm512_load_si512(first), y),
                                 _mm512_permutex2var_ps(x, _mm512_load_si512(second), y))}};
}
#endif

// The sums of four vectors: in lanes of their own, or with AVX-512 on the way there.
#if defined(__AVX512F__)
using Four = Float;
#else
typedef float Four __attribute__((vector_size(16)));
#endif

inline Four sum_four(Native a, Native b, Native c, Native d) {
#if defined(__AVX512F__)
  return fold<2>(fold<1>({{a}}, {{b}}), fold<1>({{c}}, {{d}}));
#elif defined(__AVX2__)
  const Native pairs = (Native)_mm256_hadd_ps((__m256)a, (__m256)b), others = (Native)_mm256_hadd_ps((__m256)c, (__m256)d);
  const Native halves = (Native)_mm256_hadd_ps((__m256)pairs, (__m256)others);
  return (Four)(low_half(halves) + high_half(halves));
#else
  const auto sum = [](Native x) { return (x[0] + x[2]) + (x[1] + x[3]); };
  return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// As many sums as a register holds, in order, and so stored that it can be read again at once.
constexpr int FOURS = WIDTH / 4;

inline void store_sums(const Four (&fours)[FOURS], float *sums) {
#if defined(__AVX512F__)
  store(fold<8>(fold<4>(fours[0], fours[1]), fold<4>(fours[2], fours[3])), sums);
#elif defined(__AVX2__)
  _mm256_storeu_ps(sums, _mm256_set_m128((__m128)fours[1], (__m128)fours[0]));
#else
  std::memcpy(sums, fours, sizeof fours);
#endif
}

// So many numbers of so many heads at once that their sums fit the registers.
constexpr int MIXED = PARTS == 1 ? 4 : 2, MOST_HEADS = PARTS == 1 ? 4 : 2;

// Q query heads of one token; they read the same positions.
template <int Q>
struct Queries {
  const float *queries[Q];
  float *mixed[Q];
  float scores[Q][BLOCK];
};

// Every query against the 16 keys from `keys` on, `size` numbers each.
template <int Q, class T>
inline void score(Queries<Q> &at, const T *keys, int size, int place) {
  Four fours[Q][FOURS];
  for (int key = 0; key < LANES; key += WIDTH) {
#pragma GCC unroll 4
    for (int four = 0; four < FOURS; ++four) {
      Native sums[4][Q] = {};
      for (int i = 0; i < size; i += LANES) {
        Float query[Q];
        for (int q = 0; q < Q; ++q) query[q] = load(at.queries[q] + i);
        for (int p = 0; p < 4; ++p) {
          const Float numbers = load(keys + (key + four * 4 + p) * size + i);
          for (int q = 0; q < Q; ++q)
            for (int part = 0; part < PARTS; ++part)
              sums[p][q] = fused(query[q].part[part], numbers.part[part], sums[p][q]);
        }
      }
      for (int q = 0; q < Q; ++q) fours[q][four] = sum_four(sums[0][q], sums[1][q], sums[2][q], sums[3][q]);
    }
    for (int q = 0; q < Q; ++q) store_sums(fours[q], at.scores[q] + place + key);
  }
}

// Adds the values of positions [first, last), weighted, to COUNT vectors of what was mixed before.
template <int COUNT, int Q, class T>
inline void mix(Queries<Q> &at, const float *decays, int first, int last, const T *values, int size, int i) {
  Float sums[Q][COUNT];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < COUNT; ++v) sums[q][v] = load(at.mixed[q] + i + v * LANES) * set(decays[q]);
  for (int p = first; p < last; ++p)
    for (int v = 0; v < COUNT; ++v) {
      const Float value = load(values + p * size + i + v * LANES);
      for (int q = 0; q < Q; ++q) sums[q][v] = fma(set(at.scores[q][p]), value, sums[q][v]);
    }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < COUNT; ++v) store(sums[q][v], at.mixed[q] + i + v * LANES);
}

// Scores become weights under the greatest score so far. Gives what earlier sums count less by.
inline float weigh_scores(float *scores, int first, int last, float cap, float &most, float &weight) {
  Float highest = set(-FLT_MAX), sums = set(0);
  for (int half = 0; half < BLOCK; half += LANES) {
    if (last <= half || first >= half + LANES) continue;
    if (cap != 0) store(capped(cap, load(scores + half)), scores + half);
    if (first > half || last < half + LANES)
      for (int p = half; p < half + LANES; ++p)
        if (p < first || p >= last) scores[p] = -FLT_MAX;
    highest = larger(highest, load(scores + half));
  }
  const float now = largest(highest), next = now > most ? now : most;
  const float decay = exponential(most - next);  // 1 where it stays; a branch would be guessed wrong too often
  for (int half = 0; half < BLOCK; half += LANES) {
    if (last <= half || first >= half + LANES) continue;
    const Float weights = exponential(load(scores + half) - set(next));
    store(weights, scores + half);
    sums = sums + weights;
  }
  weight = weight * decay + sum(sums);
  most = next;
  return decay;
}

// Softmax over the positions [first, last) of a block, carried on from those before.
template <int Q, class T>
inline void attend_block(const float *queries, int pitch, float *mixed, size_t stride, float cap, const T *keys,
                         const T *values, int size, int first, int last) {
  Queries<Q> at;
  float decays[Q];
  for (int q = 0; q < Q; ++q) at.queries[q] = queries + q * pitch, at.mixed[q] = mixed + q * stride;
  for (int half = 0; half < BLOCK; half += LANES)
    if (last > half && first < half + LANES) score(at, keys + half * size, size, half);
  for (int q = 0; q < Q; ++q) {
    float *sums = at.mixed[q] + pitch;
    decays[q] = weigh_scores(at.scores[q], first, last, cap, sums[0], sums[1]);
  }
  int i = 0;
  for (; i + MIXED * LANES <= size; i += MIXED * LANES) mix<MIXED>(at, decays, first, last, values, size, i);
  for (; i < size; i += LANES) mix<1>(at, decays, first, last, values, size, i);
}

// All heads of one token over a block.
template <class T>
inline void attend_heads(const Span &span, const float *queries, float *mixed, const T *keys, const T *values, int size,
                         int first, int last) {
  const int pitch = padded(span.head_dim);
  for (int h = 0; h < span.heads;) {
    const auto run = [&](auto attend, int heads) {
      attend(queries + h * pitch, pitch, mixed + h * span.head_stride, span.head_stride, span.cap, keys, values, size,
             first, last);
      h += heads;
    };
    switch (span.heads - h < MOST_HEADS ? span.heads - h : MOST_HEADS) {
      case 1: run(attend_block<1, T>, 1); break;
      case 2: run(attend_block<2, T>, 2); break;
      case 3: run(attend_block<3, T>, 3); break;
      default: run(attend_block<4, T>, 4);
    }
  }
}

// One block's entries of a head as float32, [BLOCK, padded(head_dim)].
inline void expand(int format, const char *block, int first, int last, int head_dim, float *out) {
  const auto expand_rows = [&](const auto *rows) {
    const int pitch = padded(head_dim);
    for (int p = first; p < last; ++p)
      for (int i = 0; i < head_dim; i += LANES) {
        const int count = head_dim - i < LANES ? head_dim - i : LANES;
        const auto *from = rows + p * head_dim + i;
        store(count == LANES ? load(from) : load_some(from, count), out + p * pitch + i);
      }
  };
  if (format == ST_BF16) return expand_rows(reinterpret_cast<const uint16_t *>(block));
  expand_rows(reinterpret_cast<const float *>(block));
}

// The positions of the block from `base` on that token t reads in this span; none where first is not below last.
struct Positions {
  int first, last;
};

inline Positions positions_of(const Span &span, int t, int base) {
  const int position = span.start + t, from = span.window ? position - span.window + 1 : 0;
  const int first = (from > span.first ? from : span.first) - base;
  const int last = (position + 1 < span.last ? position + 1 : span.last) - base;
  return {first > 0 ? first : 0, last < BLOCK ? last : BLOCK};
}

template <class T>
inline void attend_tokens(const Span &span, int base, const T *keys, const T *values, int size) {
  for (int t = 0; t < span.tokens; ++t) {
    const Positions at = positions_of(span, t, base);
    if (at.first < at.last)
      attend_heads(span, span.queries + t * span.heads * padded(span.head_dim), span.mixed + t * span.token_stride, keys,
                   values, size, at.first, at.last);
  }
}

void start_mixing(const Span &span) {
  const int pitch = padded(span.head_dim);
  for (int t = 0; t < span.tokens; ++t)
    for (int h = 0; h < span.heads; ++h) {
      float *mixed = span.mixed + t * span.token_stride + h * span.head_stride;
      std::memset(mixed, 0, (pitch + 2) * sizeof(float));
      mixed[pitch] = -FLT_MAX;
    }
}

// Where the entries of the block from `base` on begin.
inline size_t place_of(const Span &span, int base) { return span.table[base / BLOCK] * span.block_bytes; }

// A block lies anywhere, so the processor does not know where the next one is.
inline void fetch_block(const Span &span, int base) {
  const size_t place = place_of(span, base), bytes = BLOCK * span.head_dim * entry_bytes(span.format);
  for (size_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char *>(span.keys) + place + line);
    __builtin_prefetch(static_cast<const char *>(span.values) + place + line);
  }
}

void attend(const Span &span) {
  start_mixing(span);
  const int size = span.head_dim, pitch = padded(size), end = span.start + span.tokens;
  const int first = span.window && span.start - span.window + 1 > span.first ? span.start - span.window + 1 : span.first;
  const int last = end < span.last ? end : span.last;
  // Entries that few queries read are widened on the way; for more it is done once.
  const bool as_stored = size == pitch && (span.format == ST_FP32 || span.tokens * span.heads <= 4);
  for (int base = first / BLOCK * BLOCK; base < last; base += BLOCK) {
    if (base + BLOCK < last) fetch_block(span, base + BLOCK);
    const size_t place = place_of(span, base);
    const char *keys = static_cast<const char *>(span.keys) + place;
    const char *values = static_cast<const char *>(span.values) + place;
    if (as_stored && span.format == ST_FP32) {
      attend_tokens(span, base, reinterpret_cast<const float *>(keys), reinterpret_cast<const float *>(values), size);
    } else if (as_stored) {
      attend_tokens(span, base, reinterpret_cast<const uint16_t *>(keys), reinterpret_cast<const uint16_t *>(values), size);
    } else {
      alignas(64) float wide_keys[BLOCK * MOST_HEAD_DIM], wide_values[BLOCK * MOST_HEAD_DIM];
      const int count = last - base < BLOCK ? last - base : BLOCK;
      expand(span.format, keys, 0, BLOCK, size, wide_keys);
      expand(span.format, values, 0, count, size, wide_values);
      attend_tokens(span, base, wide_keys, wide_values, pitch);
    }
  }
}

void merge(int spans, size_t stride, int head_dim, const float *mixed, float *z) {
  const int pitch = padded(head_dim);
  float most = -FLT_MAX, weight = 0;
  for (int s = 0; s < spans; ++s) most = mixed[s * stride + pitch] > most ? mixed[s * stride + pitch] : most;
  for (int i = 0; i < head_dim; ++i) z[i] = 0;
  for (int s = 0; s < spans; ++s) {
    const float *part = mixed + s * stride;
    const float share = exponential(part[pitch] - most);
    weight += share * part[pitch + 1];
    for (int i = 0; i < head_dim; ++i) z[i] += share * part[i];
  }
  for (int i = 0; i < head_dim; ++i) z[i] /= weight;
}

float greatest(const float *x, int count) {
  Float most[4];
  for (Float &each : most) each = set(-__builtin_inff());
  int i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) most[j] = larger(load(x + i + j * LANES), most[j]);
  for (; i + LANES <= count; i += LANES) most[0] = larger(load(x + i), most[0]);
  float found = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  for (; i < count; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

double sum_doubles(const float *x, int count) {
  double lanes[LANES] = {};
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += x[i + l];
  for (; i < count; ++i) lanes[0] += x[i];
  double whole = 0;
  for (double lane : lanes) whole += lane;
  return whole;
}

void weigh(int size, float most, float temperature, const float *x, float *weights) {
  if (temperature == 1) return map(size, x, weights, [&](Float v, int) { return exponential(v - set(most)); });
  map(size, x, weights, [&](Float v, int) { return exponential((v - set(most)) / set(temperature)); });
}

st_summary summarise(const float *logits, int count) {
  int best = 0;
  float second = -FLT_MAX;
  for (int i = 1; i < count; ++i) {
    if (logits[i] > logits[best]) {
      second = logits[best];
      best = i;
    } else if (logits[i] > second) {
      second = logits[i];
    }
  }
  const Float most = set(logits[best]);
  Float weights = set(0), moments = set(0);
  for (int i = 0; i < count; i += LANES) {
    const int there = count - i < LANES ? count - i : LANES;
    float part[LANES];
    store(most - set(200), part);  // weighs nothing
    std::memcpy(part, logits + i, there * sizeof(float));
    const Float below = load(part) - most, weight = exponential(below);
    weights = weights + weight;
    moments = moments + weight * larger(below, set(-200));  // a logit of -inf weighs 0, not NaN
  }
  const float whole = sum(weights);
  return {best, 1 / whole, logits[best] - second, logf(whole) - sum(moments) / whole};
}

int32_t read(const void *memory, size_t bytes) {
  constexpr int CHAINS = 8;  // so that none waits for its last number
  Integer chains[CHAINS] = {};
  const auto *from = static_cast<const char *>(memory);
  for (size_t i = 0; i < bytes; i += sizeof chains)
    for (int j = 0; j < CHAINS; ++j) {
      Integer numbers;
      std::memcpy(&numbers, from + i + j * sizeof numbers, sizeof numbers);
      chains[j] ^= numbers;
    }
  for (int j = 1; j < CHAINS; ++j) chains[0] ^= chains[j];
  int32_t all = 0;
  for (int k = 0; k < WIDTH; ++k) all ^= chains[0][k];
  return all;
}

}  // namespace

extern const Vectors STRACE_VECTORS;
const Vectors STRACE_VECTORS = {normalise, rotate, activate,    add,   cap,       store_row, attend,
                                merge,     greatest, sum_doubles, weigh, summarise, read};

}  // namespace strace
