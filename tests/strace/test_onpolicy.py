"""The full model's own text, and what the table of drafted positions says of it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strace import onpolicy
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Decoder
from strace.head import cut_head
from strace.onpolicy import (
    Continuation,
    Positions,
    calibrate,
    conditional_acceptance,
    continue_prompts,
    count_cache,
    measure_heads,
    measure_positions,
    share_agreeing,
)
from strace.runner import FULL
from strace.texts import batch_texts
from tests.tiny import make_runner, random_tokens, save_tiny


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path_factory.mktemp("model")))), "fp32")


PROMPTS = [(f"source {i}", random_tokens(n, seed=i).tolist()) for i, n in enumerate((5, 9, 1, 20, 33, 7))]


def test_a_greedy_continuation_is_the_full_models_choice_at_every_place(full: Decoder) -> None:
    runner = make_runner({FULL: full}, count_cache(33, 12))
    texts = continue_prompts(runner, PROMPTS, 0.0, 12, set())
    for (source, ids), text in zip(PROMPTS, texts, strict=True):
        assert (text.source, text.given, text.ids[: text.given]) == (source, len(ids), ids)
        assert len(text.ids) == len(ids) + 12
    rows = measure_positions(full, full, texts)
    assert len(rows) == 12 * len(PROMPTS)
    assert rows.same.all()
    assert rows.stood.min() == 1.0


def test_a_continuation_ends_at_a_stop_id(full: Decoder) -> None:
    runner = make_runner({FULL: full}, count_cache(33, 12))
    plain = continue_prompts(runner, PROMPTS, 0.0, 12, set())
    stop = plain[0].ids[plain[0].given + 3]
    for text, longer in zip(continue_prompts(runner, PROMPTS, 0.0, 12, {stop}), plain, strict=True):
        written = longer.ids[longer.given :]
        ends = written.index(stop) + 1 if stop in written else 12
        assert text.ids[text.given :] == written[:ends]


def test_heads_measured_together_do_as_each_alone(full: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onpolicy, "batch_texts", partial(batch_texts, tokens=60))  # more than one batch
    written = [
        Continuation(s, [*ids, *random_tokens(20, seed=9).tolist()], len(ids), t)
        for s, ids in PROMPTS
        for t in (0.0, 1.0)
    ]
    rounded = quantise_decoder(full, "int4")
    some = [cut_head(rounded, ids) for ids in (None, torch.arange(0, 300, 3), torch.arange(200))]
    together = measure_heads(full, some, written, seed=3)
    for each, table in zip(some, together, strict=True):
        alone = measure_positions(full, each, written, seed=3)
        for field in fields(Positions):
            np.testing.assert_array_equal(getattr(table, field.name), getattr(alone, field.name))


def test_blocks_begin_behind_the_prompt_and_the_table_survives_the_disk(full: Decoder, tmp_path: Path) -> None:
    texts = [Continuation(s, [*ids, *random_tokens(20, seed=9).tolist()], len(ids), 1.0) for s, ids in PROMPTS]
    texts.append(Continuation("nothing written", [1, 2, 3], 3, 1.0))
    rows = measure_positions(full, quantise_decoder(full, "int4"), texts)
    assert len(rows) == 20 * len(PROMPTS)
    firsts = np.flatnonzero(np.diff(rows.text, prepend=-1))
    assert (rows.depth[firsts] == 0).all()
    steps = np.diff(rows.depth.astype(int))
    assert ((steps == 1) | (rows.depth[1:] == 0)).all()
    assert rows.depth.max() == 7
    rows.save(tmp_path)
    again = Positions.load(tmp_path)
    assert again.sources == rows.sources
    for name in ("text", "depth", "drawn", "stood", "tv"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    with pytest.raises(ValueError, match="cannot read the table"):
        Positions.load(tmp_path / "none")


def make_positions(stood: list[float], depth: list[int], tv: list[float] | None = None) -> Positions:
    n = len(stood)
    flat = dict.fromkeys(
        ("temperature", "top", "gap", "entropy", "drawn", "q", "p", "same", "source", "text"), np.ones(n)
    )
    return Positions(("a",), **flat, depth=np.array(depth), tv=np.array(tv or [0.0] * n), stood=np.array(stood))


def test_acceptance_counts_only_what_earlier_drafts_leave_standing() -> None:
    rows = make_positions([0.5, 1.0, 0.0, 1.0], [0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8])
    assert rows.reached.tolist() == [1, 0.5, 1, 0]
    assert conditional_acceptance(rows)[:3] == pytest.approx([0.6, 0.6, 0.0])


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_weighted_text_is_distributed_as_accepted_drafts(seed: int) -> None:
    """The second draft's acceptance from text drawn from p, against drafts really drawn from q and settled."""
    g = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 4, generator=g).softmax(1)
    tv = torch.rand(4, generator=g)  # of the next position, by the token at this one
    stood = torch.minimum(torch.ones(4), q / p)
    estimate = float((p * stood * (1 - tv)).sum() / (p * stood).sum())
    accepted = torch.minimum(p, q)
    assert estimate == pytest.approx(float((accepted * (1 - tv)).sum() / accepted.sum()), abs=1e-5)


def test_a_calibrated_confidence_is_right_and_a_wrong_one_is_told(full: Decoder) -> None:
    g = np.random.default_rng(0)

    def rows(n: int, power: float) -> Positions:
        top = g.random(n)
        p = (g.random(n) < top**power).astype(float)
        return replace(make_positions([1.0] * n, [0] * n), top=top, p=p, q=np.ones(n))

    good, bad = calibrate(rows(4000, 2), rows(4000, 2)), calibrate(rows(4000, 2), rows(4000, 0.2))
    assert good.ece < 0.04 < 0.2 < bad.ece
    assert good.curve == sorted(good.curve)
    assert sum(share for _, _, share in good.reliability) == pytest.approx(1)


def test_agreement_is_by_depth() -> None:
    rows = replace(make_positions([1.0] * 4, [0, 1, 0, 1]), same=np.array([1, 0, 1, 1]))
    assert share_agreeing(rows)[:3] == [1.0, 0.5, 0.0]
