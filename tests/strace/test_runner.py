"""The runner: the contract between full model and subgraphs over one cache, batches, and the draft loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Attention, Decoder
from strace.kv import BLOCK, Batch
from strace.linear import Linear
from strace.runner import FULL, TorchRunner
from tests.tiny import keep_heads, make_runner, random_tokens, save_tiny, scatter_blocks

KEPT: list[list[int] | None] = [[1], None, [0, 2]]
SUBGRAPH = "code"
POISON = 1e4


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = save_tiny(tmp_path_factory.mktemp("model"), num_attention_heads=8, num_key_value_heads=4)
    return load_decoder(open_checkpoint(str(folder)), "fp32")


@pytest.fixture(scope="module")
def graphs(full: Decoder) -> dict[str, Decoder]:
    return {FULL: full, SUBGRAPH: keep_heads(full, KEPT)}


def step(tokens: Tensor, start: int, table: Tensor) -> Batch:
    """A pass over one sequence."""
    return Batch(tokens.tolist(), [len(tokens)], [start], table[None])


def every(batch: Batch) -> list[int]:
    return list(range(len(batch.tokens)))


def entries(runner: TorchRunner) -> list[Tensor]:
    return [*runner.cache.keys, *runner.cache.values]


def poison_past(runner: TorchRunner, table: Tensor, verified: int) -> None:
    """Large finite values wherever nothing verified of this sequence lies, other blocks included."""
    for tensor in entries(runner):
        clean = torch.full_like(tensor, POISON)
        for position in range(verified):
            slot = table[position // BLOCK], slice(None), position % BLOCK
            clean[slot] = tensor[slot]
        tensor.copy_(clean)


@pytest.mark.parametrize("graph", [FULL, SUBGRAPH])
@pytest.mark.parametrize("verified", [1, 31, 32, 50])
def test_unverified_full_entries_are_never_read(graphs: dict[str, Decoder], graph: str, verified: int) -> None:
    text = random_tokens(verified + 6)
    outcomes = []
    for poisoned in (False, True):
        runner = make_runner(graphs)
        (table,) = scatter_blocks([len(text)], runner.cache.blocks)
        runner.forward(FULL, step(text[:verified], 0, table), [0])
        if poisoned:
            poison_past(runner, table, verified)
        first = runner.forward(graph, step(text[verified : verified + 3], verified, table), [0, 1, 2])
        rest = [runner.forward(graph, step(text[i : i + 1], i, table), [0]) for i in range(verified + 3, len(text))]
        outcomes.append(torch.cat([first, *rest]))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("verified", [1, 31, 32, 50])
def test_provisional_entries_are_overwritten_by_a_full_pass(graphs: dict[str, Decoder], verified: int) -> None:
    text = random_tokens(verified + 6)
    outcomes, caches = [], []
    for drafted in (False, True):
        runner = make_runner(graphs)
        (table,) = scatter_blocks([len(text)], runner.cache.blocks)
        runner.forward(FULL, step(text[:verified], 0, table), [0])
        if drafted:
            runner.forward(SUBGRAPH, step(text[verified:], verified, table), [0])
            poison_past(runner, table, verified)
        sync = step(text[verified:], verified, table)
        outcomes.append(runner.forward(FULL, sync, every(sync)))
        blocks = table[torch.arange(len(text)) // BLOCK]
        caches.append([tensor[blocks, :, torch.arange(len(text)) % BLOCK] for tensor in entries(runner)])
    assert torch.equal(*outcomes)
    assert all(torch.equal(plain, redone) for plain, redone in zip(*caches, strict=True))


@dataclass
class Recorded:
    """Dense causal attention in plain torch that keeps the keys and values of a text, or goes on after those kept."""

    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen[layer] = k, v
        if self.before:
            kept = slice(None) if attention.kept is None else attention.kept
            k, v = (torch.cat([old[:, kept], new]) for old, new in zip(self.before[layer], (k, v), strict=True))
        group, past = q.shape[1] // k.shape[1], len(k) - len(q)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(past + 1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@torch.inference_mode()
def test_subgraph_reads_the_full_entries_of_its_kept_heads(graphs: dict[str, Decoder]) -> None:
    text, verified = random_tokens(60), 45
    recorder = Recorded()
    graphs[FULL].streams(text[:verified], torch.arange(verified), recorder)
    prefix = [recorder.seen[l] for l in range(3)]
    subgraph = graphs[SUBGRAPH]
    streams = subgraph.streams(text[verified:], torch.arange(verified, 60), Recorded(prefix))

    runner = make_runner(graphs)
    (table,) = scatter_blocks([60], runner.cache.blocks)
    runner.forward(FULL, step(text[:verified], 0, table), [0])
    draft = step(text[verified:], verified, table)
    assert (runner.forward(SUBGRAPH, draft, every(draft)) - subgraph.logits(streams)).abs().max() <= 1e-5


@settings(max_examples=25)
@given(st.data())
def test_subgraph_writes_only_its_heads_in_its_own_slots(full: Decoder, data: st.DataObject) -> None:
    sizes = st.lists(st.integers(1, 5), min_size=3, max_size=3)
    counts, starts = data.draw(sizes), data.draw(st.lists(st.integers(0, 70), min_size=3, max_size=3))
    some = st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(sorted)
    kept = data.draw(st.lists(some, min_size=3, max_size=3))
    seed = data.draw(st.integers(0, 1000))
    runner = make_runner({FULL: full, SUBGRAPH: keep_heads(full, kept)}, blocks=24)
    for tensor in entries(runner):
        tensor.normal_(generator=torch.Generator().manual_seed(seed))
    before = [tensor.clone() for tensor in entries(runner)]
    tables = scatter_blocks([s + n for s, n in zip(starts, counts, strict=True)], 24, seed)
    present = [0, 2]
    tokens = random_tokens(counts[0] + counts[2], seed)
    batch = Batch(tokens.tolist(), [counts[s] for s in present], [starts[s] for s in present], tables[present])
    runner.forward(SUBGRAPH, batch, [0])
    for l, (was, now) in enumerate(zip(before, entries(runner), strict=True)):
        allowed = torch.zeros_like(was, dtype=torch.bool)
        for s in present:
            for position in range(starts[s], starts[s] + counts[s]):
                allowed[tables[s, position // BLOCK], kept[l % 3] or [], position % BLOCK] = True
        assert torch.equal(was != now, allowed)


@pytest.mark.parametrize("graph", [FULL, SUBGRAPH])
def test_a_batch_equals_each_sequence_alone(graphs: dict[str, Decoder], graph: str) -> None:
    lengths, counts = [70, 33, 5, 64], [1, 4, 5, 2]
    texts = [random_tokens(n, seed=n) for n in lengths]
    starts = [n - c for n, c in zip(lengths, counts, strict=True)]
    batched, alone = make_runner(graphs), make_runner(graphs)
    tables = scatter_blocks(lengths, batched.cache.blocks)
    expected = []
    for text, start, table in zip(texts, starts, tables, strict=True):
        for runner in (batched, alone) if start else ():
            runner.forward(FULL, step(text[:start], 0, table), [0])
        last = step(text[start:], start, table)
        expected.append(alone.forward(graph, last, every(last)))
    tokens = torch.cat([t[s:] for t, s in zip(texts, starts, strict=True)]).tolist()
    batch = Batch(tokens, counts, starts, tables)
    got = batched.forward(graph, batch, every(batch))
    assert (got - torch.cat(expected)).abs().max() <= 1e-5


def test_rows_are_given_in_the_order_asked(graphs: dict[str, Decoder]) -> None:
    text = random_tokens(10)
    runner = make_runner(graphs)
    (table,) = scatter_blocks([10], runner.cache.blocks)
    whole = runner.forward(FULL, step(text, 0, table), list(range(10)))
    assert whole.dtype == torch.float32
    assert torch.allclose(runner.forward(FULL, step(text, 0, table), [7, 2]), whole[[7, 2]], atol=1e-6)


def shorten_head(decoder: Decoder, ids: list[int], coverage: float) -> Decoder:
    head = Linear(decoder.head.dense()[ids].to(decoder.dtype), None, decoder.dtype)
    return replace(decoder, head=head, token_ids=torch.tensor(ids), coverage=coverage)


def test_a_short_head_gives_minus_infinity_elsewhere(full: Decoder) -> None:
    ids = [3, 17, 256]
    runner = make_runner({FULL: full, SUBGRAPH: shorten_head(full, ids, 0.5)})
    (table,) = scatter_blocks([4], runner.cache.blocks)
    batch = step(random_tokens(4), 0, table)
    whole, short = (runner.forward(graph, batch, [1, 3]) for graph in (FULL, SUBGRAPH))
    assert short.shape == whole.shape
    assert torch.allclose(short[:, ids], whole[:, ids], atol=1e-6)
    others = torch.ones(whole.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
    assert (short[:, others] == -torch.inf).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_quantised_copy_shares_what_is_no_matrix(full: Decoder, format: str) -> None:
    copy = quantise_decoder(full, format)
    assert copy.embed is full.embed
    assert copy.final_norm is full.final_norm
    assert copy.head.format == format
    assert copy.bytes_per_step < full.bytes_per_step / 3
    runner = make_runner({FULL: full, SUBGRAPH: copy})
    (table,) = scatter_blocks([30], runner.cache.blocks)
    batch = step(random_tokens(30), 0, table)
    whole, draft = (runner.forward(graph, batch, every(batch)).log_softmax(-1) for graph in (FULL, SUBGRAPH))
    assert F.kl_div(draft, whole, log_target=True, reduction="batchmean") < 0.3
