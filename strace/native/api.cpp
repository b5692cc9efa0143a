// The C interface of native.h: arguments checked, errors kept, then the work of the files beside it.
#include <atomic>
#include <chrono>

#include "error.h"
#include "kernels.h"
#include "layout.h"
#include "model.h"
#include "vectors.h"

using namespace strace;

namespace strace {

std::string &last_error() {
  thread_local std::string message;
  return message;
}

const Graph &find_graph(const st_runner &runner, int32_t number) {
  require(number >= 0 && number < static_cast<int32_t>(runner.graphs.size()), "there is no graph of this number");
  return *runner.graphs[number];
}

}  // namespace strace

st_runner::st_runner(const st_cache &description, int threads)
    : cache(description), cache_layers(description.layer, description.layer + description.layers), pool(threads) {
  cache.layer = cache_layers.data();
  workspace.scratch = std::vector<Scratch>(threads);
}

int32_t st_abi(void) { return ST_ABI; }

const char *st_error(void) { return last_error().c_str(); }

st_runner *st_create(const st_cache *cache, int32_t threads) {
  return guarded(static_cast<st_runner *>(nullptr), [&] {
    check(*cache);
    require(threads >= 1 && threads <= 1024, "a runner has 1 to 1024 threads");
    return new st_runner(*cache, threads);
  });
}

void st_destroy(st_runner *runner) { delete runner; }

int32_t st_add_graph(st_runner *runner, const st_graph_description *graph) {
  return guarded(-1, [&] {
    check(*graph, runner->cache);
    runner->graphs.push_back(std::make_unique<Graph>(*graph));
    return static_cast<int32_t>(runner->graphs.size()) - 1;
  });
}

int32_t st_forward(st_runner *runner, int32_t number, const st_batch *batch, const int32_t *rows, int32_t row_count,
                   float *logits, st_summary *summaries) {
  return guarded(-1, [&] {
    const Graph &graph = find_graph(*runner, number);
    const int tokens = check(graph.shape, runner->cache, *batch);
    require(row_count >= 0, "a negative number of rows");
    for (int i = 0; i < row_count; ++i) require(rows[i] >= 0 && rows[i] < tokens, "a row is not that of a token");
    forward(*runner, graph, *batch, rows, logits || summaries ? row_count : 0, logits, summaries);
    return 0;
  });
}

int32_t st_verify_pass(st_runner *runner, int32_t number, const st_batch *batch, const int32_t *rows, int32_t row_count,
                       int32_t texts, const st_held *held, const st_sampler *samplers, int32_t *standing, int64_t *tokens) {
  return guarded(-1, [&] {
    const st_graph_description &shape = find_graph(*runner, number).shape;
    require(!shape.token_ids, "a short head verifies nothing");
    require(row_count >= 0, "a negative number of rows");
    for (int t = 0; t < texts; ++t)
      require(held[t].row >= 0 && held[t].count >= 0 && held[t].row + held[t].count < row_count, "a text's rows are missing");
    const size_t width = shape.head.rows;
    float *logits = runner->workspace.judged.reserve<float>(row_count * width);
    if (st_forward(runner, number, batch, rows, row_count, logits, nullptr) < 0) return -1;
    return st_verify(runner, logits, shape.head.rows, texts, held, samplers, standing, tokens);
  });
}

int32_t st_multiply(st_runner *runner, const st_matrix *matrix, const float *x, int32_t tokens, float *y) {
  return guarded(-1, [&] {
    require(matrix->format >= ST_FP32 && matrix->format <= ST_INT4 && matrix->rows > 0 && matrix->columns > 0 && tokens > 0,
            "the product is empty or its format unknown");
    const size_t bytes = kernels().activation_bytes(matrix->format, matrix->columns);
    Buffer buffer;
    char *activations = buffer.reserve<char>(bytes * tokens);
    runner->pool.share(tokens, [&](int t, int) {
      kernels().prepare(matrix->format, matrix->columns, x + static_cast<size_t>(t) * matrix->columns,
                        activations + t * bytes);
    });
    runner->pool.share(panels(*matrix), [&](int panel, int) {
      kernels().multiply(*matrix, activations, tokens, panel, panel + 1, y, matrix->rows);
    });
    return 0;
  });
}

double st_read_bandwidth(int32_t threads, const void *memory, size_t bytes) {
  constexpr size_t PIECE = 1 << 20;
  return guarded(-1.0, [&] {
    require(threads >= 1 && threads <= 1024 && bytes % PIECE == 0, "memory is read by 1 to 1024 threads, whole MiB");
    Pool pool(threads);
    const int pieces = static_cast<int>(bytes / PIECE);
    std::atomic<int32_t> all{0};
    const auto start = std::chrono::steady_clock::now();
    pool.share(pieces, [&](int i, int) {
      all ^= vectors().read(static_cast<const char *>(memory) + i * PIECE, PIECE);  // used, so that it is read
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    return static_cast<double>(bytes) / taken.count();
  });
}
