"""The report of two analyzed tiny models: one page that needs nothing else, a PNG per figure, the right numbers."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from strace.analyze import Analyst, BadAnalysis, Options
from strace.figures import KIND_COLOURS, Study, find_studies, presence_grid, state_alignment
from strace.report import PLOTS, first_below, write_report
from tests.strace.test_analyze import write_prompts
from tests.tiny import save_tiny

SIZES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 1.0)
PROMPTS = 6
PANELS = sum(len(plot.panels) for plot in PLOTS)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models' analyses of the same prompts, and the report."""
    here = tmp_path_factory.mktemp("report")
    prompts = write_prompts(here / "p.jsonl", PROMPTS)
    for seed, name in enumerate(("one", "other")):
        model = save_tiny(here / "models" / name, seed=seed)
        list(Analyst(Options(str(model), prompts, here / "study" / name, words=4, sizes=SIZES)).run())
    write_report(here / "study")
    return here / "study"


class Page(HTMLParser):
    """Collects what a page refers to, its ids and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(folder: Path) -> Page:
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    return page


def test_the_page_refers_to_nothing_outside_itself(folder: Path) -> None:
    page = read_page(folder)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", (folder / "report.html").read_text(encoding="utf-8"))


def test_every_figure_is_in_the_page_and_beside_it(folder: Path) -> None:
    page = read_page(folder)
    names = [f"{model}-{plot.name}.png" for model in ("one", "other") for plot in PLOTS] + ["comparison.png"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    assert page.tags.count("svg") == 2 * PANELS + 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_the_page_without_an_error(folder: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        # No sandbox: as root, in a container, Chromium does not start with one. The page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("request", lambda request: wrong.append(f"asked: {request.url}") if is_outside(request.url) else None)
        page.goto((folder / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.evaluate("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)")
        colours = page.evaluate(COLOURS)
        browser.close()
    assert wrong == []
    # None is squeezed, none cut off, on a telephone neither.
    assert len(boxes) == 2 * PANELS + 3
    assert min(boxes) > 300
    assert max(boxes) <= width
    # Every text and line of the drawings has a colour, another one than the page's.
    assert colours["missing"] == 0
    assert colours["ink"] != colours["page"]


COLOURS = """() => {
  const style = getComputedStyle(document.documentElement), svg = [...document.querySelectorAll('svg')]
  const named = new Set(svg.flatMap(e => [...e.outerHTML.matchAll(/var\\((--\\w+)\\)/g)].map(m => m[1])))
  return {
    missing: [...named].filter(name => !style.getPropertyValue(name)).length,
    ink: getComputedStyle(document.querySelector('svg text')).fill,
    page: getComputedStyle(document.body).backgroundColor,
  }
}"""


def is_outside(url: str) -> bool:
    return not url.startswith(("data:", "file:"))


def test_clip_paths_of_two_figures_never_share_a_name(folder: Path) -> None:
    found = re.findall(r'<clipPath id="([^"]+)"', (folder / "report.html").read_text(encoding="utf-8"))
    assert len(found) > len(PLOTS)
    assert len(set(found)) == len(found)


def test_the_table_says_what_the_rows_say(folder: Path) -> None:
    study, text = find_studies(folder)[0], " ".join(read_page(folder).text)
    at = SIZES.index(0.1)
    tv = np.median([part.rows[at].tv for part in study.parts])
    assert f"{tv:.3f}" in text
    assert f"{np.median([part.counts[at] for part in study.parts]):,.0f}" in text
    assert f"{PROMPTS} of {PROMPTS}" in text


def test_presence_counts_prompts_in_whose_trace_a_component_is(folder: Path) -> None:
    study = find_studies(folder)[0]
    for at in range(len(SIZES)):
        grid = presence_grid(study, at)
        for l in range(3):
            assert grid[l, 1] == np.mean([part.attention[at][l][1] > 0 for part in study.parts])
            assert grid[l, -1] == np.mean([part.mlp[at][l] > 0 for part in study.parts])
    assert (presence_grid(study, len(SIZES) - 1) == 1).all()


def test_states_align_with_the_full_runs_at_full_size(folder: Path) -> None:
    alignment = state_alignment(find_studies(folder)[0])
    assert alignment.shape == (len(SIZES),)
    assert alignment[-1] == pytest.approx(1, abs=1e-4)


def test_a_point_of_density_against_entropy_says_its_prompt(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in find_studies(folder)[0].parts:
        assert f"<title>{part.density:.3f}: {part.text}</title>" in page


def test_the_first_size_that_stays_below_a_bar_is_named(folder: Path) -> None:
    study = find_studies(folder)[0]
    tv = np.array([0.9, 0.4, 0.6, 0.45, 0.4, 0.1, 0.0])
    assert first_below(study, tv, 0.5) == f"{SIZES[3]:g}"
    assert first_below(study, tv, 0.05) == "1"
    assert first_below(study, tv, 0.95) == f"{SIZES[0]:g}"
    assert first_below(study, tv + 0.5, 0.05) == "none"


def test_quarters_and_kinds_sum_to_the_trace(folder: Path) -> None:
    study = find_studies(folder)[0]
    kinds = sum(study.measured(name).reshape(PROMPTS, len(SIZES), -1).sum(2) for name in KIND_COLOURS)
    assert np.array_equal(kinds, study.counts)


def test_one_finished_prompt_is_enough_and_markup_is_shown_not_run(folder: Path, tmp_path: Path) -> None:
    whole = find_studies(folder)[0]
    target = tmp_path / "lone"
    (target / "parts").mkdir(parents=True)
    for name in ("parts/00000.json", "parts/00000.safetensors"):
        (target / name).write_bytes((whole.folder / name).read_bytes())
    manifest = whole.manifest.model_copy(update={"prompts_file": "<script>x</script>"})
    (target / "manifest.json").write_text(manifest.model_dump_json())
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert "not known (n = 1)" in " ".join(page.text)
    assert "script" not in page.tags


def test_a_folder_without_an_analysis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadAnalysis, match="holds no analysis"):
        write_report(tmp_path)
    (tmp_path / "one" / "parts").mkdir(parents=True)
    (tmp_path / "one" / "manifest.json").write_text("[]")
    with pytest.raises(BadAnalysis, match="cannot read"):
        write_report(tmp_path)


def test_the_first_size_that_can_hold_a_path_is_found(folder: Path) -> None:
    study: Study = find_studies(folder)[0]
    counts = np.median(study.counts, 0)
    assert counts[study.reach] >= study.manifest.shape.steps
    assert study.reach == 0 or counts[study.reach - 1] < study.manifest.shape.steps
