"""The short head: specials always, the most used first, and the coverage that is promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strace import head
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import DenseAttend
from strace.head import count_tokens, fit_head, measure_mass, rank_tokens, short_enough, special_ids
from strace.keep import Kept, slice_decoder
from strace.measure import measure_acceptance
from strace.texts import batch_texts
from tests.tiny import random_tokens, save_tiny


def test_mass_is_the_mean_distribution_whatever_the_padding(tmp_path: Path) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32")
    texts = [random_tokens(n, seed=n).tolist() for n in (30, 21)]
    mass = measure_mass(full, batch_texts(texts))
    rows = [full.logits(full.streams(torch.tensor(t), torch.arange(len(t)), DenseAttend(1, len(t)))) for t in texts]
    torch.testing.assert_close(mass.float(), torch.cat(rows).softmax(-1).mean(0))
    assert abs(float(mass.sum()) - 1) < 1e-5


def test_counts_leave_padding_out() -> None:
    shares = count_tokens(batch_texts([[5, 5, 7], [7]]), 10)
    torch.testing.assert_close(shares[[5, 7]], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert shares[0] == 0


def test_specials_are_those_of_tokenizer_and_generation(tmp_path: Path) -> None:
    # Ids 256..258; the model's own vocabulary is larger.
    assert special_ids(open_checkpoint(str(save_tiny(tmp_path)))) == [256, 257, 258]


@given(st.integers(0, 100), st.floats(0.05, 0.999))
def test_the_fewest_rows_that_cover(seed: int, coverage: float) -> None:
    mass = torch.rand(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 8
    mass /= mass.sum()
    ranked = rank_tokens(mass, torch.zeros(400), [3, 399])
    ids = short_enough(ranked, mass, coverage)
    if ids is None:
        assert float(mass[ranked[:384]].sum()) < coverage
        return
    assert {3, 399} <= set(ids.tolist())
    assert ids.equal(ids.unique())
    assert len(ids) % 32 == 0
    assert float(mass[ids].sum()) >= coverage
    assert len(ids) == 32 or float(mass[ranked[: len(ids) - 32]].sum()) < coverage


def test_full_coverage_needs_no_short_head() -> None:
    mass = torch.full((100,), 0.01, dtype=torch.float64)
    assert short_enough(rank_tokens(mass, mass, []), mass, 1.0) is None


def test_a_token_the_class_uses_ranks_before_one_that_nobody_does() -> None:
    mass, counts = torch.tensor([0.5, 0.2, 0.3, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.4])
    assert rank_tokens(mass, counts, []).tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize(("family", "short"), [("llama", True), ("gemma2", False)], ids=["short", "capped"])
def test_a_fitted_head_accepts_more_of_what_it_never_saw(tmp_path: Path, family: str, short: bool) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path, family))), "fp32")
    ids = torch.arange(0, 300, 2) if short else None
    kept = Kept((torch.arange(2),) * 3, (torch.arange(0),) * 3, ids)  # without its MLPs
    subgraph = quantise_decoder(slice_decoder(full, kept), "int4")
    learnt, apart = (
        batch_texts([random_tokens(48, seed=seed + i).tolist() for i in range(count)])
        for seed, count in ((0, 120), (1000, 20))
    )
    fitted = fit_head(full, subgraph, learnt)
    was, now = (measure_acceptance(full, s, apart).mean for s in (subgraph, fitted))
    assert now > was + 0.01
    assert fitted.bytes_per_step == subgraph.bytes_per_step
    assert fitted.layers is subgraph.layers
    assert fitted.head.format == subgraph.head.format
    assert torch.equal(fit_head(full, subgraph, learnt).head.codes.codes, fitted.head.codes.codes)


def test_a_dense_head_stays_and_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, texts = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32"), batch_texts([[1, 2, 3]])
    assert fit_head(full, replace(full), texts).head is full.head
    whole = quantise_decoder(full, "int4")
    monkeypatch.setattr(head, "LARGEST", whole.head.shape[0] * whole.head.shape[1])
    assert fit_head(full, whole, texts).head is not whole.head
    monkeypatch.setattr(head, "LARGEST", head.LARGEST - 1)
    assert fit_head(full, whole, texts).head is whole.head


def test_few_logits_at_a_time_fit_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "fp32")
    kept = Kept((torch.arange(2),) * 3, (torch.arange(0),) * 3)
    subgraph = quantise_decoder(slice_decoder(full, kept), "int4")
    learnt = batch_texts([random_tokens(48, seed=i).tolist() for i in range(40)])
    monkeypatch.setattr(head, "LOGITS", 100 * subgraph.head.shape[0])
    fitted = fit_head(full, subgraph, learnt)
    was, now = (measure_acceptance(full, s, learnt).mean for s in (subgraph, fitted))
    assert now > was + 0.01
