// The layers of one tile, from token ids to logits.
#pragma once

#include "kernels.h"
#include "model.h"
#include "vectors.h"

namespace strace {

class Pass {
 public:
  Pass(st_runner &runner, const Graph &graph);

  void run_layers();
  // Logits [count, head rows] of the tile's tokens `places`, count at most the tile's; summaries may be NULL.
  void run_head(const int *places, int count, float *logits, st_summary *summaries);

 private:
  // Pieces take the number of the thread that does them, for its scratch.
  template <class Piece>
  void each(int count, Piece &&piece);
  void multiply(const st_matrix &matrix, int count, float *y, size_t stride);
  void run_attention(int l, const st_norm *pending);
  void run_mlp(int l, const st_norm *pending);
  void embed(int token);
  void enter(int token, int place, const st_norm &norm, const st_matrix &matrix, int thread);
  void leave(int token, const st_norm &post_norm, int thread);
  void prepare(const float *row, int place, const st_matrix &matrix);

  // attention.cpp
  void share_attention(int l);
  void attend(int l, const Run &run, int head, int span, int thread);
  void write_cache(int l, const Run &run, int head, int first, int last, int thread);
  void take_head(const st_norm &norm, const float *heads, int head, const st_rope *rope, int position, int thread,
                 float *out);
  void merge(const st_attention &part, int token, float *z);
  const st_rope *rope_of(const st_attention &part) const;

  float *stream(int token) { return stream_ + static_cast<size_t>(token) * shape_.hidden; }
  float *first(int token) { return first_ + static_cast<size_t>(token) * graph_.widest; }
  float *second(int token) { return second_ + static_cast<size_t>(token) * shape_.hidden; }
  float *row(int thread) { return space_.scratch[thread].row.data<float>(); }

  Pool &pool_;
  const st_cache &cache_;
  const Graph &graph_;
  const st_graph_description &shape_;
  Workspace &space_;
  const Tile &tile_;
  const Kernels &kernels_;
  const Vectors &vectors_;
  int pitch_;               // of a head's numbers
  int spans_;               // most that a token reads
  size_t mixed_stride_;     // of one head's result over one span
  float *stream_;           // [tokens, hidden]
  char *activations_;       // prepared, of all tokens
  float *first_, *second_;  // [tokens, widest] of the projections into a sublayer; [tokens, hidden] out of it
  float *mixed_;            // [tokens, heads, spans, mixed_stride]
};

}  // namespace strace
