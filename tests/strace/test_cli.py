"""`trace` and `inspect` as a user meets them: output, help, exit codes and messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from strace import cli, trace
from strace.checkpoint import Checkpoint
from strace.classes import BadPrompts, Parts
from strace.classifier import read_classifier
from strace.cli import app
from strace.costs import dump_table
from strace.errors import WRONG_USAGE
from strace.keep import Plan
from strace.measure import predict_speedup
from strace.overview import draw_layers
from strace.search import StepCosts
from strace.subgraph import read_manifest
from tests.strace.test_search import make_table
from tests.strace.test_trace import write_prompts
from tests.tiny import save_tiny

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("cli")
    model, prompts = str(save_tiny(here / "model")), str(write_prompts(here / "prompts"))
    args = ["trace", model, "--prompts", prompts, "-o", str(here / "out"), "--size", "0.25", "--classes", "digits"]
    with pytest.MonkeyPatch.context() as patch:
        cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
        patch.setattr(trace, "price_steps", lambda *_: cheap)
        result = runner.invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "highest predicted speedup" in result.output
    assert f"strace-llm serve {model} --subgraphs {here / 'out'}" in result.output
    return here / "out"


def test_only_the_classes_named_are_traced(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["classifier.json", "classifier.safetensors", "digits", "pooled"]


def test_a_class_is_fitted_on_as_many_tokens_as_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(checkpoint: Checkpoint, parts: Parts, seed: int, fit_tokens: int) -> None:
        raise BadPrompts(f"{fit_tokens} tokens")

    monkeypatch.setattr(trace, "gather_material", gather)
    args = ["trace", str(folder.parent / "model"), "--prompts", str(folder.parent / "prompts"), "-o", str(folder)]
    assert "class digits: 65536 tokens" in runner.invoke(app, args).output
    assert "class digits: 20000 tokens" in runner.invoke(app, [*args, "--fit-tokens", "20000"]).output
    assert runner.invoke(app, [*args, "--fit-tokens", "20"]).exit_code == WRONG_USAGE


def test_inspect_shows_what_was_traced(folder: Path) -> None:
    result = runner.invoke(app, ["inspect", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    manifest = read_manifest(folder / "digits")
    for shown in ("digits", "pooled", f"{manifest.measured.bytes_share:.3f}", *draw_layers(manifest)):
        assert shown in result.output


def test_another_machines_costs_project_what_was_traced(folder: Path, tmp_path: Path) -> None:
    model, prompts, table = str(folder.parent / "model"), str(folder.parent / "prompts"), tmp_path / "other.json"
    args = ["trace", model, "--prompts", prompts, "-o", str(folder), "--size", "0.25", "--classes", "digits"]
    table.write_text(dump_table(make_table((0.0, 0.5), {"digits": 0.1, "pooled": 0.3})))
    result = runner.invoke(app, [*args, "--costs", str(table)])
    assert result.exit_code == 0, result.output
    manifest = read_manifest(folder / "digits")
    [record] = [each for each in manifest.candidates if each.plan == manifest.plan]
    elsewhere, _ = predict_speedup(record.accepted, 0.5 * record.bytes_share, {1: 1.0, 9: 1.5})
    told = f"digits: {record.plan.name}: speedup {elsewhere:.2f} projected to another, 8 threads"
    assert told in result.output
    assert f"{record.speedup:.2f} predicted here" in result.output
    for content in (None, "{}"):
        table.unlink() if content is None else table.write_text(content)
        result = runner.invoke(app, [*args, "--costs", str(table)])
        assert result.exit_code == 1
        assert f"cannot read the costs {table}" in result.output


def test_a_labelled_file_is_traced_and_a_log_by_what_it_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end on a model folder not made here, the search cut down to one plan."""
    cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
    monkeypatch.setattr(trace, "price_steps", lambda *_: cheap)
    monkeypatch.setattr(trace, "WRITTEN", 8)
    monkeypatch.setattr(trace, "CONTINUED", {"choose": 4, "report": 4})
    one = [Plan("all", coverage=1.0, format="int8", repaired=False)]
    monkeypatch.setattr(trace, "plan_candidates", lambda *_: one)
    model, out, rng = str(folder.parent / "model"), tmp_path / "out", np.random.default_rng(0)
    topics = {"sea": "sail harbour anchor storm captain tide wave crew", "law": "judge verdict witness trial jury oath"}
    texts = [(name, " ".join(rng.choice(words.split(), 12))) for name, words in topics.items() for _ in range(20)]
    labelled, log = tmp_path / "labelled.jsonl", tmp_path / "log.txt"
    turns = [{"class": name, "messages": [{"role": "user", "content": text}]} for name, text in texts]
    labelled.write_text("\n".join(map(json.dumps, turns)))
    log.write_text("\n".join(text for _, text in texts))
    result = runner.invoke(app, ["trace", model, "--prompts", str(labelled), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["law", "pooled", "sea"]
    confused = read_classifier(out).confusion[-2]
    assert confused.precision == 1.0
    auto = ["trace", model, "--prompts", str(log), "--classes", "auto", "--clusters", "2", "-o", str(tmp_path / "auto")]
    result = runner.invoke(app, auto)
    assert result.exit_code == 0, result.output
    words = [name.split("-") for name in read_classifier(tmp_path / "auto").names]
    assert {tuple(set(ws) <= set(t.split()) for t in topics.values()) for ws in words} == {(True, False), (False, True)}
    lines = [json.loads(line) for line in (tmp_path / "auto" / "prompts.jsonl").read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted({text for _, text in texts})
    assert runner.invoke(app, auto).output.count("finished before") == 3


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trace", "nowhere", "-o", "OUT"], 1, "nowhere"),
        (["trace", "MODEL", "-o", "OUT", "--prompts", "none"], 1, "no prompts at none"),
        (
            ["trace", "MODEL", "-o", "OUT", "--format", "int3"],
            2,
            "unknown format 'int3'; choose one of int4, int8, bf16",
        ),
        (["trace", "MODEL", "-o", "OUT", "--size", "1.5"], 2, "--size 1.5 is not a share between 0 and 1"),
        (
            ["trace", "MODEL", "-o", "OUT", "--classes", "poems"],
            1,
            "has no class poems; it has chat, code, facts, math, stories",
        ),
        (["trace", "MODEL", "-o", "OUT", "--clusters", "3"], 2, "--clusters is for --classes auto"),
        (["trace", "MODEL", "-o", "OUT", "--classes", "auto"], 1, "finds classes in the prompts of --prompts"),
        (["trace", "MODEL", "-o", "OUT", "--class", "a"], 1, "--class names the class of one file"),
    ],
)
def test_bad_input_exits_with_a_message(folder: Path, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    places = {"OUT": str(tmp_path / "out"), "MODEL": str(folder.parent / "model")}
    result = runner.invoke(app, [places.get(arg, arg) for arg in args])
    assert result.exit_code == code
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["trace", "inspect"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"strace-llm {command} " in result.output
    assert "Exit code 1" in result.output
    assert cli.trace is trace.trace
