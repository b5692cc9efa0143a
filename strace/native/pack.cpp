// Weights rounded, and brought from rows into the panels that the kernels read (layout.h).
#include <algorithm>
#include <cstring>
#include <vector>

#include "error.h"
#include "layout.h"

using namespace strace;

namespace {

constexpr int bytes_of(int format) { return format == ST_FP32 ? 4 : format == ST_BF16 ? 2 : 1; }

// The first `count` bytes at `from`, the others zero.
uint32_t read_word(const uint8_t *from, int count) {
  uint32_t word = 0;
  std::memcpy(&word, from, count);
  return word;
}

// The steps of one group of one panel: `rows` rows of `bytes` bytes, `stride` apart, a word of 4 of a row's a step. Whole
// rows of a group are whole words, which is what makes this as fast as memory.
template <class Change>
void pack_group(const uint8_t *from, size_t stride, int rows, int bytes, uint8_t *to, Change change) {
  for (int r = 0; r < rows; r++, from += stride) {
    uint8_t *step = to + 4 * r;
    for (int w = 0; w < bytes / 4; w++, step += STEP_BYTES) {
      const uint32_t word = change(read_word(from + 4 * w, 4));
      std::memcpy(step, &word, sizeof word);
    }
    if (bytes % 4 == 0) continue;
    const uint32_t word = change(read_word(from + bytes / 4 * 4, bytes % 4));
    std::memcpy(step, &word, bytes % 4);
  }
}

// Calls pack(row, rows, group, columns, out) for every group of every panel, zeroed beforehand where it is not full.
template <class Pack>
void each_group(int format, int rows, int columns, uint8_t *out, Pack pack) {
  for (int row = 0; row < rows; row += PANEL, out += panel_bytes(format, columns)) {
    const int count = std::min(PANEL, rows - row);
    for (int g = 0; g < groups_of(columns); g++) {
      const int width = std::min(GROUP, columns - g * GROUP);
      uint8_t *to = out + header_bytes(format) + g * group_bytes(format);
      if (count < PANEL || width < GROUP) std::memset(to, 0, group_bytes(format));
      pack(row, count, g, width, to);
    }
  }
}

float widen(uint16_t bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void pack_dense(int format, int rows, int columns, const uint8_t *weight, uint8_t *out) {
  const size_t size = bytes_of(format), stride = columns * size;
  each_group(format, rows, columns, out, [&](int row, int count, int g, int width, uint8_t *to) {
    pack_group(weight + row * stride + g * GROUP * size, stride, count, width * static_cast<int>(size), to,
               [](uint32_t word) { return word; });
  });
}

void pack_int8(int rows, int columns, const uint8_t *codes, const uint16_t *scales, uint8_t *out) {
  static_assert(INT8_OFFSET == 128, "its sum with a byte is the byte with another sign bit");
  each_group(ST_INT8, rows, columns, out, [&](int row, int count, int g, int width, uint8_t *to) {
    pack_group(codes + static_cast<size_t>(row) * columns + g * GROUP, columns, count, width, to,
               [](uint32_t word) { return word ^ 0x80808080; });
  });
  for (int row = 0; row < rows; row += PANEL, out += panel_bytes(ST_INT8, columns)) {
    auto *header = reinterpret_cast<float *>(out);
    for (int r = 0; r < PANEL; r++) header[r] = row + r < rows ? widen(scales[row + r]) : 0;
  }
}

// The int8 steps of a group, two to a byte.
void fold_steps(const uint8_t *steps, uint8_t *to) {
  for (int pair = 0; pair < 4; pair++, steps += 2 * STEP_BYTES, to += STEP_BYTES)
    for (size_t i = 0; i < STEP_BYTES; i++) to[i] = steps[i] | steps[i + STEP_BYTES] << 4;
}

void pack_int4(int rows, int columns, const uint8_t *codes, const uint16_t *scales, uint8_t *out) {
  static_assert(INT4_OFFSET == 8, "its sum with 4 bits is the 4 bits with another sign bit");
  each_group(ST_INT4, rows, columns, out, [&](int row, int count, int g, int width, uint8_t *to) {
    uint8_t steps[8 * STEP_BYTES];
    if (count < PANEL || width < GROUP) std::memset(steps, 0, sizeof steps);
    pack_group(codes + static_cast<size_t>(row) * columns + g * GROUP, columns, count, width, steps,
               [](uint32_t word) { return (word & 0x0f0f0f0f) ^ 0x08080808; });
    for (int r = 0; r < count; r++)
      std::memcpy(to + 2 * r, scales + static_cast<size_t>(row + r) * groups_of(columns) + g, sizeof(uint16_t));
    fold_steps(steps, to + INT4_SCALE_BYTES);
  });
}

}  // namespace

int32_t st_quantise(int32_t format, int32_t rows, int32_t columns, int32_t weight_format, const void *weight,
                    int8_t *codes, uint16_t *scales) {
  return guarded(-1, [&] {
    require(format == ST_INT8 || format == ST_INT4, "codes are int8 or int4");
    require(weight_format == ST_FP32 || weight_format == ST_BF16, "a dense matrix is fp32 or bf16");
    require(rows > 0 && columns > 0, "the matrix is empty");
    require(format == ST_INT8 || columns % GROUP == 0, "int4 takes whole groups of columns");
    std::vector<float> row(columns);
    kernels().quantise(format, rows, columns, weight_format, weight, codes, scales, row.data());
    return 0;
  });
}

size_t st_packed_bytes(int32_t format, int32_t rows, int32_t columns) {
  return (rows + PANEL - 1) / PANEL * panel_bytes(format, columns);
}

int32_t st_pack_dense(int32_t format, int32_t rows, int32_t columns, const void *weight, void *out) {
  return guarded(-1, [&] {
    require(format == ST_FP32 || format == ST_BF16, "a dense matrix is fp32 or bf16");
    require(rows > 0 && columns > 0, "the matrix is empty");
    pack_dense(format, rows, columns, static_cast<const uint8_t *>(weight), static_cast<uint8_t *>(out));
    return 0;
  });
}

int32_t st_pack_codes(int32_t format, int32_t rows, int32_t columns, const int8_t *codes, const uint16_t *scales,
                      void *out) {
  return guarded(-1, [&] {
    require(format == ST_INT8 || format == ST_INT4, "codes are int8 or int4");
    require(rows > 0 && columns > 0, "the matrix is empty");
    const auto *bytes = reinterpret_cast<const uint8_t *>(codes);
    const auto pack = format == ST_INT8 ? pack_int8 : pack_int4;
    pack(rows, columns, bytes, scales, static_cast<uint8_t *>(out));
    return 0;
  });
}
