"""The compiled runner: what it computes at padded, fixed shapes is what the eager one computes.

Without CUDA nothing is captured, but the same step runs on the same tensors.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strace import compiled
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.compiled import CompiledRunner, Shape, capture, fit_shape
from strace.decoder import Decoder
from strace.draft import plan_steps
from strace.kv import Batch, KVCache, make_cache
from strace.runner import FULL, TorchRunner
from tests.tiny import keep_heads, random_tokens, save_tiny, scatter_blocks

BLOCKS = 40


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """A full model (one with a sliding window), its int4 copy, and a subgraph with a short head."""
    extra = {"sliding_window": 11} if request.param == "mistral" else {}
    folder = save_tiny(tmp_path_factory.mktemp("model"), request.param, max_position_embeddings=512, **extra)
    full = load_decoder(open_checkpoint(str(folder)), "fp32")
    ids = torch.arange(0, 300, 3)
    lame = replace(keep_heads(full, [[1], None, [0, 1]]), token_ids=ids, head=type(full.head)(full.head.dense()[ids]))
    return {FULL: full, "pooled": quantise_decoder(full, "int4"), "lame": lame}


def make_pair(graphs: dict[str, Decoder]) -> tuple[TorchRunner, CompiledRunner]:
    """An eager and a compiled runner over caches of equal, arbitrary content."""
    spec, generator = graphs[FULL].spec, torch.Generator().manual_seed(1)
    caches = [make_cache(spec, BLOCKS, torch.float32) for _ in range(2)]
    for layer in range(spec.layers):
        for one, other in ((c.keys[layer], d.keys[layer]) for c, d in [caches]):
            other.copy_(one.normal_(generator=generator))
        for one, other in ((c.values[layer], d.values[layer]) for c, d in [caches]):
            other.copy_(one.normal_(generator=generator))
    return TorchRunner(graphs, caches[0]), CompiledRunner(graphs, caches[1])


def entries(cache: KVCache) -> Tensor:
    return torch.stack([*cache.keys, *cache.values])


def make_batch(counts: list[int], starts: list[int], seed: int) -> Batch:
    tables = scatter_blocks([s + n for s, n in zip(starts, counts, strict=True)], BLOCKS, seed)
    return Batch(random_tokens(sum(counts), seed).tolist(), counts, starts, tables)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 120)), min_size=1, max_size=5), st.integers(0, 99))
def test_compiled_equals_eager(graphs: dict[str, Decoder], texts: list[tuple[int, int]], seed: int) -> None:
    batch = make_batch([n for n, _ in texts], [start for _, start in texts], seed)
    rows = list(range(0, len(batch.tokens), 2))
    for graph in graphs:
        eager, fast = make_pair(graphs)
        expected, found = (runner.forward(graph, batch, rows) for runner in (eager, fast))
        # int4 rounds its activations to 8 bits, and the least difference before may round one of them the other way.
        noise = 0.1 if graph == "pooled" else 2e-4
        torch.testing.assert_close(found, expected, atol=noise, rtol=0)
        # Nothing but the batch's own slots is written.
        torch.testing.assert_close(entries(fast.cache), entries(eager.cache), atol=noise, rtol=0)


def test_a_step_serves_every_batch_of_its_shape(graphs: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[object] = []
    monkeypatch.setattr(compiled, "capture", lambda compute, device: captured.append(compute) or compute)
    eager, fast = make_pair(graphs)
    for seed, (counts, starts) in enumerate((([3], [7]), ([4], [200]), ([1, 1, 1], [5, 9, 1]), ([1] * 4, [0] * 4))):
        batch = make_batch(counts, starts, seed)
        rows = list(range(sum(counts)))
        expected, found = (runner.forward(FULL, batch, rows) for runner in (eager, fast))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert len(captured) == 2


def test_drafts_are_those_of_the_eager_runner(graphs: dict[str, Decoder]) -> None:
    eager, fast = make_pair(graphs)
    batch = make_batch([2, 1], [9, 33], 3)
    batch = replace(batch, tables=torch.arange(8).view(2, 4))
    for graph in (FULL, "lame"):
        drafts = [[d.tokens for d in runner.draft(graph, batch, plan_steps(2, 5))] for runner in (eager, fast)]
        assert drafts[0] == drafts[1]


def test_shapes() -> None:
    assert fit_shape(make_batch([1], [0], 0)) == Shape(1, 1, 8)
    assert fit_shape(make_batch([5], [255], 0)) == Shape(1, 8, 16)
    assert fit_shape(make_batch([1, 3, 2], [0, 4, 9], 0)) == Shape(4, 4, 8)
    assert fit_shape(make_batch([64], [0], 0)) == Shape(1, 64, 8)
    assert fit_shape(make_batch([65], [0], 0)) is None
    assert fit_shape(make_batch([33, 1], [0, 0], 0)) is None


def test_what_cannot_be_compiled_runs_eagerly(
    graphs: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, fast = make_pair(graphs)
    monkeypatch.setattr(compiled, "capture", fail)
    batch = make_batch([2], [5], 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(fast.forward(FULL, batch, [0, 1]), eager.forward(FULL, batch, [0, 1]))
    assert len(caplog.records) == 1
    assert "operation not permitted" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_reads_its_inputs_anew() -> None:
    x = torch.ones(3, device="cuda")
    replay = capture(lambda: x * 2, x.device)
    x.fill_(5)
    assert replay().tolist() == [10.0] * 3
