// Weights rounded to int8 or int4, with the same bits as strace/linear.py. Included once by each kernels_*.cpp through
// tiles.h; in plain loops over a group, which the compiler turns into vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "layout.h"

namespace strace {
namespace {

inline float from_bf16(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to the even one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void widen_row(const float *from, int count, float *to) { memcpy(to, from, count * sizeof(float)); }

inline void widen_row(const uint16_t *from, int count, float *to) {
  for (int i = 0; i < count; i++) to[i] = from_bf16(from[i]);
}

// The first of the weights with the largest magnitude.
inline float find_peak(const float *x, int count) {
  int32_t most = 0;
  for (int i = 0; i < count; i++) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= INT32_MAX;  // magnitudes are in the order of their bits
    most = bits > most ? bits : most;
  }
  float peak;
  memcpy(&peak, &most, sizeof peak);
  for (int i = 0; i < count; i++)
    if (x[i] == peak || x[i] == -peak) return x[i];
  return 0;
}

struct Range {
  float low, high;
};

// As `nearbyint`, for the small numbers here; it compiles to two additions.
inline float round_even(float x) {
  constexpr float SHIFT = 3 << 22;
  return (x + SHIFT) - SHIFT;
}

inline float find_code(float x, float scale, Range range) {
  const float code = round_even(x / scale);
  return code < range.low ? range.low : code > range.high ? range.high : code;
}

inline uint16_t find_scale(float peak, float shrink, Range range) {
  const uint16_t scale = to_bf16(peak * shrink / range.low);
  return (scale & INT16_MAX) ? scale : to_bf16(1);
}

// The squared error of a group at a scale; added up by halves, so that the order is the same everywhere.
inline float find_error(const float *x, float scale, Range range) {
  float error[GROUP];
  for (int i = 0; i < GROUP; i++) {
    const float miss = find_code(x[i], scale, range) * scale - x[i];
    error[i] = miss * miss;
  }
  for (int i = 0; i < 16; i++) error[i] += error[i + 16];
  for (int i = 0; i < 8; i++) error[i] += error[i + 8];
  for (int i = 0; i < 4; i++) error[i] += error[i + 4];
  return (error[0] + error[2]) + (error[1] + error[3]);
}

inline void write_codes(const float *x, int count, float scale, Range range, int8_t *codes) {
  for (int i = 0; i < count; i++) codes[i] = static_cast<int8_t>(find_code(x[i], scale, range));
}

// The scale that errs least of a few.
inline uint16_t choose_scale(const float *x, Range range) {
  const float peak = find_peak(x, GROUP);
  uint16_t best = to_bf16(1);
  float least = INFINITY;
  for (float shrink : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f}) {
    const uint16_t scale = find_scale(peak, shrink, range);
    const float error = find_error(x, from_bf16(scale), range);
    if (error < least) least = error, best = scale;
  }
  return best;
}

inline void round_int4(const float *row, int columns, int8_t *codes, uint16_t *scales) {
  constexpr Range RANGE{-8, 7};
  for (int g = 0; g < columns / GROUP; g++, row += GROUP, codes += GROUP) {
    scales[g] = choose_scale(row, RANGE);
    write_codes(row, GROUP, from_bf16(scales[g]), RANGE, codes);
  }
}

inline void round_int8(const float *row, int columns, int8_t *codes, uint16_t *scales) {
  constexpr Range RANGE{-127, 127};
  *scales = find_scale(find_peak(row, columns), 1, RANGE);
  write_codes(row, columns, from_bf16(*scales), RANGE, codes);
}

template <class Number>
void round_rows(int format, int rows, int columns, const Number *weight, int8_t *codes, uint16_t *scales, float *row) {
  for (int r = 0; r < rows; r++, weight += columns, codes += columns) {
    widen_row(weight, columns, row);
    if (format == ST_INT4)
      round_int4(row, columns, codes, scales + static_cast<size_t>(r) * (columns / GROUP));
    else
      round_int8(row, columns, codes, scales + r);
  }
}

}  // namespace
}  // namespace strace
