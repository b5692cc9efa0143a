"""The bits of a row: the same alone and in any batch, in any chunks, with any number of threads. No tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace.checkpoint import quantise_decoder
from strace.decoder import Decoder
from strace.kv import Batch
from strace.runner import FULL
from tests.strace.native.passes import cut, fill_cache, load_tiny, make_batch, make_native, run_all, split
from tests.tiny import KINDS

FORMATS = ["fp32", "bf16", "int8", "int4"]


def graph_of(format: str, family: str = "llama") -> Decoder:
    full = load_tiny(family, "fp32" if format == "fp32" else "bf16")
    return full if format in ("fp32", "bf16") else quantise_decoder(full, format)


def run_split(graph: Decoder, batch: Batch, sizes: list[list[int]], threads: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Logits of every token, and the cache, of the batch run in chunks."""
    runner = make_native({FULL: graph}, threads)
    fill_cache(runner)
    logits = torch.empty(len(batch.tokens), graph.spec.vocabulary)
    for numbers, part in split(batch, sizes):
        logits[numbers] = run_all(runner, FULL, part)
    return logits, [*runner.cache.keys, *runner.cache.values]


def run_whole(graph: Decoder, batch: Batch, threads: int = 2) -> tuple[Tensor, list[Tensor]]:
    runner = make_native({FULL: graph}, threads)
    fill_cache(runner)
    return run_all(runner, FULL, batch), [*runner.cache.keys, *runner.cache.values]


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_every_family_gives_the_same_bits_in_one_pass_and_token_by_token(family: str) -> None:
    graph = graph_of("bf16", family)
    counts = [1, 7, 70]
    batch = make_batch(counts, [300, 31, 0])
    assert_same(run_whole(graph, batch), run_split(graph, batch, [[1] * count for count in counts]))


@settings(max_examples=40)
@given(st.data())
def test_bits_depend_neither_on_batch_nor_on_chunks(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 4))
    starts = data.draw(st.lists(st.integers(0, 260), min_size=sequences, max_size=sequences))
    sizes = data.draw(
        st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=sequences, max_size=sequences)
    )
    graph = graph_of(data.draw(st.sampled_from(FORMATS)))
    batch = make_batch([sum(chunks) for chunks in sizes], starts, data.draw(st.integers(0, 99)))
    assert_same(run_whole(graph, batch), run_split(graph, batch, sizes))


@pytest.mark.parametrize("format", FORMATS)
def test_bits_do_not_depend_on_threads(format: str) -> None:
    graph = graph_of(format)
    for counts, starts in ([1], [600]), ([2, 1], [30, 290]), ([66, 5], [0, 250]):
        batch = make_batch(counts, starts)
        one = run_whole(graph, batch, threads=1)
        for threads in (2, 3, 5):
            assert_same(one, run_whole(graph, batch, threads))


@pytest.mark.parametrize("overrides", [{"num_attention_heads": 8, "num_key_value_heads": 1}, {"head_dim": 40}])
def test_bits_do_not_depend_on_the_pass_for_other_shapes(overrides: dict[str, Any]) -> None:
    graph = load_tiny(**overrides)
    batch = make_batch([20], [250])
    assert_same(run_whole(graph, batch), run_split(graph, batch, [[4, 1, 5, 10]]))


def test_a_subgraph_gives_the_same_bits_in_any_chunks() -> None:
    graph = cut(load_tiny(), list(range(0, 300, 7)))
    batch = make_batch([12, 3], [40, 255])
    assert_same(run_whole(graph, batch), run_split(graph, batch, [[1, 4, 7], [2, 1]]))


def test_where_the_blocks_lie_does_not_matter() -> None:
    graph = load_tiny()
    outcomes = []
    for seed in range(3):
        runner = make_native({FULL: graph})
        whole = make_batch([300], [0], seed)
        batch = Batch(make_batch([300], [0]).tokens, [300], [0], whole.tables)
        outcomes.append(run_all(runner, FULL, batch))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_many_passes_with_pauses_give_the_same_bits() -> None:
    """Threads that sleep between passes, and some that meet at barriers while they do."""
    runner = make_native({FULL: load_tiny()}, threads=4)
    batch = make_batch([3], [40])
    first = run_all(runner, FULL, batch)
    for _ in range(200):
        assert torch.equal(run_all(runner, FULL, batch), first)
