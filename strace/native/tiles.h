// The loops around an instruction set's inner products: panels, tokens, blocks of inputs. Included once by each
// kernels_*.cpp, which is compiled for its instruction set; everything is in an unnamed namespace, so that the linker
// never takes one set's code for another's.
//
// A format of an instruction set is a struct with
//   FORMAT              its number in native.h
//   TOKENS              most tokens in one tile
//   ACTIVATION_BYTES    of one prepared token and group
//   prepare(x, out)     one group of float32 [GROUP]
//   add<T>(...)         adds a panel's groups for T tokens to their sums
//   State               what a thread sets up for its tiles, until its share of a product is done
// Every sum adds the groups in order, and a group in an order that is the same for each T. Sums that rest in memory
// between blocks keep their bits. So do bits not depend on the tile.
#pragma once

#include <cstring>

#include "layout.h"
#include "rounding.h"

namespace strace {
namespace {

// Adds `groups` groups to sums [T, PANEL]. weights: the first group's; x: the first token's first group, the next
// token's is `stride` bytes on.
using Add = void (*)(const uint8_t *weights, const uint8_t *x, size_t stride, int groups, float *sums);

// Most instruction sets have nothing to set up.
struct Stateless {
  struct State {
    void fit(int) {}
  };
};

constexpr int BLOCK_GROUPS = 8;   // inputs whose weights stay in the L1 cache while tiles of tokens pass over them
constexpr int BLOCK_TOKENS = 64;  // tokens whose sums stay there

template <class Format, int... Minus>
Add choose_add(int tokens, std::integer_sequence<int, Minus...>) {
  static constexpr Add TABLE[] = {Format::template add<Minus + 1>...};
  return TABLE[tokens - 1];
}

template <class Format>
size_t token_bytes(int columns) {
  return (groups_of(columns) * Format::ACTIVATION_BYTES + 63) / 64 * 64;
}

template <class Format>
void prepare_token(int columns, const float *x, void *out) {
  auto *to = static_cast<uint8_t *>(out);
  int full = columns / GROUP;
  for (int g = 0; g < full; g++) Format::prepare(x + g * GROUP, to + g * Format::ACTIVATION_BYTES);
  if (full == groups_of(columns)) return;
  float padded[GROUP] = {};
  memcpy(padded, x + full * GROUP, (columns - full * GROUP) * sizeof(float));
  Format::prepare(padded, to + full * Format::ACTIVATION_BYTES);
}

// Sums [tokens, PANEL] of one panel; tiles of about the same size.
template <class Format>
void sum_panel(const uint8_t *weights, const uint8_t *x, size_t stride, int tokens, int groups, float *sums,
               typename Format::State &state) {
  int tiles = (tokens + Format::TOKENS - 1) / Format::TOKENS;
  int block = tiles == 1 ? groups : BLOCK_GROUPS;
  memset(sums, 0, tokens * PANEL * sizeof(float));
  for (int g = 0; g < groups; g += block) {
    int count = groups - g < block ? groups - g : block;
    for (int tile = 0; tile < tiles; tile++) {
      int first = tokens * tile / tiles, last = tokens * (tile + 1) / tiles;
      Add add = choose_add<Format>(last - first, std::make_integer_sequence<int, Format::TOKENS>{});
      state.fit(last - first);
      add(weights + g * group_bytes(Format::FORMAT), x + first * stride + g * Format::ACTIVATION_BYTES, stride, count,
          sums + first * PANEL);
    }
  }
}

inline void write_rows(const float *sums, const float *scales, const float *bias, int rows, float *y) {
  for (int r = 0; r < rows; r++) y[r] = (scales ? sums[r] * scales[r] : sums[r]) + (bias ? bias[r] : 0.0f);
}

template <class Format>
void multiply_panels(const st_matrix &matrix, const void *activations, int tokens, int first, int last, float *y,
                     size_t stride) {
  constexpr size_t HEADER = header_bytes(Format::FORMAT);
  alignas(64) float sums[BLOCK_TOKENS * PANEL];
  typename Format::State state;
  size_t panel_stride = panel_bytes(Format::FORMAT, matrix.columns), x_stride = token_bytes<Format>(matrix.columns);
  for (int panel = first; panel < last; panel++) {
    const uint8_t *weights = static_cast<const uint8_t *>(matrix.packed) + panel * panel_stride;
    const float *scales = HEADER ? reinterpret_cast<const float *>(weights) : nullptr;
    int row = panel * PANEL, rows = matrix.rows - row < PANEL ? matrix.rows - row : PANEL;
    for (int t = 0; t < tokens; t += BLOCK_TOKENS) {
      int count = tokens - t < BLOCK_TOKENS ? tokens - t : BLOCK_TOKENS;
      const uint8_t *x = static_cast<const uint8_t *>(activations) + t * x_stride;
      sum_panel<Format>(weights + HEADER, x, x_stride, count, groups_of(matrix.columns), sums, state);
      for (int i = 0; i < count; i++)
        write_rows(sums + i * PANEL, scales, matrix.bias ? matrix.bias + row : nullptr, rows, y + (t + i) * stride + row);
    }
  }
}

template <class Fp32, class Bf16, class Int8, class Int4>
constexpr Kernels make_kernels(const char *name) {
  Kernels made{};
  made.name = name;
  made.activation_bytes = [](int format, int columns) {
    switch (format) {
      case ST_FP32: return token_bytes<Fp32>(columns);
      case ST_BF16: return token_bytes<Bf16>(columns);
      case ST_INT8: return token_bytes<Int8>(columns);
      default: return token_bytes<Int4>(columns);
    }
  };
  made.prepare = [](int format, int columns, const float *x, void *out) {
    switch (format) {
      case ST_FP32: return prepare_token<Fp32>(columns, x, out);
      case ST_BF16: return prepare_token<Bf16>(columns, x, out);
      case ST_INT8: return prepare_token<Int8>(columns, x, out);
      default: return prepare_token<Int4>(columns, x, out);
    }
  };
  made.multiply = [](const st_matrix &matrix, const void *x, int tokens, int first, int last, float *y, size_t stride) {
    switch (matrix.format) {
      case ST_FP32: return multiply_panels<Fp32>(matrix, x, tokens, first, last, y, stride);
      case ST_BF16: return multiply_panels<Bf16>(matrix, x, tokens, first, last, y, stride);
      case ST_INT8: return multiply_panels<Int8>(matrix, x, tokens, first, last, y, stride);
      default: return multiply_panels<Int4>(matrix, x, tokens, first, last, y, stride);
    }
  };
  made.quantise = [](int format, int rows, int columns, int weight_format, const void *weight, int8_t *codes,
                     uint16_t *scales, float *row) {
    if (weight_format == ST_FP32)
      round_rows(format, rows, columns, static_cast<const float *>(weight), codes, scales, row);
    else
      round_rows(format, rows, columns, static_cast<const uint16_t *>(weight), codes, scales, row);
  };
  return made;
}

}  // namespace
}  // namespace strace
