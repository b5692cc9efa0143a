/* The plain C interface of the native CPU runner: whole decode steps over a paged KV cache in one call.
 *
 * Nothing here knows torch. The caller owns every pointer it passes and keeps it alive: those inside a graph for as long
 * as the graph lives, all others for the call. Calls on one runner come from one thread at a time. A call that can fail
 * gives NULL or a negative number, and `st_error` the reason.
 *
 * Batch-invariant: the bits of an output row depend on its own sequence's tokens alone, never on how many tokens or
 * sequences share the pass, on chunking, or on the number of threads.
 */
#ifndef STRACE_NATIVE_H
#define STRACE_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define ST_ABI 6 /* raised whenever a struct or a signature changes */

/* fp32 and bf16 take activations of their own precision; int8 and int4 take int8 activations, one float32 scale per 32
 * (scale = max |x| / 127, round half to even). All accumulate in float32 (int8 products exactly, in int32, per 32). */
enum { ST_FP32 = 1, ST_BF16 = 2, ST_INT8 = 3, ST_INT4 = 4 };
enum { ST_RMS = 1, ST_LAYER = 2 };
enum { ST_SILU = 1, ST_GELU = 2, ST_GELU_TANH = 3 };

typedef struct {
  int32_t format, rows, columns;
  const void *packed; /* by st_pack_dense or st_pack_codes */
  const float *bias;  /* [rows] or NULL */
} st_matrix;

typedef struct {
  int32_t kind, size; /* 0: no norm here */
  const float *weight, *bias;
} st_norm;

typedef struct {
  st_norm norm, post_norm; /* before the sublayer; after it, before it is added to the stream */
  st_norm q_norm, k_norm;  /* size head_dim: per head; size heads * head_dim: over all of them at once */
  st_matrix qkv, o;        /* qkv: kept query heads' rows, then key heads', then value heads' */
  int32_t present, heads, kv_heads;
  const int32_t *kept;     /* [kv_heads]: their numbers in the cache */
  int32_t window;          /* tokens, 0: unbounded */
  int32_t rope;            /* number of the rope table */
} st_attention;

typedef struct {
  st_norm norm, post_norm;
  st_matrix inner, down;  /* inner: the gate's rows, then the up rows; only the up rows where not gated */
  int32_t present, gated;
} st_mlp;

typedef struct {
  st_attention attention;
  st_mlp mlp;
} st_layer;

typedef struct {
  const float *cos, *signed_sin; /* [context, rotary_dim]; the first half of signed_sin is negated */
} st_rope;

typedef struct {
  int32_t layers, hidden, head_dim, rotary_dim, vocabulary, context, activation, parallel, ropes;
  float norm_eps, embed_scale, attention_scale, attention_cap, logit_cap; /* a cap of 0: none */
  const st_layer *layer;       /* [layers] */
  const st_rope *rope;         /* [ropes] */
  st_matrix embed;             /* [vocabulary, hidden], dense, without bias; a tied head is packed once, for both */
  const float *position_embed; /* [context, hidden] or NULL */
  st_norm final_norm;
  st_matrix head;
  const int64_t *token_ids;    /* [head.rows] vocabulary ids of a short head, ascending, or NULL */
  float coverage;              /* share of the full model's probability on those rows */
} st_graph_description;

/* Keys and values of one layer, [blocks, kv_heads, 32, head_dim], keys after rope. */
typedef struct {
  void *keys, *values;
} st_layer_cache;

typedef struct {
  int32_t format, layers, blocks, kv_heads, head_dim; /* format: ST_FP32 or ST_BF16 */
  const st_layer_cache *layer;
} st_cache;

/* Ragged, concatenated tokens of `sequences` sequences; all before `starts` is in the cache. */
typedef struct {
  int32_t sequences, table_stride;
  const int64_t *tokens;  /* [sum of counts] */
  const int32_t *counts, *starts; /* [sequences] */
  const int64_t *tables;  /* [sequences, table_stride] block numbers */
} st_batch;

typedef struct st_runner st_runner;

int32_t st_abi(void);
const char *st_error(void); /* of this thread's last failed call */
/* the kernels in use: "avx512amx", "avx512bf16", "avx512vnni", "avx2" or "portable"; STRACE_ISA asks for other ones */
const char *st_isa(void);

/* weight [rows, columns], fp32 or bf16 (weight_format), rounded to int8 or int4 as strace/linear.py does, to the bit; codes
 * and scales as st_pack_codes takes them. int4 takes whole groups of columns. */
int32_t st_quantise(int32_t format, int32_t rows, int32_t columns, int32_t weight_format, const void *weight,
                    int8_t *codes, uint16_t *scales);
size_t st_packed_bytes(int32_t format, int32_t rows, int32_t columns);
/* weight: [rows, columns] in the format's own type. out: 64-byte aligned. */
int32_t st_pack_dense(int32_t format, int32_t rows, int32_t columns, const void *weight, void *out);
/* codes [rows, columns]; scales: bf16 [rows, groups], groups of 32 columns for int4, one per row for int8. */
int32_t st_pack_codes(int32_t format, int32_t rows, int32_t columns, const int8_t *codes, const uint16_t *scales, void *out);
/* y [tokens, rows] = x [tokens, columns] W^T + b: what the runner's products are, for tests. */
int32_t st_multiply(st_runner *runner, const st_matrix *matrix, const float *x, int32_t tokens, float *y);
/* bytes/s at which so many threads read memory once, whole MiB of it: what no pass can outdo. Negative: it failed. */
double st_read_bandwidth(int32_t threads, const void *memory, size_t bytes);

st_runner *st_create(const st_cache *cache, int32_t threads);
void st_destroy(st_runner *runner);
/* The graph's number; the description's structs are copied, the arrays they point to are not. */
int32_t st_add_graph(st_runner *runner, const st_graph_description *graph);

/* What a greedy caller needs of a row instead of its logits; the probability and the entropy (nats) at temperature 1. */
typedef struct {
  int64_t token; /* vocabulary id; ties go to the lowest */
  float probability, gap, entropy; /* gap: between the two best logits */
} st_summary;

/* One pass. rows [row_count]: positions of the concatenated tokens that want logits [row_count, head.rows of the graph];
 * a caller that wants summaries instead gives logits NULL, and either may be NULL. */
int32_t st_forward(st_runner *runner, int32_t graph, const st_batch *batch, const int32_t *rows, int32_t row_count,
                   float *logits, st_summary *summaries);

/* How one sequence's distributions are shaped and drawn from; the meaning is strace/sampling.py's. */
typedef struct {
  float temperature, top_p, presence_penalty, frequency_penalty, min_p, repetition_penalty;
  int32_t top_k, shared; /* shared: one noise for draft and full model (a seed was asked for) */
  uint64_t key;
  int64_t position;      /* of the next token to be drawn */
  int64_t barred_until;  /* no token before this position is one of `barred` */
  const int64_t *history; /* generated tokens that the penalties count */
  const int64_t *prompt;  /* tokens before them, which the repetition penalty counts too */
  const int64_t *barred;
  const int64_t *bias_ids; /* what is added to their logits: */
  const float *bias;
  int32_t history_count, prompt_count, barred_count, bias_count;
  /* NULL, or sets the bits (lowest first, [vocabulary / 32] rounded up) of the only tokens that may follow `drafts`
   * [count], and gives 0. A row that would be left without any is not restricted, and is not drafted from. */
  int32_t (*allow)(const int64_t *drafts, int32_t count, uint32_t *bits);
} st_sampler;

/* Where one sequence's draft ends; this and the rule: strace/draft.py. */
typedef struct {
  int32_t most_held, most_emitted, room;
  float threshold;  /* a draft of at least this confidence is emitted while none is held; above 1: never */
} st_limits;

/* The rule of expected gain: another draft is drawn while some number of further ones is expected to pay. */
typedef struct {
  int32_t always;               /* draw up to the limits, whatever it brings */
  double tokens_per_second;
  const double *full_seconds, *draft_seconds; /* [table]: pass over so many tokens, linear beyond by the last slope */
  int32_t table, planned, stop_count, bins;
  const double *acceptance;     /* [bins + 1] by confidence; the last over all */
  const int64_t *stop_ids;
} st_rule;

/* Draft: the batch's pending tokens, then token by token while any sequence goes on. Arrays [sequences, most];
 * q [sequences, most, vocabulary], left alone where the temperature is 0 (q is then one-hot). No sequence draws more
 * than `most`. Gives the number of steps. */
int32_t st_draft(st_runner *runner, int32_t graph, const st_batch *batch, const st_sampler *samplers,
                 const st_limits *limits, const st_rule *rule, int32_t most, int32_t *counts, int64_t *tokens,
                 float *confidence, float *q);

/* The first `count` random numbers of a token's position and purpose (strace/sampling.py), for tests. */
void st_uniform(uint64_t key, int64_t position, int32_t purpose, int32_t count, double *numbers);
/* Logits [rows, vocabulary] of successive positions -> the distributions that tokens are drawn from, in place, for tests;
 * drafts [rows - 1] lie between them. */
int32_t st_process(st_runner *runner, float *logits, int32_t rows, const int64_t *drafts, int32_t vocabulary,
                   const st_sampler *sampler);
/* One text's drafts [count] for the full model to judge. row: of the logits, the one before the first draft; `count` more
 * follow it. q [count, vocabulary], NULL: greedy. The first `emitted` of them stand whatever it says. divergences
 * [audited]: set for the first drafts, up to the first that falls. */
typedef struct {
  int32_t row, count, emitted, audited;
  const int64_t *drafts;
  const float *q;
  float *divergences;
} st_held;

/* Settle the drafts of many texts: logits [rows, vocabulary] of the full model, overwritten. Per text, how many of its
 * drafts stand, and the full model's token after them. */
int32_t st_verify(st_runner *runner, float *logits, int32_t vocabulary, int32_t texts, const st_held *held,
                  const st_sampler *samplers, int32_t *standing, int64_t *tokens);
/* `st_forward` of a graph that has a row for every id, and `st_verify` of its rows, which nobody else gets to see. */
int32_t st_verify_pass(st_runner *runner, int32_t graph, const st_batch *batch, const int32_t *rows, int32_t row_count,
                       int32_t texts, const st_held *held, const st_sampler *samplers, int32_t *standing, int64_t *tokens);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
