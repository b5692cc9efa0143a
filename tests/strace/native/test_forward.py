"""The native runner against the torch runner: families, formats, ragged shapes, cache states, subgraphs.

Bounds are on logits of standard deviation 1 to 3: in fp32 what another order of sums may give; in bf16 and in the
formats with int8 activations the rounding of activations between products too, which the two runners do not share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strace.checkpoint import quantise_decoder
from strace.decoder import Decoder
from strace.kv import Batch
from strace.native_runner import NativeRunner
from strace.runner import FULL, TorchRunner
from tests.strace.native.passes import (
    BLOCKS,
    SUBGRAPH,
    cut,
    fill_cache,
    load_tiny,
    make_batch,
    make_native,
    narrow,
    run_all,
)
from tests.tiny import KINDS, make_runner

POISON = 1e4
SHORT = [3, 17, 31, 32, 256]


def make_pair(graphs: dict[str, Decoder], seed: int = 0) -> tuple[NativeRunner, TorchRunner]:
    """Both runners over caches of the same random entries."""
    pair = make_native(graphs), make_runner(graphs, BLOCKS)
    fill_cache(*pair, seed=seed)
    return pair


def differ(graphs: dict[str, Decoder], graph: str, batch: Batch, seed: int = 0) -> float:
    """The root mean square of the difference of the two runners' finite logits, and agreement on the others."""
    ours, theirs = (run_all(runner, graph, batch) for runner in make_pair(graphs, seed))
    assert ours.shape == theirs.shape
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    finite = theirs.isfinite()
    return float((ours - theirs)[finite].square().mean().sqrt())


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("graph", [FULL, SUBGRAPH])
def test_every_family_equals_torch(family: str, graph: str) -> None:
    full = load_tiny(family)
    graphs = {FULL: full, SUBGRAPH: cut(full, SHORT)}
    assert differ(graphs, graph, make_batch([1, 70, 9], [300, 0, 60])) <= 1e-5


@pytest.mark.parametrize("overrides", [{"head_dim": 24}, {"head_dim": 80, "hidden_size": 100}, {"vocab_size": 261}])
def test_sizes_need_not_be_round(overrides: dict[str, Any]) -> None:
    assert differ({FULL: load_tiny(**overrides)}, FULL, make_batch([3, 5], [30, 0])) <= 1e-5


@settings(max_examples=40)
@given(st.data())
def test_any_ragged_pass_over_any_cache_equals_torch(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(1, 40), min_size=sequences, max_size=sequences))
    starts = data.draw(st.lists(st.integers(0, 260), min_size=sequences, max_size=sequences))
    full = narrow(load_tiny(), data.draw(st.sampled_from([None, 1, 40, 300])))
    seed = data.draw(st.integers(0, 1000))
    graphs = {FULL: full, SUBGRAPH: cut(full)}
    graph = data.draw(st.sampled_from([FULL, SUBGRAPH]))
    assert differ(graphs, graph, make_batch(counts, starts, seed), seed) <= 1e-5


@pytest.mark.parametrize(("format", "bound"), [("bf16", 0.03), ("int8", 0.05), ("int4", 0.05)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_format_is_near_torch(family: str, format: str, bound: float) -> None:
    full = load_tiny(family, "bf16")
    graphs = {FULL: full, SUBGRAPH: full if format == "bf16" else quantise_decoder(full, format)}
    assert differ(graphs, SUBGRAPH, make_batch([1, 30, 4], [70, 0, 31])) <= bound


def test_rows_are_given_in_the_order_asked() -> None:
    runner = make_native({FULL: load_tiny()})
    batch = make_batch([80, 3], [0, 20])
    whole = run_all(runner, FULL, batch)
    wanted = [82, 70, 2, 3, 3, 79]
    assert torch.equal(runner.forward(FULL, batch, wanted), whole[wanted])
    assert runner.forward(FULL, batch, []).shape == (0, 300)


@pytest.mark.parametrize("graph", [FULL, SUBGRAPH])
@pytest.mark.parametrize("verified", [1, 31, 32, 50, 256, 300])
def test_what_lies_past_a_token_is_never_read(graph: str, verified: int) -> None:
    full = load_tiny()
    graphs = {FULL: full, SUBGRAPH: cut(full)}
    batch = make_batch([6], [verified])
    outcomes = []
    for poison in (0.0, POISON, torch.nan):
        runner = make_native(graphs)
        fill_cache(runner)
        past = torch.arange(verified, batch.tables.shape[1] * 32)
        for tensor in (*runner.cache.keys, *runner.cache.values):
            tensor[batch.tables[0, past // 32], :, past % 32] = poison
        outcomes.append(run_all(runner, graph, batch))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@settings(max_examples=20)
@given(st.data())
def test_a_pass_writes_its_own_slots_only(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=2))
    starts = data.draw(st.lists(st.integers(0, 280), min_size=2, max_size=2))
    full = load_tiny()
    native_runner, torch_runner = make_pair({FULL: full, SUBGRAPH: cut(full)})
    before = [tensor.clone() for tensor in (*native_runner.cache.keys, *native_runner.cache.values)]
    batch = make_batch(counts, starts)
    for runner in (native_runner, torch_runner):
        runner.forward(SUBGRAPH, batch, [])
    after = [*native_runner.cache.keys, *native_runner.cache.values]
    expected = [*torch_runner.cache.keys, *torch_runner.cache.values]
    for was, now, wanted in zip(before, after, expected, strict=True):
        assert torch.equal(was != now, was != wanted)
        assert torch.allclose(now, wanted, atol=1e-5)


def test_a_summary_is_that_of_the_logits() -> None:
    full = load_tiny()
    runner = make_native({FULL: full, SUBGRAPH: cut(full, SHORT)})
    batch = make_batch([5, 2], [0, 40])
    for graph in (FULL, SUBGRAPH):
        logits = runner.forward(graph, batch, [4, 6])
        for row, summary in zip(logits, runner.summarise(graph, batch, [4, 6]), strict=True):
            p, (first, second) = row.softmax(-1), row.topk(2).values
            assert summary.token == int(row.argmax())
            assert summary.probability == pytest.approx(float(p.max()), rel=1e-5)
            assert summary.gap == pytest.approx(float(first - second), rel=1e-5)
            assert summary.entropy == pytest.approx(float(torch.special.entr(p).sum()), rel=1e-4)


def test_weights_are_held_once() -> None:
    full = load_tiny("llama", "bf16", tie_word_embeddings=True)
    tied, shared = make_native({FULL: full}), make_native({FULL: full, "again": full})
    assert shared.packed_bytes == tied.packed_bytes
    assert replace(full, head=full.head).ropes is full.ropes
    assert len(shared._weights._ropes) == 1
    assert tied.packed_bytes < 1.2 * full.bytes_per_step
    outline = tied.graphs[FULL]
    assert outline.bytes_per_step == full.bytes_per_step
    assert outline.head.weight.is_meta
