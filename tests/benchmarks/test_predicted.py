"""`benchmarks/predicted.py`: the arithmetic of a cycle, and prompts that no other benchmark reads."""

from __future__ import annotations

import json
from pathlib import Path

import modes
import numpy as np
import predicted
import pytest

from server.engine.request import Mode, Ran

BENCHMARKS = Path(predicted.__file__).parent


def test_a_cycle_is_its_drafts_and_one_pass() -> None:
    accepted = [0.9, 0.8, 0.5]
    assert predicted.predict_tokens(accepted, 0) == 1
    assert predicted.predict_tokens(accepted, 2) == pytest.approx(1 + 0.9 + 0.72)
    assert predicted.predict_tokens(accepted, 2.5) == pytest.approx(1 + 0.9 + 0.72 + 0.18)
    full, draft = np.array([0.0, 1.0, 1.2, 1.4, 1.6]), np.array([0.0, 0.3, 0.4])
    assert predicted.predict_seconds(full, draft, 3) == pytest.approx(0.9 + 1.6)


def test_what_was_predicted_stands_beside_what_happened() -> None:
    ran = Ran(Mode.EXACT, "code", 10, drafts=4, drafted=8, accepted=6, seconds=8.0)
    full, draft = np.array([0.0, 1.0, 1.2, 1.4]), np.array([0.0, 0.3])
    row = predicted.compare([ran, ran], [0.9, 0.8], full, draft)
    assert (row["cycles"], row["drafts"]) == (8, 2.0)
    assert (row["predicted_tokens"], row["realised_tokens"]) == (2.62, 2.5)
    assert (row["predicted_ms"], row["realised_ms"], row["off_ms"]) == (2000.0, 2000.0, 0.0)
    assert predicted.compare([Ran(Mode.EXACT, "code", 10, bypass="why")], [0.9], full, draft) == {"bypassed": 1}


@pytest.mark.parametrize("name", modes.CLASSES)
def test_no_prompt_is_one_that_was_tuned_on(name: str) -> None:
    def read(folder: str) -> set[str]:
        lines = (BENCHMARKS / folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        return {json.loads(line)["text"] for line in lines if line}

    assert len(read("unused")) == 24
    assert not read("unused") & read("prompts")
