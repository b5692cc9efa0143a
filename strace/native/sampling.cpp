// See sampling.h; and the acceptance rule over a block of drafts.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "error.h"
#include "model.h"
#include "vectors.h"

namespace strace {
namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Memory that grows to the vocabulary once.
struct Scratch {
  std::vector<float> weights, maxima;
  std::vector<double> sums;
  std::vector<int> places;
  std::vector<int64_t> seen, repeated;
  std::vector<uint32_t> allowed;
};
thread_local Scratch scratch;

float greatest(const float *values, int count) { return vectors().greatest(values, count); }

double sum(const float *values, int count) { return vectors().sum(values, count); }

// A token's entry of a row, NULL where a short head has none.
float *entry(const Row &row, int64_t token) {
  int64_t place = token;
  if (row.ids) place = std::lower_bound(row.ids, row.ids + row.count, token) - row.ids;
  return place < row.count && row.id(static_cast<int>(place)) == token ? row.values + place : nullptr;
}

// Divide by the repetition penalty what is above 0 of the tokens seen before, multiply what is below.
void penalise_repetition(const Row &row, const st_sampler &sampler, const std::vector<int64_t> &generated) {
  std::vector<int64_t> &seen = scratch.repeated;
  seen.assign(sampler.prompt, sampler.prompt + sampler.prompt_count);
  seen.insert(seen.end(), generated.begin(), generated.end());
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (const int64_t token : seen)
    if (float *x = entry(row, token))
      *x = *x > 0 ? *x / sampler.repetition_penalty : *x * sampler.repetition_penalty;
}

bool penalises(const st_sampler &sampler) {
  return sampler.presence_penalty != 0 || sampler.frequency_penalty != 0 || sampler.repetition_penalty != 1;
}

// Whether there are tokens that may not be drawn yet behind so many drafts.
bool bars(const st_sampler &sampler, int drafted) { return sampler.position + drafted < sampler.barred_until; }

// The repetition penalty, then presence + frequency * count off every token that was generated before.
void penalise(const Row &row, const st_sampler &sampler, Drafted drafted) {
  std::vector<int64_t> &seen = scratch.seen;
  seen.assign(sampler.history, sampler.history + sampler.history_count);
  seen.insert(seen.end(), drafted.tokens, drafted.tokens + drafted.count);
  std::sort(seen.begin(), seen.end());
  if (sampler.repetition_penalty != 1) penalise_repetition(row, sampler, seen);
  for (auto first = seen.begin(); first != seen.end();) {
    const auto last = std::upper_bound(first, seen.end(), *first);
    if (float *x = entry(row, *first))
      *x -= sampler.presence_penalty + sampler.frequency_penalty * static_cast<float>(last - first);
    first = last;
  }
}

// What the request adds to some logits, and the tokens that may not be drawn yet.
void bias(const Row &row, const st_sampler &sampler, int drafted) {
  for (int i = 0; i < sampler.bias_count; ++i)
    if (float *x = entry(row, sampler.bias_ids[i])) *x += sampler.bias[i];
  if (!bars(sampler, drafted)) return;
  for (int i = 0; i < sampler.barred_count; ++i)
    if (float *x = entry(row, sampler.barred[i])) *x = NEVER;
}

// NEVER for all but the k greatest; of equal ones the first stay.
void keep_top_k(float *values, int count, int k) {
  // The k-th greatest of the maxima of short runs bounds the k-th greatest value from below: few values lie above it.
  constexpr int RUN = 32;
  std::vector<float> &chosen = scratch.maxima;
  chosen.clear();
  for (int i = 0; i < count; i += RUN) chosen.push_back(greatest(values + i, std::min(RUN, count - i)));
  float bound = NEVER;
  if (static_cast<int>(chosen.size()) >= k) {
    std::nth_element(chosen.begin(), chosen.begin() + (k - 1), chosen.end(), std::greater<float>());
    bound = chosen[k - 1];
  }
  chosen.clear();
  for (int i = 0; i < count; ++i)
    if (values[i] >= bound) chosen.push_back(values[i]);
  if (static_cast<int>(chosen.size()) < k) return;  // the others are NaN and weigh nothing
  std::nth_element(chosen.begin(), chosen.begin() + (k - 1), chosen.end(), std::greater<float>());
  const float least = chosen[k - 1];
  long equal = k - std::count_if(chosen.begin(), chosen.begin() + k, [least](float x) { return x > least; });
  for (int i = 0; i < count; ++i)
    if (values[i] < least || (values[i] == least && equal-- <= 0)) values[i] = NEVER;
}

// Weight 0 outside the smallest set of greatest `values` that holds `share` of the weight (e^value); of equal ones the
// first stay.
void keep_top_p(const float *values, float *weights, int count, float share) {
  // Buckets of nearly equal weight by exponent and two bits: only the one in which the share is reached gets sorted.
  constexpr int SHIFT = 21, BUCKETS = (127 << 2) + 1;
  double held[BUCKETS] = {};
  auto bucket = [](float weight) {
    int32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return bits >> SHIFT;
  };
  for (int i = 0; i < count; ++i) held[bucket(weights[i])] += weights[i];
  double wanted = 0, before = 0;
  for (int b = BUCKETS - 1; b >= 0; --b) wanted += held[b];
  wanted *= share;
  int edge = BUCKETS - 1;
  for (; edge > 0 && before + held[edge] < wanted; --edge) before += held[edge];
  std::vector<int> &places = scratch.places;
  places.clear();
  for (int i = 0; i < count; ++i) {
    if (const int b = bucket(weights[i]); b == edge) places.push_back(i);
    else if (b < edge) weights[i] = 0;
  }
  std::sort(places.begin(), places.end(),
            [values](int a, int b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
  for (size_t i = 0; i < places.size(); ++i) {
    const double weight = weights[places[i]];
    // What lies before an entry decides, so the one that reaches the share stays; the best stays whatever the share.
    if (before >= wanted && before > 0) weights[places[i]] = 0;
    before += weight;
  }
}

// The numbers of numpy's Generator(Philox(key=key, counter=[0, 0, purpose, position])).random.
class Noise {
 public:
  Noise(uint64_t key, int64_t position, Purpose purpose)
      : key_(key), position_(static_cast<uint64_t>(position)), purpose_(static_cast<uint64_t>(purpose)) {}

  // Number `index` of them, in [0, 1).
  double at(int64_t index) {
    const uint64_t block = static_cast<uint64_t>(index) / 4 + 1;  // numpy counts up before its first block
    if (block != block_) fill(block);
    return static_cast<double>(words_[index % 4] >> 11) * 0x1p-53;
  }

 private:
  void fill(uint64_t block) {
    uint64_t a = block, b = 0, c = purpose_, d = position_, even = key_, odd = 0;
    for (int round = 0; round < 10; ++round, even += 0x9E3779B97F4A7C15, odd += 0xBB67AE8584CAA73B) {
      const auto first = static_cast<unsigned __int128>(a) * 0xD2E7470EE14C6C93;
      const auto second = static_cast<unsigned __int128>(c) * 0xCA5A826395121157;
      a = static_cast<uint64_t>(second >> 64) ^ b ^ even;
      b = static_cast<uint64_t>(second);
      c = static_cast<uint64_t>(first >> 64) ^ d ^ odd;
      d = static_cast<uint64_t>(first);
    }
    words_[0] = a, words_[1] = b, words_[2] = c, words_[3] = d;
    block_ = block;
  }

  uint64_t key_, position_, purpose_, block_ = 0, words_[4];
};

// argmax of log p + Gumbel, as the greatest p / E with E = -log u exponential.
int race(const Row &row, Noise noise) {
  int winner = 0;
  double best = 0;
  for (int i = 0; i < row.count; ++i) {
    const double p = row.values[i];
    if (p <= 0) continue;
    const double u = noise.at(row.id(i));
    if (p <= best * (1 - u)) continue;  // E >= 1 - u: most entries lose without a logarithm
    if (const double score = p / -std::log(std::max(u, 1e-300)); score > best) best = score, winner = i;
  }
  return winner;
}

// The entry where the cumulative sum reaches a uniform share of the whole.
int invert(const Row &row, double u) {
  constexpr int RUN = 64;
  std::vector<double> &sums = scratch.sums;
  sums.clear();
  double whole = 0, before = 0;
  for (int i = 0; i < row.count; i += RUN) {
    sums.push_back(sum(row.values + i, std::min(RUN, row.count - i)));
    whole += sums.back();
  }
  const double wanted = (1 - u) * whole;  // above 0 and at most the whole: it is always reached
  size_t run = 0;
  for (; run < sums.size() && before + sums[run] < wanted; ++run) before += sums[run];
  int found = 0;
  const int first = static_cast<int>(run) * RUN, end = std::min(first + RUN, row.count);
  for (int i = first; i < end && before < wanted; ++i)
    if (row.values[i] > 0) before += row.values[i], found = i;
  return found;
}

int find_best(const float *values, int count) {
  const float *end = values + count, *best = std::find(values, end, greatest(values, count));
  return best == end ? 0 : static_cast<int>(best - values);  // NaN alone has no greatest
}

}  // namespace

float top_probability(const float *logits, int count) {
  scratch.weights.resize(count);
  vectors().weigh(count, greatest(logits, count), 1, logits, scratch.weights.data());
  return static_cast<float>(1 / sum(scratch.weights.data(), count));
}

bool restrict(const Row &row, const st_sampler &sampler, Drafted drafted, int vocabulary) {
  if (!sampler.allow) return true;
  std::vector<uint32_t> &bits = scratch.allowed;
  bits.assign((vocabulary + 31) / 32, 0);
  if (sampler.allow(drafted.tokens, drafted.count, bits.data()) != 0) return false;
  const auto allows = [&](int i) { return bits[row.id(i) / 32] >> (row.id(i) % 32) & 1; };
  int i = 0;
  while (i < row.count && !allows(i)) ++i;
  if (i == row.count) return false;
  for (i = 0; i < row.count; ++i)
    if (!allows(i)) row.values[i] = NEVER;
  return true;
}

bool is_plain(const st_sampler &sampler, int drafted) {
  return sampler.temperature == 1 && sampler.top_k <= 0 && sampler.top_p >= 1 && sampler.min_p <= 0 &&
         !sampler.bias_count && !penalises(sampler) && !(sampler.barred_count && bars(sampler, drafted));
}

float shape(const Row &row, const st_sampler &sampler, Drafted drafted) {
  const int count = row.count;
  bias(row, sampler, drafted.count);
  if (penalises(sampler)) penalise(row, sampler, drafted);
  if (sampler.temperature == 0) {
    const int best = find_best(row.values, count);
    std::fill(row.values, row.values + count, 0.0f);
    row.values[best] = 1;
    return 1;
  }
  if (sampler.top_k > 0 && sampler.top_k < count) keep_top_k(row.values, count, sampler.top_k);
  scratch.weights.resize(count);
  float *weights = scratch.weights.data();
  const float temperature = std::max(sampler.temperature, std::numeric_limits<float>::min());
  vectors().weigh(count, greatest(row.values, count), temperature, row.values, weights);
  if (sampler.min_p > 0)
    for (int i = 0; i < count; ++i)
      if (weights[i] < sampler.min_p) weights[i] = 0;
  if (sampler.top_p < 1) keep_top_p(row.values, weights, count, sampler.top_p);
  const float scale = static_cast<float>(1 / sum(weights, count));
  for (int i = 0; i < count; ++i) row.values[i] = weights[i] * scale;
  return scale;  // the greatest weighs 1
}

int draw(const Row &row, const st_sampler &sampler, int64_t position, Purpose purpose) {
  if (sampler.shared) return race(row, Noise(sampler.key, position, Purpose::TOKEN));
  return invert(row, Noise(sampler.key, position, purpose).at(0));
}

namespace {

// Whether a draft that was drawn from q stands as a draw from p: with probability min(1, p / q).
bool stands(double p, double q, const st_sampler &sampler, int64_t position) {
  return q <= p || Noise(sampler.key, position, Purpose::ACCEPT).at(0) < p / q;
}

// p -> max(p - q, 0) in place; p stays where they do not differ.
void leave_residual(const Row &p, const float *q) {
  scratch.weights.resize(p.count);
  float *excess = scratch.weights.data();
  for (int i = 0; i < p.count; ++i) excess[i] = std::max(p.values[i] - q[i], 0.0f);
  if (sum(excess, p.count) > 0) std::copy(excess, excess + p.count, p.values);
}

// Of two distributions.
float total_variation(const float *p, const float *q, int count) {
  float lanes[LANES] = {};
  int i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += std::abs(p[i + l] - q[i + l]);
  for (; i < count; ++i) lanes[0] += std::abs(p[i] - q[i]);
  float total = 0;
  for (float lane : lanes) total += lane;
  return total / 2;
}

// How many of a text's drafts stand, and the token after them. rows: the full model's, before each draft and after the
// last; overwritten.
int judge(const st_held &held, float *rows, int vocabulary, const st_sampler &sampler, int64_t *token) {
  for (int i = 0;; ++i) {
    const size_t offset = static_cast<size_t>(i) * vocabulary;
    const Row p{rows + offset, vocabulary, nullptr};
    const int64_t position = sampler.position + i;
    restrict(p, sampler, {held.drafts, i}, vocabulary);
    shape(p, sampler, {held.drafts, i});
    if (i < held.count && held.q && !sampler.shared) {
      const float *q = held.q + offset;
      if (i < held.audited) held.divergences[i] = total_variation(p.values, q, vocabulary);
      if (i < held.emitted || stands(p.values[held.drafts[i]], q[held.drafts[i]], sampler, position)) continue;
      leave_residual(p, q);
      *token = draw(p, sampler, position, Purpose::RESIDUAL);
      return i;
    }
    // Greedily and with shared noise a draft stands where it is the full model's own token.
    *token = draw(p, sampler, position, Purpose::TOKEN);
    const bool same = i < held.count && *token == held.drafts[i];
    if (i < held.audited) held.divergences[i] = !same;
    if (!same && i >= held.emitted) return i;
  }
}

}  // namespace
}  // namespace strace

using namespace strace;

void st_uniform(uint64_t key, int64_t position, int32_t purpose, int32_t count, double *numbers) {
  Noise noise(key, position, static_cast<Purpose>(purpose));
  for (int i = 0; i < count; ++i) numbers[i] = noise.at(i);
}

int32_t st_process(st_runner *, float *logits, int32_t rows, const int64_t *drafts, int32_t vocabulary,
                   const st_sampler *sampler) {
  for (int i = 0; i < rows; ++i) {
    const Row row{logits + static_cast<size_t>(i) * vocabulary, vocabulary, nullptr};
    restrict(row, *sampler, {drafts, i}, vocabulary);
    shape(row, *sampler, {drafts, i});
  }
  return 0;
}

int32_t st_verify(st_runner *runner, float *logits, int32_t vocabulary, int32_t texts, const st_held *held,
                  const st_sampler *samplers, int32_t *standing, int64_t *tokens) {
  const auto settle = [&](int t, int) {
    standing[t] = judge(held[t], logits + static_cast<size_t>(held[t].row) * vocabulary, vocabulary, samplers[t], tokens + t);
  };
  return guarded(-1, [&] {
    share_texts(runner->pool, texts, [&](int t) { return samplers + t; }, settle);
    return 0;
  });
}
