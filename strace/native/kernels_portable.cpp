// Kernels in plain C++, for any processor: loops over a panel's rows, which a compiler turns into vectors of whatever
// width it has.
#include <cmath>
#include <cstddef>
#include <utility>

#include "tiles.h"

namespace strace {
namespace {

struct Fp32 : Stateless {
  static constexpr int FORMAT = ST_FP32, TOKENS = 4;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(float);

  static void prepare(const float *x, void *out) { memcpy(out, x, ACTIVATION_BYTES); }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    for (int i = 0; i < groups * GROUP; i++, weights += STEP_BYTES, x += sizeof(float)) {
      const auto *w = reinterpret_cast<const float *>(weights);
      for (int t = 0; t < T; t++) {
        float one;
        memcpy(&one, x + t * stride, sizeof one);
        for (int r = 0; r < PANEL; r++) sums[t * PANEL + r] += w[r] * one;
      }
    }
  }
};

struct Bf16 : Stateless {
  static constexpr int FORMAT = ST_BF16, TOKENS = 4;
  static constexpr size_t ACTIVATION_BYTES = GROUP * sizeof(uint16_t);

  static void prepare(const float *x, void *out) {
    uint16_t made[GROUP];
    for (int i = 0; i < GROUP; i++) made[i] = to_bf16(x[i]);
    memcpy(out, made, sizeof made);
  }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums) {
    for (int i = 0; i < groups * GROUP / 2; i++, weights += STEP_BYTES, x += 2 * sizeof(uint16_t)) {
      const auto *w = reinterpret_cast<const uint16_t *>(weights);
      for (int t = 0; t < T; t++) {
        uint16_t pair[2];
        memcpy(pair, x + t * stride, sizeof pair);
        const float even = from_bf16(pair[0]), odd = from_bf16(pair[1]);
        for (int r = 0; r < PANEL; r++) sums[t * PANEL + r] += from_bf16(w[2 * r]) * even + from_bf16(w[2 * r + 1]) * odd;
      }
    }
  }
};

struct Codes {
  float scale;
  int32_t start;  // what the offset of the stored codes adds to the group's sum, taken off beforehand
  int8_t codes[GROUP];
};

inline void prepare_codes(const float *x, int offset, void *out) {
  float most = 0;
  for (int i = 0; i < GROUP; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  Codes made{most / 127, 0, {}};
  for (int i = 0; i < GROUP && made.scale > 0; i++) {
    made.codes[i] = static_cast<int8_t>(std::nearbyint(x[i] / made.scale));
    made.start -= offset * made.codes[i];
  }
  memcpy(out, &made, sizeof made);
}

// The codes of one token's group, whose exact sums [PANEL] begin.
inline Codes start_group(const uint8_t *x, int32_t *exact) {
  Codes token;
  memcpy(&token, x, sizeof token);
  for (int r = 0; r < PANEL; r++) exact[r] = token.start;
  return token;
}

// One step of 4 inputs, for all rows of one token.
inline void add_step(const uint8_t *weights, const int8_t *codes, int32_t *exact) {
  for (int r = 0; r < PANEL; r++)
    for (int i = 0; i < 4; i++) exact[r] += weights[4 * r + i] * codes[i];
}

struct Int8 : Stateless {
  static constexpr int FORMAT = ST_INT8, TOKENS = 1;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Codes);

  static void prepare(const float *x, void *out) { prepare_codes(x, INT8_OFFSET, out); }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t, int groups, float *sums) {
    for (int g = 0; g < groups; g++, weights += group_bytes(FORMAT), x += ACTIVATION_BYTES) {
      int32_t exact[PANEL];
      const Codes token = start_group(x, exact);
      for (int step = 0; step < 8; step++) add_step(weights + step * STEP_BYTES, token.codes + 4 * step, exact);
      for (int r = 0; r < PANEL; r++) sums[r] += static_cast<float>(exact[r]) * token.scale;
    }
  }
};

struct Int4 : Stateless {
  static constexpr int FORMAT = ST_INT4, TOKENS = 1;
  static constexpr size_t ACTIVATION_BYTES = sizeof(Codes);

  static void prepare(const float *x, void *out) { prepare_codes(x, INT4_OFFSET, out); }

  template <int T>
  static void add(const uint8_t *weights, const uint8_t *x, size_t, int groups, float *sums) {
    for (int g = 0; g < groups; g++, weights += group_bytes(FORMAT), x += ACTIVATION_BYTES) {
      int32_t exact[PANEL];
      const Codes token = start_group(x, exact);
      for (int pair = 0; pair < 4; pair++) {
        const uint8_t *both = weights + INT4_SCALE_BYTES + pair * STEP_BYTES;
        uint8_t even[STEP_BYTES], odd[STEP_BYTES];
        for (size_t i = 0; i < STEP_BYTES; i++) even[i] = both[i] & 15, odd[i] = both[i] >> 4;
        add_step(even, token.codes + 8 * pair, exact);
        add_step(odd, token.codes + 8 * pair + 4, exact);
      }
      uint16_t scales[PANEL];
      memcpy(scales, weights, sizeof scales);
      for (int r = 0; r < PANEL; r++) sums[r] += static_cast<float>(exact[r]) * (from_bf16(scales[r]) * token.scale);
    }
  }
};

}  // namespace

extern const Kernels PORTABLE;
const Kernels PORTABLE = make_kernels<Fp32, Bf16, Int8, Int4>("portable");

}  // namespace strace
