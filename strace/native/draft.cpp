// A whole draft: forward passes of a subgraph, sampling, and the rule of strace/draft.py, over many sequences at once.
#include <algorithm>
#include <vector>

#include "error.h"
#include "model.h"
#include "sampling.h"

namespace strace {
namespace {

double extrapolate(const double *values, int count, int n) {
  const int beyond = std::max(0, n - count + 1);
  return values[n - beyond] + beyond * (values[count - 1] - values[count - 2]);
}

// See GainRule.pays.
bool pays(const st_rule &rule, double survival, int alive, int drawn, int most) {
  if (rule.always) return true;
  const auto full = [&rule](int tokens) { return extrapolate(rule.full_seconds, rule.table, tokens); };
  const double step = extrapolate(rule.draft_seconds, rule.table, alive) / alive;
  const int planned = rule.planned + drawn;
  const double verified = full(planned);
  double gain = 0;
  for (int n = 1; n <= most; ++n) {
    survival *= rule.acceptance[rule.bins];
    gain += survival;
    if (gain >= rule.tokens_per_second * (n * step + full(planned + n) - verified)) return true;
  }
  return false;
}

// One sequence's draft while it is drawn. Of its drafts the first `emitted` count as part of the text.
struct Drafting {
  const st_sampler *sampler;
  const st_limits *limits;
  int64_t *tokens;
  float *confidence, *q;
  int most, drawn, emitted;
  double survival;
  bool ended;

  // Draw a token from a row of logits, which becomes the distribution it was drawn from. Where the row has none that is
  // allowed the draft has ended.
  void draw_token(const Row &row, float coverage, int vocabulary, const st_rule &rule) {
    if (!restrict(row, *sampler, {tokens, drawn}, vocabulary)) {
      ended = true;
      return;
    }
    const bool plain = is_plain(*sampler, drawn);  // its greatest probability need not be found twice
    const float before = plain ? 0 : top_probability(row.values, row.count);
    const float after = shape(row, *sampler, {tokens, drawn});
    const float sure = coverage * (plain ? after : before);
    const int64_t token = row.id(draw(row, *sampler, sampler->position + drawn, Purpose::DRAFT));
    if (sampler->temperature != 0) keep(row, q + static_cast<size_t>(drawn) * vocabulary, vocabulary);
    ended = std::find(rule.stop_ids, rule.stop_ids + rule.stop_count, token) != rule.stop_ids + rule.stop_count;
    if (emitted == drawn && sure >= limits->threshold && !ended)
      ++emitted;
    else
      survival *= rule.acceptance[std::min(static_cast<int>(sure * rule.bins), rule.bins - 1)];
    tokens[drawn] = token;
    confidence[drawn++] = sure;
  }

  bool goes_on(const st_rule &rule, int alive, int drawn_by_all) const {
    const bool emitting = emitted == drawn && limits->threshold <= 1;
    const int left = emitting ? limits->most_emitted - emitted : limits->most_held - (drawn - emitted);
    const int further = std::min({left, limits->room - drawn, most - drawn});
    return !ended && further > 0 && pays(rule, survival, alive, drawn_by_all, further);
  }

 private:
  static void keep(const Row &row, float *q, int vocabulary) {
    if (!row.ids) {
      std::copy(row.values, row.values + row.count, q);
      return;
    }
    std::fill(q, q + vocabulary, 0.0f);
    for (int i = 0; i < row.count; ++i) q[row.ids[i]] = row.values[i];
  }
};

// The pass of the sequences that are still drafting: first all pending tokens, then the last drawn token of each.
struct Step {
  std::vector<int> alive;  // numbers in the draft's batch
  std::vector<int64_t> tokens, tables;
  std::vector<int32_t> counts, starts, rows;
  std::vector<float> logits;

  void begin(const st_batch &batch) {
    alive.clear(), rows.clear();
    int end = 0;
    for (int s = 0; s < batch.sequences; ++s) {
      alive.push_back(s);
      rows.push_back((end += batch.counts[s]) - 1);
    }
  }

  st_batch follow(const st_batch &batch, const std::vector<Drafting> &drafting) {
    tokens.clear(), tables.clear(), counts.clear(), starts.clear(), rows.clear();
    for (const int s : alive) {
      const Drafting &d = drafting[s];
      const int64_t *table = batch.tables + static_cast<size_t>(s) * batch.table_stride;
      rows.push_back(static_cast<int32_t>(rows.size()));
      tokens.push_back(d.tokens[d.drawn - 1]);
      counts.push_back(1);
      starts.push_back(batch.starts[s] + batch.counts[s] + d.drawn - 1);
      tables.insert(tables.end(), table, table + batch.table_stride);
    }
    return {static_cast<int32_t>(alive.size()), batch.table_stride, tokens.data(), counts.data(), starts.data(),
            tables.data()};
  }
};

// Grow to the largest batch once.
thread_local Step step;
thread_local std::vector<Drafting> drafting;

int run(st_runner &runner, const Graph &graph, const st_batch &batch, const st_rule &rule) {
  const st_graph_description &shape = graph.shape;
  const int rows = shape.head.rows;
  Step &now = step;  // this thread's: another one that samples must not look into its own
  std::vector<Drafting> &texts = drafting;
  const auto sampler = [&](int i) { return texts[now.alive[i]].sampler; };
  const auto draw = [&](int i, int) {
    const Row row{now.logits.data() + static_cast<size_t>(i) * rows, rows, shape.token_ids};
    texts[now.alive[i]].draw_token(row, shape.coverage, shape.vocabulary, rule);
  };
  now.begin(batch);
  st_batch pass = batch;
  int steps = 0;
  for (; !now.alive.empty(); ++steps) {
    const int alive = static_cast<int>(now.alive.size());
    now.logits.resize(static_cast<size_t>(alive) * rows);
    check(shape, runner.cache, pass);
    forward(runner, graph, pass, now.rows.data(), alive, now.logits.data(), nullptr);
    share_texts(runner.pool, alive, sampler, draw);
    int drawn = 0;
    for (const Drafting &text : texts) drawn += text.drawn;
    const auto leaves = [&](int s) { return !texts[s].goes_on(rule, alive, drawn); };
    now.alive.erase(std::remove_if(now.alive.begin(), now.alive.end(), leaves), now.alive.end());
    if (!now.alive.empty()) pass = now.follow(batch, texts);
  }
  return steps;
}

}  // namespace
}  // namespace strace

using namespace strace;

int32_t st_draft(st_runner *runner, int32_t number, const st_batch *batch, const st_sampler *samplers,
                 const st_limits *limits, const st_rule *rule, int32_t most, int32_t *counts, int64_t *tokens,
                 float *confidence, float *q) {
  return guarded(-1, [&] {
    const Graph &graph = find_graph(*runner, number);
    drafting.clear();
    for (int s = 0; s < batch->sequences; ++s) {
      const size_t first = static_cast<size_t>(s) * most;
      drafting.push_back({samplers + s, limits + s, tokens + first, confidence + first,
                          q + first * graph.shape.vocabulary, most, 0, 0, 1.0, false});
    }
    const int steps = run(*runner, graph, *batch, *rule);
    for (int s = 0; s < batch->sequences; ++s) counts[s] = drafting[s].drawn;
    return steps;
  });
}
