"""`benchmarks/predicted.py`: the arithmetic of a cycle, and prompts that no other benchmark reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import modes
import predicted
import pytest

from server.engine.request import Mode, Ran
from strace.costs import Cost
from strace.runner import FULL

BENCHMARKS = Path(predicted.__file__).parent


def test_a_cycle_is_its_drafts_and_one_pass() -> None:
    accepted = [0.9, 0.8, 0.5]
    assert predicted.predict_tokens(accepted, 0) == 1
    assert predicted.predict_tokens(accepted, 2) == pytest.approx(1 + 0.9 + 0.72)
    assert predicted.predict_tokens(accepted, 2.5) == pytest.approx(1 + 0.9 + 0.72 + 0.18)
    steps = predicted.Steps(0.3, {1: 1.0, 2: 1.2, 4: 1.6}, own_plain=0.1, own_drafting=0.2)
    assert steps.plain == pytest.approx(1.1)
    assert steps.cycle(3) == pytest.approx(0.9 + 1.6 + 0.2)
    assert steps.cycle(1.5) == pytest.approx(0.45 + 1.3 + 0.2)


def test_steps_are_timed_all_along() -> None:
    def costs(scale: float) -> list[Cost]:
        return [Cost("code", 1, 1, 64, 0.1 * scale), *(Cost(FULL, 1, n, 64, n * scale) for n in (1, 4))]

    timings = [costs(1.0), costs(2.0), costs(3.0)]
    assert predicted.make_steps(timings, (0.5, 0.7)) == predicted.Steps(pytest.approx(0.2), {1: 2.0, 4: 8.0}, 0.5, 0.7)


def test_passes_are_timed_around_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []

    def run(contestants: dict[str, Any], prompts: list[list[int]], *_: Any) -> dict[str, list[Any]]:
        happened.append(len(prompts))
        return {each: list(prompts) for each in contestants}

    monkeypatch.setattr(predicted, "run_in_turn", run)
    timed = partial(happened.append, "timed")
    runs, timings = predicted.run_and_time(timed, {"full": None, "served": None}, [[1], [2], [3]], "code", 1.0, 8)
    assert happened == ["timed", 2, "timed", 1, "timed"]
    assert runs == {"full": [[1], [2], [3]], "served": [[1], [2], [3]]}
    assert len(timings) == 3


def test_what_was_predicted_stands_beside_what_happened() -> None:
    steps = predicted.Steps(0.3, {1: 1.0, 2: 1.2, 3: 1.4}, own_plain=0.5, own_drafting=0.2)
    ran = Ran(Mode.EXACT, "code", 10, tokens=12, drafts=4, drafted=8, accepted=6, seconds=10.3)  # a plain step ended it
    row = predicted.compare([ran, ran], [0.9, 0.8], steps)
    assert (row["cycles"], row["drafts"]) == (8, 2.0)
    assert (row["predicted_tokens"], row["realised_tokens"]) == (2.62, 2.5)
    assert row["off_between"] == (row["off_tokens"],) * 2, "two equal texts do not spread"
    assert (row["predicted_ms"], row["realised_ms"], row["off_ms"]) == (2200.0, 2200.0, 0.0)
    assert predicted.compare([Ran(Mode.EXACT, "code", 10, bypass="why")], [0.9], steps) == {"bypassed": 1}


def test_the_interval_is_over_texts() -> None:
    rans = [Ran(Mode.EXACT, "code", 10, drafts=10, drafted=40, accepted=n) for n in (20, 30, 40) * 8]
    low, high = predicted.bootstrap_tokens(rans)
    assert 3.5 < low < 4.0 < high < 4.5


@pytest.mark.parametrize("name", modes.CLASSES)
def test_no_prompt_is_one_that_was_tuned_on(name: str) -> None:
    def read(folder: str) -> set[str]:
        lines = (BENCHMARKS / folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return {json.loads(line)["text"] for line in lines if line}

    assert len(read("unused")) == 24
    assert not read("unused") & read("prompts")
