"""`benchmarks/routed.py`: its figures on an engine whose draft is known, and its resampling of a table of losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import routed

from server.engine.options import Options
from server.engine.request import Mode
from strace.losses import THRESHOLDS, Losses
from tests.server.engine.harness import decode, make_engine, make_request
from tests.server.engine.test_risk import FirstToken
from tests.strace.test_certificate import make_certificate

PROMPTS = [[i, i + 1] for i in range(20, 24)]
CERTIFICATE = make_certificate("pooled", {0.05: 0.0}, (0.0, 1.0), tokens=12)


def test_measured() -> None:
    engine = make_engine(Options(draft_length=4, seed=0), certificates={"pooled": CERTIFICATE}, chooser=FirstToken())
    row = routed.measure(engine, PROMPTS, 1.0, 0.05, 12)
    assert (row["n"], row["routed"], row["tokens"]) == (4, 4, 48)
    assert 0 < row["unverified"] < 1
    low, high = row["interval"]
    assert 0 <= low <= row["divergence"] <= high <= 1
    assert min(row["perplexity"], row["perplexity_full"]) > 1


def test_scores_are_the_full_models() -> None:
    engine = make_engine()
    request = make_request(PROMPTS[0], Mode.FULL, 8)
    (got,) = decode(engine, replace(request, logprobs=0))
    assert routed.score(engine, PROMPTS[0], got.ids) == pytest.approx([told.logprob for told in got.logprobs], abs=1e-4)


def test_where_texts_part() -> None:
    assert routed.find_parting([1, 2, 3], [1, 5, 3]) == 1
    assert routed.find_parting([1, 2], [1, 2, 3]) is None
    engine = make_engine(Options(seed=0))
    (level,) = (level for level in CERTIFICATE.levels if level.temperature == 0)
    never = level.model_copy(update={"threshold": 1.0})
    assert routed.part(engine, PROMPTS, 0.0, never, 12) == {"parted": 0.0, "parted_at": None}
    requests = [make_request(prompt, Mode.FULL, 40, class_name=None) for prompt in PROMPTS]
    full = decode(engine, *requests)
    loose = decode(engine, *(replace(request, mode=Mode.ROUTED, threshold=0.0) for request in requests))
    parted = [a.ids != b.ids for a, b in zip(full, loose, strict=True)]
    assert any(parted)
    assert routed.part(engine, PROMPTS, 0.0, level, 40)["parted"] == sum(parted) / len(PROMPTS)


def test_resampled(tmp_path: Path) -> None:
    table, losses = tmp_path / "losses.safetensors", Losses("key")
    for threshold, loss in zip(THRESHOLDS, (0, 1, *[9] * 10), strict=True):
        for document in range(200):
            losses.add(document, 1.0, threshold, 100, 10, loss if document % 2 else 0)
    losses.save(table)
    certificate = make_certificate(thresholds={0.02: 0.95, 0.05: None}, temperatures=(1.0,))
    rows = routed.resample(table, certificate, 1.0)
    assert [row["risk"] for row in rows] == [0.02, 0.05]
    assert all(row["n"] == 200 and row["kept"] and row["broken"] <= row["allowed"] for row in rows)
    assert routed.resample(table, certificate, 0.0) == []
