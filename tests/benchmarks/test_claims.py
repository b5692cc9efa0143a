"""`benchmarks/claims.py` on a tiny model: it runs, goes on where it was, and its twins are what they are called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import claims
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "WORDS", 3)
    monkeypatch.setattr(claims, "SIZES", (0.01, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0))
    return str(save_tiny(tmp_path / "tiny"))


def test_it_runs_says_verdicts_and_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["claims.py", "--model", model, "--prompts", "1", "--draws", "5", "--state", str(tmp_path / "state")]
    monkeypatch.setattr(sys, "argv", [*command, "--figure", str(tmp_path / "claims.png")])
    claims.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompts"] == 5
    assert (tmp_path / "claims.png").stat().st_size > 1000
    assert len(result["claims"]) == 10
    assert all(claim["verdict"] in ("reproduced", "not reproduced", "artefact") for claim in result["claims"])
    (tmp_path / "state" / "flow" / "00002.safetensors").unlink()
    grown = []
    measure = claims.measure_growth
    monkeypatch.setattr(claims, "measure_growth", lambda *given: grown.append(1) or measure(*given))
    claims.main()
    assert len(grown) == 1
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["claims"] == result["claims"]


def test_twins_share_the_shape_and_not_what_was_learned(model: str, tmp_path: Path) -> None:
    own = load_file(Path(model) / "model.safetensors")
    for kind in ("untrained", "shuffled"):
        twin = load_file(claims.make_twin(model, kind, tmp_path / kind) / "model.safetensors")
        assert {name: x.shape for name, x in twin.items()} == {name: x.shape for name, x in own.items()}
        for name, x in own.items():
            kept = kind == "shuffled" and (".layers." not in name or "norm" in name)
            assert torch.equal(twin[name], x) == kept, name
            if kind == "shuffled":
                assert torch.equal(twin[name].flatten().sort().values, x.flatten().sort().values)


def test_prompts_are_held_out_texts_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = claims.read_prompts(2)
    assert [prompt["class"] for prompt in found] == [*claims.CLASSES] * 2
    assert all(len(prompt["text"].split()) >= claims.WORDS for prompt in found)
    with pytest.raises(SystemExit, match="a class has only"):
        claims.read_prompts(1000)
