"""`benchmarks/subgraphs.py`: controls within the same bytes, emulated formats, results that survive being cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import subgraphs
from strace.checkpoint import load_decoder, open_checkpoint
from strace.classes import read_prompts, split_classes
from strace.distill import RATES
from strace.keep import full_bytes, kept_bytes
from strace.linear import quantise
from strace.measure import measure_acceptance
from strace.texts import LONGEST, cut_pieces
from tests.strace.test_trace import write_prompts
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> subgraphs.Traced:
    here = tmp_path_factory.mktemp("bench")
    checkpoint = open_checkpoint(str(save_tiny(here / "model")))
    parts = split_classes(read_prompts(write_prompts(here / "prompts")))["digits"]
    return subgraphs.Traced(checkpoint, load_decoder(checkpoint, "bf16"), "digits", parts, here)


def test_every_control_takes_no_more_bytes_than_ours_may(traced: subgraphs.Traced) -> None:
    budget = 0.2 * full_bytes(traced.full)
    ours = traced.ours(0.2)
    made = {units: traced.control(units, 0.2, ours.plan) for units in subgraphs.CONTROLS}
    for each in (ours, *made.values()):
        assert kept_bytes(traced.full.spec, each.kept, "int4") <= budget
        assert each.subgraph.head.shape == ours.subgraph.head.shape
    assert traced.make(ours.plan, traced.refit, repaired=False).subgraph.bytes_per_step <= ours.subgraph.bytes_per_step
    assert len({str(m.kept.neurons) for m in made.values()}) > 2
    sizes = [len(groups) for groups in made["first"].kept.groups]
    assert sizes == sorted(sizes, reverse=True)


def test_ours_comes_back_from_the_disk_bit_for_bit(traced: subgraphs.Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced.ours(0.2)
    monkeypatch.setattr(subgraphs, "fit_size", None)  # nothing may be tried again
    again = traced.ours(0.2)
    assert again.plan == made.plan
    torch.testing.assert_close(again.subgraph.head.dense(), made.subgraph.head.dense(), rtol=0, atol=0)


def test_distilling_adds_no_byte_and_is_done_once(traced: subgraphs.Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "codes", 1.0)  # for there is time for a few steps only
    ours, made = traced.ours(0.2).subgraph, traced.distilled(0.2, minutes=0.02)
    assert made.subgraph.bytes_per_step == ours.bytes_per_step
    assert not torch.equal(made.subgraph.head.dense(), ours.head.dense())
    monkeypatch.setattr(subgraphs, "distill", None)  # nothing may be trained again
    assert torch.equal(traced.distilled(0.2, minutes=0.02).subgraph.head.dense(), made.subgraph.head.dense())


def test_more_text_is_of_no_source_that_is_chosen_by(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "model")))
    prompts = read_prompts(write_prompts(tmp_path / "prompts"))["digits"]
    parts = split_classes({"digits": prompts})["digits"]
    rest = [p for p in prompts if p.source not in {c.source for c in parts.choose}]
    expected = sorted(piece for p in rest for piece in cut_pieces([checkpoint.tokenizer(p.text)["input_ids"]], LONGEST))

    def read(tokens: int) -> list[list[int]]:
        batches = subgraphs.read_more(checkpoint, prompts, parts, tokens)
        return [ids[:n].tolist() for b in batches for ids, n in zip(b.tokens, b.lengths, strict=True)]

    assert len(rest) < len(prompts)
    assert sorted(read(10**6)) == expected
    some = sum(map(len, expected)) // 2
    assert some <= sum(map(len, read(some))) < some + max(map(len, expected))


def test_ours_on_more_text_keeps_units_and_bytes_and_is_fitted_once(
    traced: subgraphs.Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = traced.ours(0.2)
    monkeypatch.setattr(traced, "more", [*traced.fit, *traced.choose])
    made = traced.on_more(0.2)
    assert made.subgraph.bytes_per_step == ours.subgraph.bytes_per_step
    assert not torch.equal(made.subgraph.head.dense(), ours.subgraph.head.dense())
    monkeypatch.setattr(subgraphs, "repair", None)  # nothing may be fitted again
    again = traced.on_more(0.2)
    assert torch.equal(again.subgraph.head.dense(), made.subgraph.head.dense())
    trained = traced.distilled(0.2, minutes=0.02, more=True)
    assert trained.subgraph.bytes_per_step == made.subgraph.bytes_per_step
    assert not torch.equal(trained.subgraph.head.dense(), traced.distilled(0.2, minutes=0.02).subgraph.head.dense())


@given(st.integers(0, 100))
def test_more_bits_err_less_and_four_are_as_good_as_int4(seed: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    errors = [float((subgraphs.round_plainly(weight, bits) - weight).square().sum()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1.3 * float((quantise(weight, "int4").dense() - weight).square().sum())
    assert len(subgraphs.round_plainly(weight, 2)[0, :32].unique()) <= 4


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    counts = {"a": [9.0, 8.0, 10.0], "b": [45.0, 40.0, 50.0]}
    results = subgraphs.Results(tmp_path)
    subgraphs.Results(tmp_path).add("chat", "ours", 0.25, lambda: (counts, 0.24, "plan"))  # another process

    def fail() -> tuple[subgraphs.Counts, float, str]:
        raise AssertionError("measured again")

    results.add("chat", "ours", 0.25, fail)
    results.add("chat", "int4", 1.0, lambda: (counts, 0.28, "whole"))
    means = subgraphs.show(results.rows)
    assert [(m["method"], m["accepted"], m["agreement"]) for m in means] == [("int4", 0.9, 0.8), ("ours", 0.9, 0.8)]


@given(st.integers(0, 50))
def test_a_loss_lies_in_its_interval_and_same_is_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = {str(i): [float(90 + rng.integers(10)), 0.0, 100.0] for i in range(20)}
    other = {source: [sums[0] - float(rng.integers(1, 9)), 0.0, 100.0] for source, sums in ours.items()}
    a, b = ([{"prompts": "chat", "sources": each}] for each in (ours, other))
    low, high = subgraphs.draw_losses(a, b)
    loss = sum(ours[s][0] - other[s][0] for s in ours) / 2000
    assert 0 < low <= loss <= high < 0.09
    assert subgraphs.draw_losses(a, a) == [0.0, 0.0]


def test_acceptance_by_source_is_that_of_the_whole(traced: subgraphs.Traced) -> None:
    made = traced.ours(0.2)
    held = subgraphs.Held(traced.fit, [[str(row % 2) for row in range(batch.shape[0])] for batch in traced.fit])
    counts = subgraphs.count_accepted(traced.full, made.subgraph, held)
    accepted, _, positions = (sum(column) for column in zip(*counts.values(), strict=True))
    whole = measure_acceptance(traced.full, made.subgraph, traced.fit)
    assert set(counts) == {"0", "1"}
    assert positions == whole.positions
    assert accepted / positions == pytest.approx(whole.mean, abs=0.02)  # that one weighs depths alike


def test_every_method_has_its_cells() -> None:
    cells = subgraphs.list_cells(["chat", "code"], [0.125])
    assert len(set(cells)) == len(cells) == 2 * (1 + len(subgraphs.WHOLE) + len(subgraphs.OTHERS))
    assert [method for method, _, _ in cells[:2]] == ["ours", "ours"]
    assert not [method for method, _, _ in subgraphs.list_cells(["chat"], [0.125]) if "other" in method]
