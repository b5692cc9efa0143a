"""`show`: the edges that it draws and writes down, the command, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from strace.analyze import BadAnalysis
from strace.checkpoint import load_decoder, open_checkpoint
from strace.extract import Edge, Traces
from strace.importance import weigh_edges
from strace.paper import app
from strace.show import draw_trace, make_page, save_trace, trace_prompt
from tests.tiny import VARIANTS, save_tiny, save_variant

PROMPT = "a $5 <b>\n&\tz"
runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


def test_the_edges_are_those_of_the_trace(model: str) -> None:
    shown = trace_prompt(model, PROMPT, 0.05)
    checkpoint = open_checkpoint(model)
    ids = torch.tensor(checkpoint.tokenizer(PROMPT)["input_ids"])
    traces = Traces(weigh_edges(load_decoder(checkpoint, "fp32"), ids))
    assert shown.edges == traces.edges(traces.count_of(0.05))
    assert "".join(shown.tokens) == PROMPT
    assert shown.all_edges == traces.total
    assert 0 < shown.tv <= 1


def test_the_whole_graph_is_the_full_model(model: str) -> None:
    shown = trace_prompt(model, "ab", 1)
    assert shown.tv < 1e-5
    assert [likely.token for likely in shown.full] == [likely.token for likely in shown.trace]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_drawn(tmp_path: Path, variant: str) -> None:
    shown = trace_prompt(str(save_variant(tmp_path, variant)), "abcdef", 0.2)
    assert shown.layers == ([0, 1, 2] if variant == "gpt_neox" else [0, 0, 1, 1, 2, 2])
    assert shown.levels == len(shown.layers) + 1
    assert {edge.kind for edge in shown.edges} == {"residual", "attention", "mlp"}
    draw_trace(shown)


def test_the_picture_has_a_line_per_edge_and_a_label_per_column(model: str) -> None:
    shown = trace_prompt(model, PROMPT, 0.1)
    axes = draw_trace(shown).axes[0]
    lines = sum(len(part.get_paths()) for part in axes.collections[:3])
    assert lines == len(shown.edges)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["a", "␣", r"\$", "5", "␣", "<", "b", ">", "⏎", "… 2 tokens", "z"]


def test_tokens_beside_each_other_that_are_not_touched_share_a_column(model: str) -> None:
    whole = trace_prompt(model, "abcdefgh", 0.1)
    kept = [edge for edge in whole.edges if edge.source == edge.target == 7]
    shown = replace(whole, edges=[*kept, Edge(0, 0, "attention", 1, 3, 2, 0.5)])
    labels = [label.get_text() for label in draw_trace(shown).axes[0].get_xticklabels()]
    assert labels == ["… 2 tokens", "c", "d", "… 3 tokens", "h"]


def test_of_a_great_many_edges_the_heaviest_are_drawn(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strace.show._MOST_DRAWN", 9)
    shown = trace_prompt(model, PROMPT, 0.3)
    axes = draw_trace(shown).axes[0]
    assert sum(len(part.get_paths()) for part in axes.collections[:-1]) == 9
    assert "drawn: the 9 heaviest" in axes.get_title(loc="left")


def test_the_page_names_every_edge_and_runs_nothing(model: str) -> None:
    shown = trace_prompt(model, PROMPT, 0.02)
    page = make_page(shown)
    assert page.count("<title>attention, layer") == sum(edge.kind == "attention" for edge in shown.edges)
    assert page.count("<title>") == len(shown.edges) + 1
    assert "&lt;b&gt;" in page
    assert "<b>\n" not in page
    assert "<script" not in page


def test_a_trace_of_one_kind_of_edge_is_drawn(model: str, tmp_path: Path) -> None:
    shown = trace_prompt(model, "abcdefgh", 4e-3)
    assert len({edge.kind for edge in shown.edges}) == 1
    save_trace(shown, tmp_path / "x.svg")


@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_the_command_writes_a_picture_and_json(model: str, tmp_path: Path, kind: str) -> None:
    picture = tmp_path / "new" / f"trace.{kind}"
    result = runner.invoke(app, ["show", model, PROMPT, "--size", "0.02", "-o", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[kind])
    record = json.loads(picture.with_suffix(".json").read_text())
    full, traced = result.output.splitlines()[:2]
    assert full.startswith(f"full model  {record['full'][0]['token']!r} {record['full'][0]['probability']:.3f}")
    assert traced.startswith(f"trace       {record['trace'][0]['token']!r}")
    assert record["columns"] == ["step", "layer", "kind", "head", "target", "source", "weight"]
    assert f"{len(record['edges']):,} of {record['all_edges']:,} edges" in result.output
    edges = [dict(zip(record["columns"], edge, strict=True)) for edge in record["edges"]]
    assert all((edge["head"] is None) == (edge["kind"] != "attention") for edge in edges)
    reached = {(record["levels"] - 1, len(record["tokens"]) - 1)}
    for edge in sorted(edges, key=lambda e: -e["step"]):
        assert (edge["step"] + 1, edge["target"]) in reached
        reached.add((edge["step"], edge["source"]))


def test_the_command_says_when_no_path_fits(model: str, tmp_path: Path) -> None:
    for size, said in (("0.004", True), ("0.5", False)):
        result = runner.invoke(app, ["show", model, "abcdefgh", "--size", size, "-o", str(tmp_path / "x.png")])
        assert ("a path from the embeddings to the output has 6 edges" in result.output) == said


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["", "--size", "0.1"], 1, "the prompt has 0 tokens"),
        (["x" * 300, "--size", "0.1"], 1, "the prompt has 300 tokens; the model's context is 1 to 256"),
        (["abc", "--size", "0"], 2, "outside (0, 1]"),
        (["abc", "--size", "1.5"], 2, "outside (0, 1]"),
        (["abc", "--size", "nan"], 2, "outside (0, 1]"),
        (["abc", "--size", "1e-9"], 1, "holds none"),
        (["abc", "--size", "0.1", "-o", "x.pdf"], 2, "a picture ends in .png, .svg, .html"),
        (["abc", "--size", "0.1", "--importance", "l3"], 2, "unknown importance 'l3'"),
        (["abc", "--size", "0.1", "--format", "int4"], 2, "unknown format 'int4'"),
    ],
)
def test_the_command_names_what_is_wrong(model: str, arguments: list[str], code: int, named: str) -> None:
    result = runner.invoke(app, ["show", model, *arguments])
    assert result.exit_code == code
    assert named in result.output


def test_an_unknown_model_is_named() -> None:
    result = runner.invoke(app, ["show", "./nowhere", "abc"])
    assert result.exit_code == 1
    assert "cannot read model './nowhere'" in result.output


def test_another_kind_of_picture_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadAnalysis, match="a picture ends in"):
        save_trace(trace_prompt(model, "ab", 0.5), tmp_path / "x.jpg")
