"""`trace` and `inspect` as a user meets them: output, help, exit codes and messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strace import cli, trace
from strace.cli import app, draw_layers
from strace.search import StepCosts
from strace.subgraph import MANIFEST, read_manifest
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
    assert sorted(p.name for p in folder.iterdir()) == ["classifier.safetensors", "digits", "pooled"]


def test_inspect_shows_a_table_and_a_picture(folder: Path) -> None:
    result = runner.invoke(app, ["inspect", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    manifest = read_manifest(folder / "digits")
    for shown in (
        "digits",
        "pooled",
        "int4",
        f"{manifest.measured.bytes_share:.3f}",
        *draw_layers(manifest),
        manifest.why,
    ):
        assert shown in result.output


def test_inspect_gives_the_manifests_as_json(folder: Path) -> None:
    result = runner.invoke(app, ["inspect", str(folder), "--json"])
    stored = json.loads((folder / "pooled" / MANIFEST).read_text())
    assert json.loads(result.output)["pooled"] == stored


def test_bars_are_as_high_as_the_share_that_is_kept(folder: Path) -> None:
    manifest = read_manifest(folder / "digits")
    layers = [
        manifest.kept[0].model_copy(update={"groups": g, "neurons": n}) for g, n in (([], 96), ([1], 1), ([0, 1], 0))
    ]
    lines = draw_layers(manifest.model_copy(update={"kept": layers}))
    assert lines == ["  attention layer 0 | ▄█| 2", "  MLP       layer 0 |█▁ | 2"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trace", "nowhere", "-o", "OUT"], 1, "nowhere"),
        (["trace", "MODEL", "-o", "OUT", "--prompts", "none"], 1, "no prompt folder none"),
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
        (["inspect", "OUT"], 1, "no subgraph in"),
    ],
)
def test_bad_input_exits_with_a_message(folder: Path, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    places = {"OUT": str(tmp_path / "out"), "MODEL": str(folder.parent / "model")}
    result = runner.invoke(app, [places.get(arg, arg) for arg in args])
    assert result.exit_code == code
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_inspect_names_a_broken_subgraph(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / MANIFEST).write_text("{}")
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "schema version None is not known" in result.output


@pytest.mark.parametrize("command", ["trace", "inspect"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"strace-llm {command} " in result.output
    assert "Exit code 1" in result.output
    assert cli.trace is trace.trace
