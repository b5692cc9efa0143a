// Attention over the paged cache. A piece of work is one sequence, one key/value head and one span of positions: it
// writes the tile's keys and values that fall into the span, and no other piece reads them before it has.
#include <algorithm>

#include "pass.h"

namespace strace {
namespace {

// The first span that a token at this position reads.
inline int first_span(const st_attention &part, int position) {
  return part.window ? std::max(0, position - part.window + 1) / SPAN : 0;
}

inline int last_span(int position) { return position / SPAN; }

}  // namespace

const st_rope *Pass::rope_of(const st_attention &part) const {
  return shape_.rotary_dim ? shape_.rope + part.rope : nullptr;
}

void Pass::share_attention(int l) {
  const st_attention &part = shape_.layer[l].attention;
  const auto spans = [&](const Run &run) {
    return last_span(run.start + run.count - 1) - first_span(part, run.start) + 1;
  };
  int pieces = 0;
  for (const Run &run : tile_.runs) pieces += spans(run) * part.kv_heads;
  pool_.share(pieces, [&](int i, int thread) {
    const Run *run = tile_.runs.data();
    while (i >= spans(*run) * part.kv_heads) i -= spans(*run++) * part.kv_heads;
    attend(l, *run, i % part.kv_heads, first_span(part, run->start) + i / part.kv_heads, thread);
  });
}

void Pass::attend(int l, const Run &run, int head, int span, int thread) {
  const st_attention &part = shape_.layer[l].attention;
  const st_cache &cache = cache_;
  const int first = span * SPAN, last = first + SPAN, size = cache.head_dim, group = part.heads / part.kv_heads;
  float *queries = space_.scratch[thread].queries.data<float>();
  write_cache(l, run, head, first, last, thread);
  const int skipped = std::max(0, first - run.start), tokens = run.count - skipped;
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < group; ++h) {
      float *query = queries + (t * group + h) * pitch_;
      take_head(part.q_norm, this->first(run.first + skipped + t), head * group + h, rope_of(part),
                run.start + skipped + t, thread, query);
      for (int i = 0; i < size; ++i) query[i] *= shape_.attention_scale;
      std::fill(query + size, query + pitch_, 0.0f);
    }
  const size_t head_bytes = BLOCK * size * entry_bytes(cache.format), offset = part.kept[head] * head_bytes;
  const size_t head_stride = spans_ * mixed_stride_, token_stride = graph_.most_heads * head_stride;
  const st_layer_cache &entries = cache.layer[l];
  vectors_.attend({cache.format, size, static_cast<const char *>(entries.keys) + offset,
                   static_cast<const char *>(entries.values) + offset, cache.kv_heads * head_bytes, run.table,
                   run.start + skipped, tokens, group, part.window, shape_.attention_cap, first, last, queries,
                   mixed_ + (run.first + skipped) * token_stride + head * group * head_stride +
                       span * mixed_stride_,
                   token_stride, head_stride});
}

// The tile's keys and values of one head at positions [first, last).
void Pass::write_cache(int l, const Run &run, int head, int first, int last, int thread) {
  const st_attention &part = shape_.layer[l].attention;
  const st_cache &cache = cache_;
  const int size = cache.head_dim;
  const size_t entry = size * entry_bytes(cache.format);
  for (int t = std::max(0, first - run.start); t < run.count && run.start + t < last; ++t) {
    const int position = run.start + t;
    const float *keys = this->first(run.first + t) + part.heads * size, *values = keys + part.kv_heads * size;
    const size_t block = run.table[position / BLOCK] * static_cast<size_t>(cache.kv_heads) + part.kept[head];
    const size_t place = (block * BLOCK + position % BLOCK) * entry;
    take_head(part.k_norm, keys, head, rope_of(part), position, thread, row(thread));
    vectors_.store(cache.format, size, row(thread), static_cast<char *>(cache.layer[l].keys) + place);
    vectors_.store(cache.format, size, values + head * size, static_cast<char *>(cache.layer[l].values) + place);
  }
}

// One of a token's query or key heads, normalised and turned to its position.
void Pass::take_head(const st_norm &norm, const float *heads, int head, const st_rope *rope, int position, int thread,
                     float *out) {
  const int size = cache_.head_dim, rotary_dim = shape_.rotary_dim;
  if (norm.kind != 0 && norm.size != size) {
    float *wide = space_.scratch[thread].wide.data<float>();
    vectors_.normalise(norm, shape_.norm_eps, heads, wide);
    std::copy_n(wide + head * size, size, out);
  } else if (norm.kind != 0) {
    vectors_.normalise(norm, shape_.norm_eps, heads + head * size, out);
  } else {
    std::copy_n(heads + head * size, size, out);
  }
  const size_t turn = static_cast<size_t>(position) * rotary_dim;
  if (rope) vectors_.rotate(rope->cos + turn, rope->signed_sin + turn, rotary_dim, out);
}

// One token's mixed values of all heads.
void Pass::merge(const st_attention &part, int token, float *z) {
  const int size = cache_.head_dim, position = tile_.position(token);
  const int from = first_span(part, position), spans = last_span(position) - from + 1;
  const size_t head_stride = spans_ * mixed_stride_;
  const float *mixed = mixed_ + token * graph_.most_heads * head_stride + from * mixed_stride_;
  for (int h = 0; h < part.heads; ++h)
    vectors_.merge(spans, mixed_stride_, size, mixed + h * head_stride, z + h * size);
}

}  // namespace strace
