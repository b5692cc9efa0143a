// Where a packed matrix keeps its numbers. Panel after panel; in a panel group after group, so that a product reads
// one unbroken stream. A step is 4 bytes of each of the panel's rows, one row after the other:
//
//   fp32   1 input a step, 32 steps a group
//   bf16   2 inputs a step, 16 steps a group
//   int8   the panel's row scales (float32) first; then 4 inputs a step as code + 128, 8 steps a group
//   int4   the group's scales (bf16), then 4 x 2 steps as code + 8: the even step's inputs in the low half of each byte,
//          the odd one's in the high half
//
// Rows past the last and inputs past the last are zeros.
#pragma once

#include "kernels.h"

namespace strace {

constexpr int INT8_OFFSET = 128, INT4_OFFSET = 8;
constexpr size_t STEP_BYTES = 4 * PANEL;
constexpr size_t INT8_HEADER_BYTES = PANEL * sizeof(float);
constexpr size_t INT4_SCALE_BYTES = PANEL * sizeof(uint16_t);

constexpr int groups_of(int columns) { return (columns + GROUP - 1) / GROUP; }

constexpr size_t header_bytes(int format) { return format == ST_INT8 ? INT8_HEADER_BYTES : 0; }

constexpr size_t group_bytes(int format) {
  switch (format) {
    case ST_FP32: return 32 * STEP_BYTES;
    case ST_BF16: return 16 * STEP_BYTES;
    case ST_INT8: return 8 * STEP_BYTES;
    default: return INT4_SCALE_BYTES + 4 * STEP_BYTES;
  }
}

constexpr size_t panel_bytes(int format, int columns) {
  return header_bytes(format) + groups_of(columns) * group_bytes(format);
}

}  // namespace strace
