// One pass of a graph over a ragged batch: every layer of every token, from token ids to logits. A pass of more than
// TILE tokens goes tile by tile, each reading what the ones before it left in the cache.
#include "pass.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "layout.h"

namespace strace {
namespace {

constexpr int TILE = 64;
constexpr int FEW = 2;  // tokens whose norms, activations and the like take less time than to share them out
constexpr size_t MOST_BYTES = 256 << 10;  // of weights, that a thread takes at a time
constexpr size_t CACHE_LINE = 64;

// A row of a dense matrix.
void read_row(const st_matrix &matrix, int row, float *out) {
  const char *panel = static_cast<const char *>(matrix.packed) + row / PANEL * panel_bytes(matrix.format, matrix.columns);
  const int inputs = matrix.format == ST_FP32 ? 1 : 2;  // a step
  for (int k = 0; k < matrix.columns; ++k) {
    const char *step = panel + k / inputs * STEP_BYTES + row % PANEL * 4;
    if (inputs == 1) {
      std::memcpy(out + k, step, sizeof(float));
    } else {
      uint16_t half;
      std::memcpy(&half, step + k % 2 * sizeof half, sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(out + k, &bits, sizeof bits);
    }
  }
}

// The next tokens of the batch, from token `first` on.
void fill(Tile &tile, const st_batch &batch, int first, int count) {
  tile.tokens = batch.tokens + first;
  tile.count = count;
  tile.runs.clear();
  tile.run_of.clear();
  for (int s = 0, before = 0; s < batch.sequences; before += batch.counts[s++]) {
    const int begin = std::max(before, first), end = std::min(before + batch.counts[s], first + count);
    if (begin >= end) continue;
    tile.run_of.insert(tile.run_of.end(), end - begin, static_cast<int>(tile.runs.size()));
    tile.runs.push_back({begin - first, end - begin, batch.starts[s] + begin - before,
                         batch.tables + static_cast<size_t>(s) * batch.table_stride});
  }
}

void run_tile(st_runner &runner, const Graph &graph, int first, const int32_t *rows, int row_count, float *logits,
              st_summary *summaries) {
  Workspace &space = runner.workspace;
  const int tokens = space.tile.count;
  const size_t width = graph.shape.head.rows;
  Pass pass(runner, graph);
  pass.run_layers();
  const auto is_here = [&](int row) { return row >= first && row < first + tokens; };
  for (int r = 0; r < row_count;) {
    // Rows that follow one another in the result, at most as many as there is room for.
    space.places.clear();
    const int begin = r;
    for (; r < row_count && r < begin + tokens && is_here(rows[r]); ++r) space.places.push_back(rows[r] - first);
    if (r == begin) {
      ++r;
      continue;
    }
    float *out = logits ? logits + begin * width : space.logits.reserve<float>(tokens * width);
    pass.run_head(space.places.data(), r - begin, out, summaries ? summaries + begin : nullptr);
  }
}

}  // namespace

Buffer::~Buffer() { ::operator delete(memory_, std::align_val_t(CACHE_LINE)); }

void *Buffer::reserve_bytes(size_t bytes) {
  if (bytes <= bytes_) return memory_;
  ::operator delete(memory_, std::align_val_t(CACHE_LINE));
  memory_ = nullptr, bytes_ = 0;
  memory_ = ::operator new(bytes, std::align_val_t(CACHE_LINE));
  bytes_ = bytes;
  return memory_;
}

Pass::Pass(st_runner &runner, const Graph &graph)
    : pool_(runner.pool),
      cache_(runner.cache),
      graph_(graph),
      shape_(graph.shape),
      space_(runner.workspace),
      tile_(space_.tile),
      kernels_(kernels()),
      vectors_(vectors()),
      pitch_(padded(shape_.head_dim)),
      spans_(0),
      mixed_stride_(pitch_ + LANES) {
  for (const Run &run : tile_.runs) spans_ = std::max(spans_, (run.start + run.count - 1) / SPAN + 1);
  const size_t tokens = tile_.count;
  stream_ = space_.stream.reserve<float>(tokens * shape_.hidden);
  activations_ = space_.activations.reserve<char>(tokens * graph.activation_bytes);
  first_ = space_.first.reserve<float>(tokens * graph.widest);
  second_ = space_.second.reserve<float>(tokens * shape_.hidden);
  mixed_ = space_.mixed.reserve<float>(tokens * graph.most_heads * spans_ * mixed_stride_);
  for (Scratch &scratch : space_.scratch) {
    scratch.row.reserve<float>(graph.widest);
    scratch.wide.reserve<float>(graph.widest);
    scratch.queries.reserve<float>(tokens * graph.most_heads * pitch_);
  }
}

template <class Piece>
void Pass::each(int count, Piece &&piece) {
  if (count > FEW) return pool_.share(count, piece);
  for (int i = 0; i < count; ++i) piece(i, 0);
}

void Pass::multiply(const st_matrix &matrix, int count, float *y, size_t stride) {
  const size_t most = MOST_BYTES / panel_bytes(matrix.format, matrix.columns);
  pool_.share_runs(panels(matrix), std::max(1, static_cast<int>(most)), [&](int first, int last, int) {
    kernels_.multiply(matrix, activations_, count, first, last, y, stride);
  });
}

void Pass::run_layers() {
  each(tile_.count, [&](int t, int) { embed(t); });
  const st_norm *pending = nullptr;  // the post-norm of what waits to be added to the stream
  for (int l = 0; l < shape_.layers; ++l) {
    const st_layer &layer = shape_.layer[l];
    if (layer.attention.present) {
      run_attention(l, pending);
      pending = &layer.attention.post_norm;
    }
    if (layer.mlp.present) {
      run_mlp(l, pending);
      pending = &layer.mlp.post_norm;
    }
  }
  if (pending) each(tile_.count, [&](int t, int thread) { leave(t, *pending, thread); });
}

void Pass::run_attention(int l, const st_norm *pending) {
  const st_attention &part = shape_.layer[l].attention;
  each(tile_.count, [&](int t, int thread) {
    if (pending) leave(t, *pending, thread);
    enter(t, t, part.norm, part.qkv, thread);
  });
  multiply(part.qkv, tile_.count, first_, graph_.widest);
  share_attention(l);
  each(tile_.count, [&](int t, int thread) {
    merge(part, t, row(thread));
    prepare(row(thread), t, part.o);
  });
  multiply(part.o, tile_.count, second_, shape_.hidden);
}

void Pass::run_mlp(int l, const st_norm *pending) {
  const st_mlp &part = shape_.layer[l].mlp;
  const bool parallel = shape_.parallel && shape_.layer[l].attention.present;
  each(tile_.count, [&](int t, int thread) {
    if (parallel) enter(t, t, part.norm, part.inner, thread);
    if (pending) leave(t, *pending, thread);
    if (!parallel) enter(t, t, part.norm, part.inner, thread);
  });
  multiply(part.inner, tile_.count, first_, graph_.widest);
  each(tile_.count, [&](int t, int thread) {
    vectors_.activate(shape_.activation, part.gated, part.down.columns, first(t), row(thread));
    prepare(row(thread), t, part.down);
  });
  multiply(part.down, tile_.count, second_, shape_.hidden);
}

void Pass::run_head(const int *places, int count, float *logits, st_summary *summaries) {
  const size_t width = shape_.head.rows;
  each(count, [&](int i, int thread) { enter(places[i], i, shape_.final_norm, shape_.head, thread); });
  multiply(shape_.head, count, logits, width);
  if (shape_.logit_cap == 0 && !summaries) return;
  pool_.share(count, [&](int i, int) {
    float *row = logits + i * width;
    if (shape_.logit_cap != 0) vectors_.cap(shape_.logit_cap, shape_.head.rows, row);
    if (!summaries) return;
    summaries[i] = vectors_.summarise(row, shape_.head.rows);
    if (shape_.token_ids) summaries[i].token = shape_.token_ids[summaries[i].token];
  });
}

void Pass::embed(int token) {
  float *x = stream(token);
  read_row(shape_.embed, static_cast<int>(tile_.tokens[token]), x);
  for (int i = 0; i < shape_.hidden; ++i) x[i] *= shape_.embed_scale;
  if (shape_.position_embed)
    vectors_.add(shape_.hidden, shape_.position_embed + static_cast<size_t>(tile_.position(token)) * shape_.hidden, x);
}

// What a product reads of the stream.
void Pass::enter(int token, int place, const st_norm &norm, const st_matrix &matrix, int thread) {
  if (norm.kind == 0) return prepare(stream(token), place, matrix);
  vectors_.normalise(norm, shape_.norm_eps, stream(token), row(thread));
  prepare(row(thread), place, matrix);
}

// Adds what a sublayer gave.
void Pass::leave(int token, const st_norm &post_norm, int thread) {
  if (post_norm.kind == 0) return vectors_.add(shape_.hidden, second(token), stream(token));
  vectors_.normalise(post_norm, shape_.norm_eps, second(token), row(thread));
  vectors_.add(shape_.hidden, row(thread), stream(token));
}

void Pass::prepare(const float *row, int place, const st_matrix &matrix) {
  const size_t bytes = kernels_.activation_bytes(matrix.format, matrix.columns);
  kernels_.prepare(matrix.format, matrix.columns, row, activations_ + place * bytes);
}

void forward(st_runner &runner, const Graph &graph, const st_batch &batch, const int32_t *rows, int row_count,
             float *logits, st_summary *summaries) {
  int tokens = 0;
  for (int s = 0; s < batch.sequences; ++s) tokens += batch.counts[s];
  for (int first = 0; first < tokens; first += TILE) {
    fill(runner.workspace.tile, batch, first, std::min(TILE, tokens - first));
    run_tile(runner, graph, first, rows, row_count, logits, summaries);
  }
}

}  // namespace strace
