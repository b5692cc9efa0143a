"""Backward flow: conserved at every level, and equal to the sums over edges written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strace import flow
from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend
from strace.edges import layer_edges
from strace.flow import measure_flow
from strace.keep import Kept, slice_decoder
from strace.texts import Texts, batch_texts
from tests.tiny import KINDS, random_tokens, save_tiny


@pytest.fixture(params=KINDS)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    extra = {"sliding_window": 7} if request.param == "mistral" else {}
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path, request.param, **extra))), "fp32")


def texts(*lengths: int) -> list[list[int]]:
    return [random_tokens(n, seed=n).tolist() for n in lengths]


def test_every_level_holds_the_number_of_targets(full: Decoder) -> None:
    flow = measure_flow(full, batch_texts(texts(30, 17, 22)))
    assert flow.targets == 69
    assert len(flow.levels) == (4 if full.spec.parallel else 7)
    torch.testing.assert_close(flow.levels, torch.full_like(flow.levels, 69.0), rtol=1e-5, atol=0)


def test_padding_and_batching_change_nothing(full: Decoder) -> None:
    together = measure_flow(full, batch_texts(texts(30, 17)))
    apart = [measure_flow(full, batch_texts([text])) for text in texts(30, 17)]
    torch.testing.assert_close(together.groups, apart[0].groups + apart[1].groups, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.neurons, apart[0].neurons + apart[1].neurons, rtol=1e-4, atol=1e-5)


def test_as_many_texts_go_at_once_as_their_streams_have_room(full: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    together, seen, embedded = measure_flow(full, batch_texts(texts(30, 17, 22))), list[int](), full.embedded
    monkeypatch.setattr(full, "embedded", lambda *about: seen.append(len(about[0])) or embedded(*about))
    for room, most in ((0, 1), (2 * 3 * 30 * 64 * 4, 2)):
        monkeypatch.setattr(flow, "STREAMS", room)
        few = measure_flow(full, batch_texts(texts(30, 17, 22)))
        assert max(seen) == most * 30
        torch.testing.assert_close(few.groups, together.groups, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(few.neurons, together.neurons, rtol=1e-4, atol=1e-5)
        assert few.targets == together.targets
        seen.clear()


def test_scores_are_the_sums_over_edges(full: Decoder) -> None:
    [batch] = batch_texts(texts(12))
    streams = []
    full.streams(
        batch.tokens[0],
        batch.positions,
        DenseAttend(1, 12),
        lambda n, l, v: streams.append(v) or v if n == "stream" else v,
    )
    f = torch.ones(12, dtype=torch.float64)
    flow = measure_flow(full, [batch])
    for l in reversed(range(3)):
        e = layer_edges(full, l, streams[l], full.rotation(batch.positions), (1, 12))
        assert e.neurons is not None
        neurons = [sum(float(f[i] * e.mlp[0, i] * e.neurons[i, k]) for i in range(12)) for k in range(5)]
        torch.testing.assert_close(flow.neurons[l, :5], torch.tensor(neurons, dtype=torch.float64), rtol=1e-4, atol=0)
        groups, before = torch.zeros(2, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
        if full.spec.parallel:
            before += f * e.mlp[0]
        for i in range(12):
            before[i] += f[i] * e.attention_residual[0, i]
            for h in range(full.spec.heads):
                for j in range(i + 1):
                    through = f[i] * e.attention[0, h, i, j]
                    groups[h // full.spec.group] += through
                    before[j] += through
        torch.testing.assert_close(flow.groups[l], groups, rtol=1e-4, atol=0)
        f = before


def test_a_subgraph_scores_its_units_by_their_numbers_in_the_full_model(full: Decoder) -> None:
    every = torch.arange(full.spec.mlp)
    kept = Kept(
        (torch.tensor([1]), torch.arange(2), torch.tensor([], dtype=torch.int64)), (every, every[:32], every[:0])
    )
    flow = measure_flow(slice_decoder(full, kept), batch_texts(texts(20)))
    assert (flow.groups > 0).tolist() == [[False, True], [True, True], [False, False]]
    assert flow.mlp[2] == 0 < flow.mlp[1]
    torch.testing.assert_close(flow.levels, torch.full_like(flow.levels, 20.0), rtol=1e-5, atol=0)


def test_batches_stay_within_their_tokens() -> None:
    batches = batch_texts(texts(40, 10, 39, 11, 12), tokens=80)
    assert [batch.shape for batch in batches] == [(2, 40), (3, 12)]
    assert isinstance(batches[0], Texts)
    assert batches[1].lengths.tolist() == [12, 11, 10]
    assert batches[1].real.sum() == 33
