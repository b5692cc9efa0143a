// Products of packed weight matrices with a few rows of activations: the part of the runner that moves the bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "native.h"

namespace strace {

// Output rows are packed in panels of this many, so that a vector lane is an output row and no sum crosses lanes. Two
// 64-byte vectors: enough sums in flight at one token, and a group's bf16 scales fill a cache line.
constexpr int PANEL = 32;
constexpr int GROUP = 32;  // inputs that share a scale; packed weights and prepared activations are whole groups

// The kernels of one instruction set. A product's bits depend on one token's activations and one weight row alone.
struct Kernels {
  const char *name;

  // Bytes of one token's activations, prepared for a matrix of `format` (a multiple of 64).
  size_t (*activation_bytes)(int format, int columns);
  // Prepare one token's float32 row [columns] for a matrix of `format`.
  void (*prepare)(int format, int columns, const float *x, void *out);
  // y[t * stride + row] for `tokens` prepared rows and the output rows of panels [first, last), bias added.
  void (*multiply)(const st_matrix &matrix, const void *activations, int tokens, int first, int last, float *y,
                   size_t stride);
  // Rows of weights, fp32 or bf16, to codes and scales of int8 or int4: st_quantise, with room for one row in float32.
  void (*quantise)(int format, int rows, int columns, int weight_format, const void *weight, int8_t *codes,
                   uint16_t *scales, float *row);
};

// The best that this CPU runs, or the lesser one that STRACE_ISA names. Chosen once.
const Kernels &kernels();

inline int panels(const st_matrix &matrix) { return (matrix.rows + PANEL - 1) / PANEL; }

}  // namespace strace
