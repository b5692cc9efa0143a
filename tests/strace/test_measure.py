"""Acceptance, costs and the speedup predicted from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strace import measure
from strace.blocks import RecordAttend
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Attention
from strace.head import measure_mass
from strace.keep import Kept, slice_decoder
from strace.measure import compare, measure_acceptance, predict_speedup
from strace.sampling import total_variation
from strace.texts import batch_texts
from tests.tiny import random_tokens, save_tiny


def test_a_model_accepts_itself_wholly_and_its_rounded_copy_less(tmp_path: Path) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32")
    batches = batch_texts([random_tokens(n, seed=n).tolist() for n in (50, 33, 41)])
    itself, rounded = (measure_acceptance(full, s, batches) for s in (full, quantise_decoder(full, "int4")))
    assert itself.accepted == pytest.approx([1.0] * 8, abs=1e-4)
    assert itself.agreement == (1.0,) * 8
    assert itself.positions == 50 + 33 + 41
    assert all(0.2 < a < 0.999 for a in rounded.accepted)
    assert rounded.mean == pytest.approx(sum(rounded.accepted) / 8)


def test_a_short_head_accepts_no_more_than_it_covers(tmp_path: Path) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32")
    every = (torch.arange(2),) * 3, (torch.arange(96),) * 3
    short = slice_decoder(full, Kept(*every, token_ids=torch.arange(0, 300, 3)))
    [batch] = batch_texts([random_tokens(60).tolist()])
    covered = float(measure_mass(full, [batch])[short.token_ids].sum())
    acceptance = measure_acceptance(full, short, [batch])
    # Without other errors TV is exactly the mass left out; depths differ in how many positions they hold.
    assert sum(acceptance.accepted) / 8 == pytest.approx(covered, abs=0.03)


def test_entries_of_one_layer_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Counted(RecordAttend):
        def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            held.append(len(self.entries))
            return super().__call__(layer, attention, q, k, v)

    monkeypatch.setattr(measure, "RecordAttend", Counted)
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32")
    measure_acceptance(full, full, batch_texts([random_tokens(20).tolist()]))
    assert held == [0] * 3


@given(st.integers(0, 1000))
def test_the_overlap_is_one_minus_total_variation(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p, rows = torch.randn(6, 40, generator=g).softmax(-1), torch.randn(6, 12, generator=g).softmax(-1)
    ids = torch.randperm(40, generator=g)[:12].sort().values
    q = torch.zeros(6, 40).index_copy_(1, ids, rows)
    accepted, agreed = compare(p, rows, ids)
    torch.testing.assert_close(accepted, 1 - total_variation(p, q))
    assert torch.equal(agreed.bool(), p.argmax(1) == q.argmax(1))


@given(st.floats(0.1, 0.99), st.floats(0.05, 2.0), st.floats(0.0, 0.3))
def test_the_prediction_is_the_formula_at_its_best_length(a: float, c: float, slope: float) -> None:
    speedup, length = predict_speedup([a] * 8, c, {1: 1.0, 9: 1 + 8 * slope, 2: 1 + slope})
    every = [(1 - a ** (k + 1)) / (1 - a) / (k * c + 1 + k * slope) for k in range(1, 9)]
    assert speedup == pytest.approx(max(every))
    assert every[length - 1] == pytest.approx(max(every))
