// Weights from rows into the panels that the kernels read (layout.h).
#include <algorithm>
#include <cstring>

#include "error.h"
#include "layout.h"

using namespace strace;

namespace {

constexpr int bytes_of(int format) { return format == ST_FP32 ? 4 : format == ST_BF16 ? 2 : 1; }

// The steps of one group of one panel: `rows` rows of `bytes` bytes, `stride` apart, 4 of a row's a step.
void pack_group(const uint8_t *from, size_t stride, int rows, int bytes, uint8_t offset, uint8_t *to) {
  for (int r = 0; r < rows; r++, from += stride)
    for (int b = 0; b < bytes; b++) to[b / 4 * STEP_BYTES + r * 4 + b % 4] = from[b] + offset;
}

// Calls pack(row, rows, group, columns, out) for every group of every panel of a zeroed matrix.
template <class Pack>
void each_group(int format, int rows, int columns, uint8_t *out, Pack pack) {
  std::memset(out, 0, st_packed_bytes(format, rows, columns));
  for (int row = 0; row < rows; row += PANEL, out += panel_bytes(format, columns))
    for (int g = 0; g < groups_of(columns); g++)
      pack(row, std::min(PANEL, rows - row), g, std::min(GROUP, columns - g * GROUP),
           out + header_bytes(format) + g * group_bytes(format));
}

// The int8 steps of a group, two to a byte.
void fold_steps(const uint8_t *steps, uint8_t *to) {
  for (int pair = 0; pair < 4; pair++, steps += 2 * STEP_BYTES, to += STEP_BYTES)
    for (size_t i = 0; i < STEP_BYTES; i++) to[i] = steps[i] | steps[i + STEP_BYTES] << 4;
}

float widen(uint16_t bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void pack_int8(int rows, int columns, const int8_t *codes, const uint16_t *scales, uint8_t *out) {
  const auto *bytes = reinterpret_cast<const uint8_t *>(codes);
  each_group(ST_INT8, rows, columns, out, [&](int row, int count, int g, int width, uint8_t *to) {
    pack_group(bytes + static_cast<size_t>(row) * columns + g * GROUP, columns, count, width, INT8_OFFSET, to);
  });
  for (int row = 0; row < rows; row++) {
    auto *header = reinterpret_cast<float *>(out + row / PANEL * panel_bytes(ST_INT8, columns));
    header[row % PANEL] = widen(scales[row]);
  }
}

void pack_int4(int rows, int columns, const int8_t *codes, const uint16_t *scales, uint8_t *out) {
  const auto *bytes = reinterpret_cast<const uint8_t *>(codes);
  each_group(ST_INT4, rows, columns, out, [&](int row, int count, int g, int width, uint8_t *to) {
    uint8_t steps[8 * STEP_BYTES] = {};
    pack_group(bytes + static_cast<size_t>(row) * columns + g * GROUP, columns, count, width, INT4_OFFSET, steps);
    for (int r = 0; r < count; r++)
      std::memcpy(to + 2 * r, scales + static_cast<size_t>(row + r) * groups_of(columns) + g, sizeof(uint16_t));
    fold_steps(steps, to + INT4_SCALE_BYTES);
  });
}

}  // namespace

size_t st_packed_bytes(int32_t format, int32_t rows, int32_t columns) {
  return (rows + PANEL - 1) / PANEL * panel_bytes(format, columns);
}

int32_t st_pack_dense(int32_t format, int32_t rows, int32_t columns, const void *weight, void *out) {
  return guarded(-1, [&] {
    require(format == ST_FP32 || format == ST_BF16, "a dense matrix is fp32 or bf16");
    require(rows > 0 && columns > 0, "the matrix is empty");
    const auto *bytes = static_cast<const uint8_t *>(weight);
    const size_t size = bytes_of(format), stride = columns * size;
    each_group(format, rows, columns, static_cast<uint8_t *>(out), [&](int row, int count, int g, int width, uint8_t *to) {
      pack_group(bytes + row * stride + g * GROUP * size, stride, count, width * static_cast<int>(size), 0, to);
    });
    return 0;
  });
}

int32_t st_pack_codes(int32_t format, int32_t rows, int32_t columns, const int8_t *codes, const uint16_t *scales,
                      void *out) {
  return guarded(-1, [&] {
    require(format == ST_INT8 || format == ST_INT4, "codes are int8 or int4");
    require(rows > 0 && columns > 0, "the matrix is empty");
    auto *to = static_cast<uint8_t *>(out);
    if (format == ST_INT8)
      pack_int8(rows, columns, codes, scales, to);
    else
      pack_int4(rows, columns, codes, scales, to);
    return 0;
  });
}
