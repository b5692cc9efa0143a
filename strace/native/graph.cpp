// What is copied of a description, and everything that is checked before numbers are trusted as sizes and places.
#include <algorithm>

#include "error.h"
#include "kernels.h"
#include "model.h"
#include "vectors.h"

namespace strace {
namespace {

void check_matrix(const st_matrix &matrix, int64_t rows, int64_t columns, const char *name) {
  require(matrix.format >= ST_FP32 && matrix.format <= ST_INT4, name);
  require(matrix.rows == rows && matrix.columns == columns && matrix.packed, name);
}

// kind 0: no norm; `size` may then be anything.
void check_norm(const st_norm &norm, int64_t size, const char *name) {
  if (norm.kind == 0) return;
  require(norm.kind == ST_RMS || norm.kind == ST_LAYER, name);
  require(norm.size == size && norm.weight, name);
}

void check_head_norm(const st_norm &norm, int head_dim, int heads, const char *name) {
  check_norm(norm, norm.size == head_dim ? head_dim : static_cast<int64_t>(heads) * head_dim, name);
}

void check_attention(const st_graph_description &graph, const st_attention &part, const st_cache &cache) {
  require(part.heads > 0 && part.kv_heads > 0 && part.heads % part.kv_heads == 0,
          "query heads do not share the key/value heads evenly");
  require(part.kv_heads <= cache.kv_heads && part.kept, "more key/value heads than the cache has");
  for (int i = 0; i < part.kv_heads; ++i)
    require(part.kept[i] >= 0 && part.kept[i] < cache.kv_heads, "a kept head is not in the cache");
  require(part.window >= 0, "a window is negative");
  require(graph.rotary_dim == 0 || (part.rope >= 0 && part.rope < graph.ropes), "there is no such rope table");
  const int64_t width = static_cast<int64_t>(part.heads) * graph.head_dim;
  const int64_t both = static_cast<int64_t>(part.heads + 2 * part.kv_heads) * graph.head_dim;
  check_matrix(part.qkv, both, graph.hidden, "qkv does not fit the heads");
  check_matrix(part.o, graph.hidden, width, "o does not fit the heads");
  check_norm(part.norm, graph.hidden, "an attention norm does not fit");
  check_norm(part.post_norm, graph.hidden, "an attention post-norm does not fit");
  check_head_norm(part.q_norm, graph.head_dim, part.heads, "a q norm does not fit");
  check_head_norm(part.k_norm, graph.head_dim, part.kv_heads, "a k norm does not fit");
}

void check_mlp(const st_graph_description &graph, const st_mlp &part) {
  const int64_t neurons = part.down.columns;
  require(neurons > 0, "an MLP has no neurons");
  check_matrix(part.inner, part.gated ? 2 * neurons : neurons, graph.hidden, "an MLP's matrices do not fit");
  check_matrix(part.down, graph.hidden, neurons, "an MLP's matrices do not fit");
  check_norm(part.norm, graph.hidden, "an MLP norm does not fit");
  check_norm(part.post_norm, graph.hidden, "an MLP post-norm does not fit");
}

void check_ends(const st_graph_description &graph) {
  require(graph.head.rows > 0 && graph.head.rows <= graph.vocabulary, "the head does not fit the vocabulary");
  check_matrix(graph.head, graph.head.rows, graph.hidden, "the head does not fit");
  require(graph.final_norm.kind != 0, "there is no final norm");
  check_norm(graph.final_norm, graph.hidden, "the final norm does not fit");
  if (graph.token_ids) {
    for (int i = 0; i < graph.head.rows; ++i)
      require(graph.token_ids[i] > (i ? graph.token_ids[i - 1] : -1) && graph.token_ids[i] < graph.vocabulary,
              "the short head's ids are not ascending ids of the vocabulary");
  } else {
    require(graph.head.rows == graph.vocabulary, "a short head has no token ids");
  }
  check_matrix(graph.embed, graph.vocabulary, graph.hidden, "the embeddings do not fit");
  require(graph.embed.format == ST_FP32 || graph.embed.format == ST_BF16, "the embeddings are not dense");
}

}  // namespace

Graph::Graph(const st_graph_description &description)
    : shape(description),
      layers(description.layer, description.layer + description.layers),
      ropes(description.rope, description.rope + description.ropes),
      widest(padded(description.hidden)),
      most_heads(0),
      activation_bytes(kernels().activation_bytes(description.head.format, description.hidden)) {
  shape.layer = layers.data();
  shape.rope = ropes.data();
  const auto fit = [&](const st_matrix &matrix) {
    widest = std::max({widest, padded(matrix.rows), padded(matrix.columns)});
    activation_bytes = std::max(activation_bytes, kernels().activation_bytes(matrix.format, matrix.columns));
  };
  for (const st_layer &layer : layers) {
    if (layer.attention.present) {
      fit(layer.attention.qkv), fit(layer.attention.o);
      most_heads = std::max(most_heads, layer.attention.heads);
    }
    if (layer.mlp.present) fit(layer.mlp.inner), fit(layer.mlp.down);
  }
}

void check(const st_cache &cache) {
  require(cache.format == ST_FP32 || cache.format == ST_BF16, "a cache is fp32 or bf16");
  require(cache.layers > 0 && cache.blocks > 0 && cache.kv_heads > 0 && cache.layer, "the cache is empty");
  require(cache.head_dim > 0 && cache.head_dim <= MOST_HEAD_DIM, "heads of this size are not supported");
  for (int l = 0; l < cache.layers; ++l)
    require(cache.layer[l].keys && cache.layer[l].values, "the cache lacks keys or values");
}

void check(const st_graph_description &graph, const st_cache &cache) {
  require(graph.layers == cache.layers && graph.layer, "the graph's layers are not the cache's");
  require(graph.head_dim == cache.head_dim, "the graph's head size is not the cache's");
  require(graph.hidden > 0 && graph.context > 0 && graph.vocabulary > 0, "a size is not positive");
  require(graph.rotary_dim >= 0 && graph.rotary_dim <= graph.head_dim && graph.rotary_dim % 2 == 0,
          "rotary_dim does not fit the heads");
  require(graph.ropes >= 0 && (graph.ropes == 0 || graph.rope), "there are no rope tables");
  require(graph.activation >= ST_SILU && graph.activation <= ST_GELU_TANH, "the activation is not known");
  for (int l = 0; l < graph.layers; ++l) {
    if (graph.layer[l].attention.present) check_attention(graph, graph.layer[l].attention, cache);
    if (graph.layer[l].mlp.present) check_mlp(graph, graph.layer[l].mlp);
  }
  check_ends(graph);
}

int check(const st_graph_description &graph, const st_cache &cache, const st_batch &batch) {
  require(batch.sequences > 0 && batch.tokens && batch.counts && batch.starts && batch.tables, "the batch is empty");
  int64_t tokens = 0;
  for (int s = 0; s < batch.sequences; ++s) {
    const int64_t count = batch.counts[s], start = batch.starts[s];
    require(count > 0 && start >= 0, "a sequence has no tokens, or starts before the first position");
    require(start + count <= graph.context, "a sequence is longer than the context");
    const int64_t blocks = (start + count + BLOCK - 1) / BLOCK;
    require(blocks <= batch.table_stride, "a block table is too short");
    const int64_t *table = batch.tables + static_cast<int64_t>(s) * batch.table_stride;
    for (int64_t b = 0; b < blocks; ++b)
      require(table[b] >= 0 && table[b] < cache.blocks, "a block table names a block that the cache does not have");
    tokens += count;
  }
  require(tokens <= INT32_MAX, "the batch has too many tokens");
  for (int64_t i = 0; i < tokens; ++i)
    require(batch.tokens[i] >= 0 && batch.tokens[i] < graph.vocabulary, "a token is not in the vocabulary");
  return static_cast<int>(tokens);
}

}  // namespace strace
