// A runner: its graphs, its cache, its threads and the memory of a pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "native.h"
#include "pool.h"

namespace strace {

// A description and what of it is owned; the weights stay the caller's.
struct Graph {
  explicit Graph(const st_graph_description &description);

  st_graph_description shape;
  std::vector<st_layer> layers;
  std::vector<st_rope> ropes;
  int widest;               // most rows or columns of a matrix other than the head's rows, in whole vectors
  int most_heads;           // query heads of a layer
  size_t activation_bytes;  // most that a token's prepared activations take
};

// Each throws std::invalid_argument where what it is given cannot be run. The last gives the batch's number of tokens.
void check(const st_cache &cache);
void check(const st_graph_description &graph, const st_cache &cache);
int check(const st_graph_description &graph, const st_cache &cache, const st_batch &batch);

// Cache-line aligned memory that only grows; what it held is lost when it does.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  template <class T>
  T *reserve(size_t count) {
    return static_cast<T *>(reserve_bytes(count * sizeof(T)));
  }
  template <class T>
  T *data() const {
    return static_cast<T *>(memory_);
  }

 private:
  void *reserve_bytes(size_t bytes);

  void *memory_ = nullptr;
  size_t bytes_ = 0;
};

// The tokens of one sequence in a tile.
struct Run {
  int first, count;  // in the tile
  int start;         // position of the first
  const int64_t *table;
};

// Tokens that go through the layers together.
struct Tile {
  const int64_t *tokens;
  int count;
  std::vector<Run> runs;
  std::vector<int> run_of;  // [count]

  const Run &run(int token) const { return runs[run_of[token]]; }
  int position(int token) const { return run(token).start + token - run(token).first; }
};

// What one thread works in.
struct Scratch {
  Buffer row, wide, queries;
};

// The memory of a pass; see pass.h.
struct Workspace {
  Tile tile;
  std::vector<int> places;  // the tile's tokens that logits are wanted of
  Buffer stream, activations, first, second, mixed, logits;
  Buffer judged;                 // logits of the rows of st_verify_pass
  std::vector<Scratch> scratch;  // one per thread
};

}  // namespace strace

struct st_runner {
  st_runner(const st_cache &description, int threads);

  st_cache cache;
  std::vector<st_layer_cache> cache_layers;
  std::vector<std::unique_ptr<strace::Graph>> graphs;
  strace::Workspace workspace;
  strace::Pool pool;
};

namespace strace {

// The graph of this number; throws std::invalid_argument where there is none.
const Graph &find_graph(const st_runner &runner, int32_t number);

// One pass over a batch that `check` has let through; see st_forward. Rows must be those of tokens.
void forward(st_runner &runner, const Graph &graph, const st_batch &batch, const int32_t *rows, int row_count,
             float *logits, st_summary *summaries);

}  // namespace strace
