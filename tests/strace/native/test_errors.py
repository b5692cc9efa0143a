"""What the native runner refuses: each by name, none with a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from strace import native
from strace.decoder import Decoder
from strace.draft import Held
from strace.kv import Batch, make_cache
from strace.native import NativeError
from strace.native_runner import NativeRunner
from strace.runner import FULL
from strace.sampling import Noise, Sampler, SamplingParams
from tests.strace.native.passes import CONTEXT, cut, load_tiny, make_batch, make_native

GOOD = make_batch([3, 2], [10, 40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([1, 2, 3, 4, 300])}, "token is not in the vocabulary"),
        ({"tokens": torch.tensor([1, 2, 3, 4, -1])}, "token is not in the vocabulary"),
        ({"counts": [3, 0]}, "no tokens"),
        ({"starts": [10, -1]}, "before the first position"),
        ({"starts": [10, CONTEXT - 1]}, "longer than the context"),
        ({"starts": [10, 500]}, "table is too short"),
        ({"tables": torch.full((2, 2), 40)}, "block that the cache does not have"),
        ({"tables": torch.full((2, 2), -1)}, "block that the cache does not have"),
        ({"tables": torch.full((2, 2), 2**40)}, "block that the cache does not have"),
    ],
)
def test_a_batch_that_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    runner = make_native({FULL: load_tiny()})
    with pytest.raises(NativeError, match=message):
        runner.forward(FULL, replace(GOOD, **change), [0])
    assert runner.forward(FULL, GOOD, [0]).isfinite().all()


@pytest.mark.parametrize("row", [-1, 5, 2**31 - 1])
def test_a_row_of_no_token_is_refused(row: int) -> None:
    with pytest.raises(NativeError, match="row is not that of a token"):
        make_native({FULL: load_tiny()}).forward(FULL, GOOD, [0, row])


def with_attention(graph: Decoder, **changes: Any) -> Decoder:
    attention = graph.layers[0].attention
    assert attention is not None
    return replace(graph, layers=[replace(graph.layers[0], attention=replace(attention, **changes)), *graph.layers[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: with_attention(graph, heads=3), "evenly"),
        (lambda graph: with_attention(graph, heads=2), "qkv does not fit"),
        (lambda graph: with_attention(graph, kept=torch.tensor([0, 2])), "kept head is not in the cache"),
        (lambda graph: with_attention(graph, rope=1), "rope table"),
        (lambda graph: replace(graph, layers=graph.layers[:2]), "layers"),
        (lambda graph: replace(cut(graph, [3, 5]), token_ids=torch.tensor([5, 3])), "ascending"),
        (lambda graph: replace(cut(graph, [3, 5]), token_ids=torch.tensor([5, 300])), "ids of the vocabulary"),
        (lambda graph: replace(cut(graph, [3, 5]), token_ids=None), "no token ids"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused(change: Callable[[Decoder], Decoder], message: str) -> None:
    full = load_tiny()
    with pytest.raises(NativeError, match=message):
        make_native({FULL: full, "bad": change(full)})


@pytest.mark.parametrize(("row", "drafts"), [(-1, []), (1, []), (0, [5])])
def test_a_verdict_on_rows_that_are_not_there_is_refused(row: int, drafts: list[int]) -> None:
    held = Held(row, drafts, None, Sampler(SamplingParams(0.0), Noise(0, shared=False), 0))
    with pytest.raises(NativeError, match="rows are missing"):
        make_native({FULL: load_tiny()}).verify_pass(GOOD, [0], [held])


@pytest.mark.parametrize("threads", [-1, 100_000])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: int) -> None:
    with pytest.raises(NativeError, match="threads"):
        make_native({FULL: load_tiny()}, threads)


def test_a_cache_of_other_heads_is_refused() -> None:
    full = load_tiny()
    with pytest.raises(NativeError, match="head size"):
        NativeRunner({FULL: full}, make_cache(replace(full.spec, head_dim=32), 4, torch.float32))


def test_a_graph_elsewhere_is_refused() -> None:
    full = load_tiny()
    elsewhere = replace(full, embed=full.embed.to("meta"))
    with pytest.raises(NativeError, match=r"runs on the CPU.*'full'.*meta"):
        make_native({FULL: elsewhere})


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.load.cache_clear()
    try:
        monkeypatch.setenv("STRACE_NATIVE_LIBRARY", str(tmp_path / "none.so"))
        assert "not built" in str(native.why_unavailable())
        assert not native.available()
        (tmp_path / "none.so").write_bytes(b"no library")
        assert "cannot be loaded" in str(native.why_unavailable())
    finally:
        native.load.cache_clear()


def test_an_unknown_batch_size_is_refused() -> None:
    empty = Batch([], [], [], torch.zeros(0, 1, dtype=torch.int64))
    with pytest.raises(NativeError, match="batch is empty"):
        make_native({FULL: load_tiny()}).forward(FULL, empty, [])
