// From logits to tokens: the shaped distribution, the counter-based noise and the draw. The meaning is that of
// strace/sampling.py.
#pragma once

#include <cstdint>

#include "native.h"
#include "pool.h"

namespace strace {

// What a random number is for; numbers of different purposes are independent.
enum class Purpose : uint64_t { TOKEN = 0, DRAFT = 1, ACCEPT = 2, RESIDUAL = 3 };

// The drafts that precede a row, on top of its sampler's history.
struct Drafted {
  const int64_t *tokens;
  int count;
};

// A row of the full vocabulary, or of a short head with its vocabulary ids, ascending.
struct Row {
  float *values;
  int count;
  const int64_t *ids; // NULL: entry i is token i

  int64_t id(int i) const { return ids ? ids[i] : i; }
};

// -inf for what the sampler does not allow behind the drafts. False where nothing of the row would be left; it then stays
// as it was.
bool restrict(const Row &row, const st_sampler &sampler, Drafted drafted, int vocabulary);

// Logits -> probabilities in place, as the sampler wants them; one-hot at temperature 0. Gives the greatest of them.
float shape(const Row &row, const st_sampler &sampler, Drafted drafted);

// Whether the row behind so many drafts is shaped by its logits alone, at temperature 1.
bool is_plain(const st_sampler &sampler, int drafted);

// Greatest probability of a row of logits at temperature 1.
float top_probability(const float *logits, int count);

// The entry drawn from probabilities that need not sum to 1. position: of the token.
int draw(const Row &row, const st_sampler &sampler, int64_t position, Purpose purpose);

// Calls sample(t, thread) for each of so many texts, on all threads; those that ask Python what they may draw
// (`st_sampler.allow`) on the caller's alone. sampler(t): of text t.
template <class SamplerOf, class Sample>
void share_texts(Pool &pool, int texts, SamplerOf &&sampler, Sample &&sample) {
  pool.share(texts, [&](int t, int thread) {
    if (!sampler(t)->allow) sample(t, thread);
  });
  for (int t = 0; t < texts; ++t)
    if (sampler(t)->allow) sample(t, 0);
}

}  // namespace strace
