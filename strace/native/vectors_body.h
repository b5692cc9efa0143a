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
constexpr int MOST_VECTORS = MOST_HEAD_DIM / LANES;

typedef float Native __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integer __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH)));

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

inline Float set(float x) { STRACE_EACH(x - Native{}); }
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

inline Float load(const float *x) {
  Float r;
  std::memcpy(&r, x, sizeof r);
  return r;
}

inline void store(Float x, float *y) { std::memcpy(y, &x, sizeof x); }

inline Float load(const uint16_t *x) {
  Float r;
  for (int i = 0; i < PARTS; ++i) {
    Half half;
    std::memcpy(&half, x + i * WIDTH, sizeof half);
    r.part[i] = (Native)(__builtin_convertvector(half, Integer) << 16);
  }
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

inline float sum(Float x) {
  float all[LANES];
  store(x, all);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) all[i] += all[i + step];
  return all[0];
}

inline float largest(Float x) {
  float all[LANES];
  store(x, all);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) all[i] = all[i] > all[i + step] ? all[i] : all[i + step];
  return all[0];
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
inline Float exponential(Float x) {
  const Float low = set(-87.33654f), bounded = larger(x, low);
  const Float upper = set(88.37626f), y = choose_less(bounded, upper, bounded, upper);
  const Float magic = set(12582912.0f);  // 1.5 * 2^23: added, it leaves the nearest integer in the low bits
  const Float shifted = fma(y, set(1.44269504f), magic), n = shifted - magic;
  Float r = fma(n, set(-0.693359375f), y);
  r = fma(n, set(2.12194440e-4f), r);
  Float p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p * r, r, r) + set(1.0f);
  for (int i = 0; i < PARTS; ++i) p.part[i] = (Native)((Integer)p.part[i] + ((Integer)shifted.part[i] << 23));
  return choose_less(x, low, set(0), p);
}

inline float exponential(float x) { return exponential(set(x)).part[0][0]; }

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

void activate(int activation, bool gated, int neurons, const float *inner, float *y) {
  if (activation == ST_SILU) return activate_with(gated, neurons, inner, y, silu);
  if (activation == ST_GELU) return activate_with(gated, neurons, inner, y, gelu);
  activate_with(gated, neurons, inner, y, gelu_tanh);
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

// One block's entries of a head as float32, [BLOCK, padded(head_dim)].
template <class T>
inline void expand(const void *block, int first, int last, int head_dim, float *out) {
  const int pitch = padded(head_dim);
  for (int p = first; p < last; ++p) {
    const T *row = static_cast<const T *>(block) + p * head_dim;
    int i = 0;
    for (; i + LANES <= head_dim; i += LANES) store(load(row + i), out + p * pitch + i);
    if (i < head_dim) store(load_some(row + i, head_dim - i), out + p * pitch + i);
  }
}

#if defined(__AVX512F__)
// Two vectors whose neighbours, STEP apart, are added: lanes of a where bit STEP is 0, of b where it is 1.
template <int STEP>
inline __m512 fold(__m512 a, __m512 b) {
  const auto lane = [](int i, int bit) { return (i & STEP ? 16 : 0) + (i & ~STEP) + bit; };
#define STRACE_LANES(bit)                                                                                            \
  _mm512_setr_epi32(lane(0, bit), lane(1, bit), lane(2, bit), lane(3, bit), lane(4, bit), lane(5, bit), lane(6, bit), \
                    lane(7, bit), lane(8, bit), lane(9, bit), lane(10, bit), lane(11, bit), lane(12, bit),           \
                    lane(13, bit), lane(14, bit), lane(15, bit))
  return _mm512_add_ps(_mm512_permutex2var_ps(a, STRACE_LANES(0), b), _mm512_permutex2var_ps(a, STRACE_LANES(STEP), b));
#undef STRACE_LANES
}
#endif

// The sums of 16 vectors, one in each lane; `vector(i)` gives them.
template <class Vector>
inline Float sums_of(Vector vector) {
#if defined(__AVX512F__)
  const auto fold1 = [&](int i) { return fold<1>((__m512)vector(i).part[0], (__m512)vector(i + 1).part[0]); };
  const auto fold2 = [&](int i) { return fold<2>(fold1(i), fold1(i + 2)); };
  const auto fold4 = [&](int i) { return fold<4>(fold2(i), fold2(i + 4)); };
  return Float{{(Native)fold<8>(fold4(0), fold4(8))}};
#else
  float all[LANES];
  for (int i = 0; i < LANES; ++i) {
    const Float x = vector(i);
    Native folded = x.part[0];
    for (int j = 1; j < PARTS; ++j) folded += x.part[j];
    float lanes[WIDTH];
    std::memcpy(lanes, &folded, sizeof lanes);
    for (int step = WIDTH / 2; step; step /= 2)
      for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
    all[i] = lanes[0];
  }
  return load(all);
#endif
}

// One query against the 16 keys from `keys` on.
inline Float score(const float *query, const float *keys, int vectors) {
  const int pitch = vectors * LANES;
  return sums_of([&](int i) {
    const float *key = keys + i * pitch;
    Float r = load(query) * load(key);
    for (int v = 1; v < vectors; ++v) r = fma(load(query + v * LANES), load(key + v * LANES), r);
    return r;
  });
}

// mixed = mixed * decay + the values of positions [first, last), weighted.
template <int COUNT>
inline void mix_vectors(const float *weights, int first, int last, const float *values, int pitch, float decay,
                        float *mixed) {
  Float sums[COUNT];
  for (int v = 0; v < COUNT; ++v) sums[v] = load(mixed + v * LANES) * set(decay);
  for (int p = first; p < last; ++p) {
    const Float weight = set(weights[p]);
    for (int v = 0; v < COUNT; ++v) sums[v] = fma(weight, load(values + p * pitch + v * LANES), sums[v]);
  }
  for (int v = 0; v < COUNT; ++v) store(sums[v], mixed + v * LANES);
}

// One query over the positions [first, last) of a block: softmax so far, carried on.
void attend_block(const Span &span, const float *query, const float *keys, const float *values, int first, int last,
                  float *mixed) {
  const int pitch = padded(span.head_dim), vectors = pitch / LANES;
  float scores[BLOCK];
  float &most = mixed[pitch], &weight = mixed[pitch + 1];
  Float highest = set(-FLT_MAX);
  for (int half = 0; half < BLOCK; half += LANES) {
    if (last <= half || first >= half + LANES) continue;
    Float s = score(query, keys + half * pitch, vectors);
    if (span.cap != 0) s = capped(span.cap, s);
    store(s, scores + half);
    if (first > half || last < half + LANES)
      for (int p = half; p < half + LANES; ++p)
        if (p < first || p >= last) scores[p] = -FLT_MAX;
    highest = larger(highest, load(scores + half));
  }
  const float now = largest(highest), next = now > most ? now : most;
  const float decay = exponential(most - next);
  Float sums = set(0);
  for (int half = 0; half < BLOCK; half += LANES) {
    if (last <= half || first >= half + LANES) continue;
    const Float w = exponential(load(scores + half) - set(next));
    store(w, scores + half);
    sums = sums + w;
  }
  weight = weight * decay + sum(sums);
  most = next;
  int v = 0;
  for (; v + 4 <= vectors; v += 4)
    mix_vectors<4>(scores, first, last, values + v * LANES, pitch, decay, mixed + v * LANES);
  for (; v < vectors; ++v) mix_vectors<1>(scores, first, last, values + v * LANES, pitch, decay, mixed + v * LANES);
}

void attend(const Span &span) {
  const int pitch = padded(span.head_dim);
  alignas(64) float keys[BLOCK * MOST_HEAD_DIM], values[BLOCK * MOST_HEAD_DIM];
  std::memset(keys, 0, BLOCK * pitch * sizeof(float));
  for (int t = 0; t < span.tokens; ++t)
    for (int h = 0; h < span.heads; ++h) {
      float *mixed = span.mixed + t * span.token_stride + h * span.head_stride;
      std::memset(mixed, 0, (pitch + 2) * sizeof(float));
      mixed[pitch] = -FLT_MAX;
    }
  const auto first_of = [&](int position) {
    const int from = span.window ? position - span.window + 1 : 0;
    return from > span.first ? from : span.first;
  };
  const auto least = [](int a, int b) { return a < b ? a : b; };
  const int first = first_of(span.start), last = least(span.last, span.start + span.tokens);
  for (int base = first / BLOCK * BLOCK; base < last; base += BLOCK) {
    const int from = base > first ? 0 : first - base, to = least(BLOCK, last - base);
    const size_t place = span.table[base / BLOCK] * span.block_bytes;
    const char *key_block = static_cast<const char *>(span.keys) + place;
    const char *value_block = static_cast<const char *>(span.values) + place;
    const auto read = span.format == ST_BF16 ? expand<uint16_t> : expand<float>;
    read(key_block, from, to, span.head_dim, keys);
    read(value_block, from, to, span.head_dim, values);
    for (int t = 0; t < span.tokens; ++t) {
      const int position = span.start + t, begin = first_of(position) - base, end = least(to, position + 1 - base);
      if (begin >= end) continue;
      for (int h = 0; h < span.heads; ++h)
        attend_block(span, span.queries + (t * span.heads + h) * pitch, keys, values, begin > 0 ? begin : 0, end,
                     span.mixed + t * span.token_stride + h * span.head_stride);
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

void weigh(int size, float most, float temperature, const float *x, float *weights) {
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

}  // namespace

extern const Vectors STRACE_VECTORS;
const Vectors STRACE_VECTORS = {normalise, rotate, activate, add,   cap,
                                store_row, attend, merge,    weigh, summarise};

}  // namespace strace
