"""`benchmarks/routed.py`: its figures on an engine whose draft is known, and its resampling of a table of losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import routed

from server.engine.guard import Bucket, GateTrack, Guard, Trust
from server.engine.options import Options
from server.engine.request import Mode, Ran
from strace.losses import THRESHOLDS, Losses
from tests.server.engine.harness import FixedCost, decode, make_engine, make_request
from tests.server.engine.test_risk import FirstToken
from tests.strace.test_certificate import make_certificate

PROMPTS = [[i, i + 1] for i in range(20, 24)]
CERTIFICATE = make_certificate("pooled", {0.05: 0.0}, (0.0, 1.0), tokens=12)


def test_measured() -> None:
    engine = make_engine(Options(draft_length=4, seed=0), certificates={"pooled": CERTIFICATE}, chooser=FirstToken())
    row = routed.measure(engine, "pooled", PROMPTS, 1.0, 0.05, 12)
    assert (row["n"], row["routed"], row["tokens"]) == (4, 4, 48)
    assert 0 < row["unverified"] < 1
    low, high = row["interval"]
    assert 0 <= low <= row["divergence"] <= high <= 1
    assert min(row["perplexity"], row["perplexity_full"]) > 1
    low, high = row["over_exact_interval"]
    assert low < high
    assert row["left"] is None
    assert row["gate"]["trust"] == "UNSURE"  # nothing is guarded where drafts are of a fixed length
    assert 1 < row["by_cost"]["exact"] <= row["most_by_cost"]
    about = {"class": "pooled", "temperature": 1.0, "risk": 0.05}
    assert routed.judge(about | row).endswith("the gate was open")


def test_a_gate_that_the_guard_has_shut_is_told_of() -> None:
    engine = make_engine(
        Options(seed=0),
        certificates={"pooled": CERTIFICATE},
        chooser=FirstToken(),
        guard=Guard(FixedCost().table("full")),
    )
    engine.guard.forget = lambda: None  # type: ignore[method-assign]
    engine.guard._buckets[0] = bucket = Bucket()
    bucket.gates["pooled"] = gate = GateTrack()
    gate.trust = Trust.OFF
    row = routed.measure(engine, "pooled", PROMPTS, 1.0, 0.05, 12)
    assert row["gate"]["trust"] == "OFF"
    assert "not surely faster than exact" in routed.judge({"class": "pooled", "temperature": 1.0, "risk": 0.05} | row)


def test_what_costs_alone_would_give() -> None:
    """Drafts of two tokens, half of which stand: two tokens a cycle, for two draft steps and a pass over three."""
    cost = FixedCost(c=0.1, v8=1.7)
    ran = Ran(Mode.ROUTED, "pooled", 3, drafts=10, drafted=20, accepted=10)
    assert routed.predict([ran], cost, "pooled") == pytest.approx(2 / (0.2 + 1.2))
    assert routed.predict([Ran(Mode.EXACT, "pooled", 3)], cost, "pooled") is None
    assert routed.bound_speedup(cost, "pooled", 4) == pytest.approx(4 / (0.3 + 1.3))


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
