// The arithmetic of a step that is not a matrix product, on 16 numbers at a time.
//
// Every function's bits depend on the numbers it is given and on their count alone: sums run in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "native.h"

namespace strace {

constexpr int LANES = 16;
constexpr int BLOCK = 32;         // positions of a cache block
constexpr int SPAN = 8 * BLOCK;   // positions that one piece of attention work reads
constexpr int MOST_HEAD_DIM = 256;

// A head's numbers are padded to whole vectors.
static inline int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

// Of a number in the cache.
static inline size_t entry_bytes(int format) { return format == ST_FP32 ? 4 : 2; }

// One key/value head's attention over one span of positions: the queries are those of one sequence's tokens in this pass
// and of the query heads that share the head, so that each key and value is read once.
struct Span {
  int format, head_dim;
  const void *keys, *values;     // of the layer and head
  size_t block_bytes;            // from one block's entries to the next block's
  const int64_t *table;          // the sequence's blocks
  int start, tokens, heads;      // position of the first token; query heads
  int window;                    // 0: unbounded
  float cap;                     // 0: none
  int first, last;               // positions [first, last)
  const float *queries;          // [tokens, heads, padded(head_dim)], scaled
  float *mixed;                  // per token and head: padded(head_dim) sums of values, greatest score, sum of weights
  size_t token_stride, head_stride;
};

struct Vectors {
  // May read and write the same place.
  void (*normalise)(const st_norm &norm, float eps, const float *x, float *y);
  void (*rotate)(const float *cos, const float *signed_sin, int rotary_dim, float *x);
  // From [neurons] or, gated, [gate's neurons, up neurons].
  void (*activate)(int activation, bool gated, int neurons, const float *inner, float *y);
  void (*add)(int size, const float *part, float *stream);
  void (*cap)(float cap, int size, float *x);
  // A row of float32 or bfloat16 numbers, rounded from float32.
  void (*store)(int format, int size, const float *from, void *to);
  void (*attend)(const Span &span);
  // The mean value over `spans` results of `attend`, `stride` numbers apart, in their order.
  void (*merge)(int spans, size_t stride, int head_dim, const float *mixed, float *z);
  // -infinity of none; NaN is not counted.
  float (*greatest)(const float *x, int count);
  double (*sum)(const float *x, int count);
  // weights[i] = e^((x[i] - most) / temperature).
  void (*weigh)(int size, float most, float temperature, const float *x, float *weights);
  // token: the entry's number.
  st_summary (*summarise)(const float *logits, int count);
  // Reads all of it and does next to nothing else; the numbers' xor. bytes: a multiple of 512.
  int32_t (*read)(const void *memory, size_t bytes);
};

// Of the same instruction set as kernels().
const Vectors &vectors();

}  // namespace strace
