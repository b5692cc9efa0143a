"""`inspect`: what it shows of a folder in a terminal, as JSON and as a page, and what it refuses."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strace.checkpoint import embedded_folder
from strace.cli import app
from strace.overview import (
    Overview,
    chosen,
    describe_place,
    draw_layers,
    draw_units,
    list_search,
    open_overview,
    render_page,
)
from strace.subgraph import MANIFEST, BadSubgraph, Manifest
from tests.tiny import save_tiny

SHIPPED = embedded_folder() / "subgraphs"
runner = CliRunner()


@pytest.fixture(scope="module")
def overview() -> Overview:
    return open_overview("embedded")


def change(folder: Path, name: str, **fields: object) -> Path:
    """A copy of the shipped manifests with fields of one changed."""
    for path in SHIPPED.glob(f"*/{MANIFEST}"):
        stored = json.loads(path.read_text())
        place = folder / path.parent.name
        place.mkdir()
        (place / MANIFEST).write_text(json.dumps(stored | (fields if place.name == name else {})))
    return folder


def test_the_table_has_a_row_for_each_class_within_a_terminal() -> None:
    result = runner.invoke(app, ["inspect", "embedded"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    shown = open_overview("embedded")
    for name, manifest in shown.manifests.items():
        assert f"{name}: {manifest.why}" in " ".join(result.output.split())
        assert f"{manifest.measured.bytes_per_step / 1e6:.2f}" in result.output
        assert f"{chosen(manifest).speedup:.2f}" in result.output
        for line in draw_layers(manifest):
            assert line in result.output
        assert " ".join(f"{a:.3f}" for a in manifest.measured.accepted) in " ".join(result.output.split())
        assert describe_place(manifest) in " ".join(result.output.split())
    assert "not distilled" in result.output
    assert "classifier of chat, code, facts, math, stories, all else to pooled" in result.output


def test_a_class_is_shown_layer_by_layer_with_its_search(overview: Overview) -> None:
    result = runner.invoke(app, ["inspect", str(SHIPPED), "--class", "math"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    manifest = overview.manifests["math"]
    for line in draw_units(manifest):
        assert line in result.output
    for candidate in manifest.candidates:
        assert candidate.plan.name in result.output
    assert result.output.count("chosen") == 1
    assert result.output.count(" best") == sum(c.best and c.plan != manifest.plan for c in manifest.candidates)
    assert "stories" not in result.output


def test_pictures_show_what_is_kept(overview: Overview) -> None:
    manifest = overview.manifests["math"]
    base = manifest.base.model_copy(update={"neurons": 96, "kv_heads": 2})
    layers = [
        manifest.kept[0].model_copy(update={"groups": g, "neurons": n}) for g, n in (([], 96), ([1], 1), ([0, 1], 0))
    ]
    small = manifest.model_copy(update={"kept": layers, "base": base})
    assert draw_layers(small) == ["  attention layer 0 | ▄█| 2", "  MLP       layer 0 |█▁ | 2"]
    assert draw_units(small)[:3] == [
        "  layer  0  groups ··  neurons ████████████████████ 96/96",
        "  layer  1  groups ·█  neurons █··················· 1/96",
        "  layer  2  groups ██  neurons ···················· 0/96",
    ]
    page = render_page(Overview(SHIPPED, {"math": small}, None))
    assert page.count('class="kept"') == 1 + 2 + 3
    assert "no classifier" in page


def test_json_is_what_is_stored() -> None:
    result = runner.invoke(app, ["inspect", "embedded", "--json"])
    shown = json.loads(result.output)
    assert shown["subgraphs"]["math"]["kept"] == json.loads((SHIPPED / "math" / MANIFEST).read_text())["kept"]
    assert shown["classifier"] == json.loads((SHIPPED / "classifier.json").read_text())
    assert shown["folder"] == str(SHIPPED)


class Reader(HTMLParser):
    """Checks that elements nest, and gathers text and what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.loads = "", []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for key, value in attrs if key in ("src", "href") and value != "data:,"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_has_it_all(tmp_path: Path, overview: Overview) -> None:
    page = tmp_path / "subgraphs.html"
    result = runner.invoke(app, ["inspect", "embedded", "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert str(page) in "".join(result.output.split())
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert not reader.open
    assert not reader.loads
    for name, manifest in overview.manifests.items():
        assert name in reader.text
        assert manifest.why in reader.text
        assert describe_place(manifest) in reader.text
        assert f"{manifest.measured.bytes_per_step:,}" in reader.text
        for row in list_search(manifest):
            assert all(cell in reader.text for cell in row)
    assert page.read_text().count("<circle") == sum(len(m.candidates) for m in overview.manifests.values())


def test_what_a_name_says_cannot_become_markup(overview: Overview) -> None:
    manifest = overview.manifests["math"].model_copy(update={"why": "<script>alert(1)</script>"})
    assert "<script>" not in render_page(Overview(Path("<b>"), {"<i>": manifest}, None))


def test_a_class_that_does_not_pay_says_why_and_a_distilled_one_that_it_is(tmp_path: Path) -> None:
    folder = change(tmp_path, "math", pays=False, why="no subgraph: predicted 1.02", distilled=10.0)
    result = runner.invoke(app, ["inspect", str(folder)], env={"COLUMNS": "100"})
    assert "no subgraph: predicted 1.02" in result.output
    assert "distilled for 10 minutes" in result.output
    [row] = [line for line in result.output.splitlines() if line.split()[:1] == ["math"]]
    assert row.split()[-1] == "no"
    assert "no classifier: the folder was made by an earlier version" in result.output


def test_subgraphs_of_another_model_are_refused(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model"))
    result = runner.invoke(app, ["inspect", model, "--subgraphs", str(SHIPPED)])
    assert result.exit_code == 1
    assert "was cut from another model (embedded" in result.output
    assert runner.invoke(app, ["inspect", "embedded", "--subgraphs", str(SHIPPED)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "no subgraph in nowhere: expected CLASS/subgraph.json"),
        (["embedded", "--class", "verse"], "has no class 'verse'; it has chat, code, facts, math, pooled, stories"),
        (["embedded", "--html", "no/such/folder/x.html"], "no/such/folder"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], named: str) -> None:
    result = runner.invoke(app, ["inspect", *arguments])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert named in result.output


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "math", tmp_path / "math")
    (tmp_path / "math" / MANIFEST).write_text("{}")
    with pytest.raises(BadSubgraph, match="schema version None"):
        open_overview(str(tmp_path))


def test_a_manifest_of_before_has_no_training(overview: Overview) -> None:
    stored = json.loads((SHIPPED / "math" / MANIFEST).read_text())
    stored.pop("distilled", None)
    assert Manifest.model_validate(stored).distilled == 0
