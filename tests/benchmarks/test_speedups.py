"""`benchmarks/speedups.py`: what is counted, what a larger model's subgraph is taken to be, and what its steps cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import speedups
from predicted import Run, Steps

from server.engine.request import Mode, Ran
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.draft import TIMING, Held, Verdict
from strace.keep import slice_decoder
from strace.search import StepCosts
from tests.tiny import save_tiny

STEPS = Steps(0.3, {1: 1.0, 9: 1.8}, own_plain=0.0, own_drafting=0.0)


def test_acceptance_is_of_drafts_whose_predecessors_stood() -> None:
    verdicts = [[Verdict([1, 2, 3, 9], []), Verdict([1, 9], [])], [Verdict([9], [])]]
    judge = lambda *_: verdicts.pop(0)  # noqa: E731
    runner = SimpleNamespace(verify=judge, verify_pass=judge, name="native")
    judging = speedups.Judging(runner)  # type: ignore[arg-type]
    held = Held(0, [1, 2, 3], None, TIMING)
    assert judging.name == "native"
    judging.verify(None, [held, held])  # type: ignore[arg-type]
    judging.verify_pass(None, [0], [held])  # type: ignore[arg-type]
    assert judging.take() == [2 / 3, 1 / 2, 1 / 1]
    assert judging.take() == []


def test_a_subgraph_keeps_the_same_shares_of_another_model(tmp_path: Path) -> None:
    """And its step costs what the line says of such a graph, built."""
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "bf16")
    spec, base = full.spec, replace(full.spec, layers=3, vocabulary=1000, mlp=10 * full.spec.mlp)
    layers = [SimpleNamespace(groups=list(range(base.kv_heads)), neurons=n * full.spec.mlp) for n in (2, 5, 8)]
    manifest: Any = SimpleNamespace(kept=layers, head_rows=250)
    kept = speedups.keep_alike(spec, base, manifest)
    assert len(kept.groups) == len(kept.neurons) == spec.layers
    assert {len(groups) for groups in kept.groups} == {spec.kv_heads}
    assert {len(neurons) for neurons in kept.neurons} == {round(spec.mlp / 2 / 32) * 32}
    assert kept.token_ids is not None
    assert len(kept.token_ids) == round(spec.vocabulary / 4)
    costs = StepCosts((1e-4, 2e-5, 3e-10), {1: 1e-3, 9: 3e-3}, "native")
    for units in (kept, speedups.keep_alike(spec, base, None)):
        built = quantise_decoder(slice_decoder(full, units), "int4")
        steps = speedups.project(costs, spec, units, STEPS)
        assert steps.draft == pytest.approx(costs.c(built) * costs.full[1], rel=0.02)


def test_realised_stands_beside_predicted() -> None:
    full = [Run(Ran(Mode.FULL, "code", 9, tokens=11, seconds=10.0), 11, 99.0)]
    exact = [Run(Ran(Mode.EXACT, "code", 9, tokens=21, drafts=4, drafted=16, accepted=16, seconds=10.0), 21, 99.0)]
    row = speedups.describe_draft([1.0] * 8, STEPS, exact, full)
    assert (row["realised"], row["drafts"], row["k"]) == (2.0, 4.0, 8)
    assert row["predicted"] == pytest.approx(9 / (8 * 0.3 + 1.8), abs=1e-3)
    assert row["of_predicted"] == pytest.approx(2 / row["predicted"], abs=1e-3)


def test_a_shape_is_priced_once_unless_it_is_to_be_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, costs, asked = save_tiny(tmp_path / "model"), StepCosts((1.0, 2.0, 3.0), {1: 1.0, 9: 2.0}, "native"), []

    def price(*arguments: object) -> StepCosts:
        asked.append(arguments)
        return costs

    monkeypatch.setattr(speedups, "write_shape", lambda name: model)
    monkeypatch.setattr(speedups, "price_steps", price)
    assert [speedups.price_shape("some", tmp_path / "state", anew=False) for _ in range(3)] == [costs] * 3
    assert len(asked) == 1
    assert speedups.price_shape("some", tmp_path / "state", anew=True) == costs
    assert len(asked) == 2
