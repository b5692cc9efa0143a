"""A self-contained HTML page of everything that a folder's analyses show, and every figure as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from strace.analyze import BadAnalysis, Manifest, Part
from strace.figures import (
    POINTS,
    STYLE,
    Draw,
    Study,
    draw_controls,
    draw_controls_by_edges,
    draw_cosines,
    draw_densities,
    draw_entropy,
    draw_kinds,
    draw_lorenz,
    draw_models,
    draw_nucleus,
    draw_pair,
    draw_presence,
    draw_quarters,
    draw_spreads,
    draw_states,
    draw_top1,
    draw_tv,
    draw_tv_by_macs,
    draw_tv_by_paths,
    draw_tv_by_singles,
    draw_unigram,
    find_studies,
    name_marks,
    save_panels,
    say_correlation,
    shared_densities,
)
from strace.files import write_beside
from strace.metrics import Doubles, spearman
from strace.page import render

REPORT, FIGURES = "report.html", "figures"
CORE = 1e-3  # the size near which the paper finds a core
_EXTREMES = 5  # prompts of either end that are quoted
_QUOTED = 200  # characters of a prompt
_PAIRS = 6  # of models that are drawn; the table has all


@dataclass(frozen=True)
class Panel:
    """One chart of a figure: what stands over it, and how it is drawn."""

    title: str
    draw: Callable[[Axes, Study], None]


@dataclass(frozen=True)
class Plot:
    """A figure of the report: its file name, title, what it shows, and its panels."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]


PLOTS = (
    Plot(
        "tv",
        "How much of the computation matters",
        "Total variation between a trace's output and the full model's: 0 is the same distribution, 1 shares nothing. "
        "Line: median over prompts; band: quartiles. Dashed: the best continuous line of three pieces through the "
        "medians from the first size that can hold a path; dotted: its breaks, elsewhere 1. The paper finds two "
        "phases: construction (1e-4 to 1e-2), then refinement. Sizes do not compare between prompt lengths; the other "
        "axes do better.",
        (
            Panel("by size", draw_tv),
            Panel("by edges of one path", draw_tv_by_paths),
            Panel("by MLP and residual edges", draw_tv_by_singles),
            Panel("by multiplications", draw_tv_by_macs),
        ),
    ),
    Plot(
        "nucleus",
        "What is recovered first",
        "First: prompts whose likeliest tokens, up to that much probability, are the full model's in the same order. "
        "At s = 1 rounding alone may still swap tokens of the tail that are equally likely. Second: prompts whose "
        "likeliest token is the full model's.",
        (Panel("ordered nucleus recovered", draw_nucleus), Panel("likeliest token recovered", draw_top1)),
    ),
    Plot(
        "controls",
        "Is it the trace, or any set of edges",
        "Inverse: every edge that the trace leaves out. Random: grown from the output over random weights, as many "
        "edges as the trace. Dashed: with every residual edge added, as in the paper; such sets are larger than the "
        "trace, as the second panel shows.",
        (
            Panel("median TV, by the trace's size", draw_controls),
            Panel("median TV, by the edges held", draw_controls_by_edges),
        ),
    ),
    Plot(
        "composition",
        "What traces are made of",
        "Mean shares of a trace's edges. Nearly all edges are attention edges, and any choice ends at the same shares "
        "at s = 1: what a share says lies in how it differs from there. The paper finds small traces early in the "
        "layers, later edges later and more of them attention.",
        (Panel("by kind of edge", draw_kinds), Panel("by quarter of the layers", draw_quarters)),
    ),
    Plot(
        "entropy",
        "Density and uncertainty",
        "One point per prompt; a pointer resting on it shows the text. The paper finds density to rise with the "
        "entropy of the model's output.",
        (Panel("", draw_entropy), Panel("density of prompts", draw_densities)),
    ),
    Plot(
        "presence",
        "Which components occur",
        "First: Lorenz curves; the diagonal is where every head and MLP occurs in as many prompts' traces as any other "
        "(Gini 0). Second: the share of prompts whose trace of s = 0.01, or the size nearest to it, holds a component.",
        (Panel("how unevenly components occur", draw_lorenz), Panel("presence by component", draw_presence)),
    ),
    Plot(
        "states",
        "Hidden states and word frequency",
        "First: the stream at the last position of a trace's run beside the full run's. Second: the mean cosine by "
        "layer. Third: rank correlation of a trace's output with the corpus's token counts, median and quartiles; at "
        "s = 1 it is the full model's own. The paper finds the sparsest traces to encode unigram frequency.",
        (
            Panel("the last state beside the full run's", draw_states),
            Panel("mean cosine to the full run", draw_cosines),
            Panel("output against unigram frequency", draw_unigram),
        ),
    ),
)


def _tiles(study: Study) -> list[tuple[str, str, str]]:
    """The figures to read first: a number, what it is, and what belongs to it."""
    at = study.nearest(CORE)
    tv, top1 = np.median(study.read("tv", "trace"), 0), study.read("top1", "trace").mean(0)
    size = f"{study.sizes[at]:g}"
    low, middle, high = _quartiles(study.density)
    found = study.against_entropy
    tiles = [
        (f"{tv[at]:.2f}", f"median TV at s = {size}", f"{np.median(study.counts[:, at]):,.0f} edges"),
        (f"{top1[at]:.0%}", f"likeliest token right at s = {size}", "of all prompts"),
        *((first_below(study, tv, bar), f"smallest size of median TV under {bar:g}", "") for bar in (0.5, 0.1)),
        (middle, "median density", f"quartiles {low} to {high}"),
    ]
    if not math.isnan(found.rho):
        tiles.append((f"{found.rho:.2f}", "density against entropy", f"95 % {found.low:.2f} to {found.high:.2f}"))
    if study.phases is not None:
        one, two, three = study.phases.slopes
        breaks = f"{study.phases.first:g}, {study.phases.second:g}"
        tiles.append((breaks, "breaks of the fit", f"TV per decade {one:+.2f}, {two:+.2f}, {three:+.2f}"))
    return tiles


def first_below(study: Study, tv: Doubles, bar: float) -> str:
    """The first size from which on the median TV stays under `bar`."""
    above = np.flatnonzero(tv >= bar)
    first = int(above[-1]) + 1 if len(above) else 0
    return f"{study.sizes[first]:g}" if first < len(study.sizes) else "none"


def _facts(study: Study) -> list[tuple[str, str]]:
    tokens = [part.tokens for part in study.parts]
    total = [part.edges for part in study.parts]
    return [
        ("prompts", f"{len(study.parts)} of {study.manifest.prompts}"),
        ("tokens of a prompt", f"{np.median(tokens):g} ({min(tokens)} to {max(tokens)})"),
        ("edges of a prompt", f"{np.median(total):,.0f} ({min(total):,} to {max(total):,})"),
        ("density against entropy, Spearman", say_correlation(study.against_entropy)),
    ]


def _quartiles(values: Doubles) -> tuple[str, str, str]:
    if not np.isfinite(values).any():
        return "", "not known", ""
    low, middle, high = np.nanpercentile(values, [25, 50, 75])
    return f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}"


_HEAD = ("size", "edges", "edges / path", "M MACs", "MB touched", "TV", "top-1", "nucleus %")


def _tabulate(study: Study) -> list[list[str]]:
    """Medians by size: edges, MACs, bytes, paths, TV and the rest."""
    tv, nucleus = study.read("tv", "trace"), study.read("nucleus", "trace")
    top1, macs, size = study.read("top1", "trace"), study.measured("macs"), study.measured("bytes")
    rows = []
    for i, share in enumerate(study.sizes):
        edges = np.median(study.counts[:, i])
        rows.append(
            [
                f"{share:g}",
                f"{edges:,.0f}",
                f"{edges / study.manifest.shape.steps:,.1f}",
                f"{np.median(macs[:, i]) / 1e6:,.1f}",
                f"{np.median(size[:, i]) / 1e6:,.2f}",
                f"{np.median(tv[:, i]):.3f}",
                f"{top1[:, i].mean():.2f}",
                f"{np.median(nucleus[:, i]):.0f}",
            ]
        )
    return rows


def _list_extremes(study: Study) -> list[tuple[str, str, int, str]]:
    """Density, entropy, tokens and text of the sparsest prompts and the densest."""
    known = sorted((p for p in study.parts if p.density is not None), key=lambda p: p.density or 0.0)
    chosen = known if len(known) <= 2 * _EXTREMES else [*known[:_EXTREMES], *known[-_EXTREMES:]]
    return [(f"{p.density:.3f}", f"{p.entropy:.2f}", p.tokens, _quote(p)) for p in chosen]


def _quote(part: Part) -> str:
    text = " ".join(part.text.split())
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 1]}…"


def _about(manifest: Manifest) -> str:
    s, shape = manifest.settings, manifest.shape
    return (
        f"{s.model} ({manifest.family}, revision {manifest.revision}, weights {s.weight_hash[:12]}): {shape.layers} "
        f"layers of {shape.heads} heads. Prompts of {s.words} words from {manifest.prompts_file}; importance "
        f"{s.importance}, {s.ablation} ablation, {s.format}, seed {s.seed}. Begun {manifest.created} on "
        f"{manifest.device}, torch {manifest.torch}, transformers {manifest.transformers}."
    )


def _empty_sizes(study: Study) -> str:
    """The sizes at which a prompt's trace has no edge."""
    return ", ".join(f"{size:g}" for size in study.sizes[(study.counts == 0).any(0)])


def _render(study: Study, figures: Path) -> dict[str, Any]:
    return {
        "name": study.name,
        "about": _about(study.manifest),
        "tiles": _tiles(study),
        "facts": _facts(study),
        "empty": _empty_sizes(study),
        "head": _HEAD,
        "rows": _tabulate(study),
        "extremes": _list_extremes(study),
        "figures": [_draw(study, plot, figures) for plot in PLOTS],
    }


def _draw(study: Study, plot: Plot, figures: Path) -> dict[str, Any]:
    drawn = save_panels(
        [partial(_draw_panel, p, study) for p in plot.panels], figures / f"{study.name}-{plot.name}.png"
    )
    texts = [f"{p.density:.3f}: {_quote(p)}" for p in study.parts if p.density is not None]
    panels = [name_marks(svg, POINTS, texts) if f'id="{POINTS}"' in svg else svg for svg in drawn]
    return {"name": plot.name, "title": plot.title, "caption": plot.caption, "panels": panels}


def _draw_panel(panel: Panel, study: Study, axes: Axes) -> None:
    if panel.title:
        axes.set_title(panel.title)
    panel.draw(axes, study)


def compare(studies: Sequence[Study], figures: Path) -> dict[str, Any] | None:
    """The models side by side, and for every pair the densities of the prompts that both have; None for one model."""
    pairs = list(combinations(studies, 2))
    if not pairs:
        return None
    panels: list[Draw] = [partial(draw_models, studies=studies), partial(draw_spreads, studies=studies)]
    panels += [partial(draw_pair, one=one, other=other) for one, other in pairs[:_PAIRS]]
    rows = []
    for one, other in pairs:
        found = spearman(*shared_densities(one, other))
        known = not math.isnan(found.rho)
        rho, interval = (f"{found.rho:.3f}", f"{found.low:.3f} to {found.high:.3f}") if known else ("not known", "")
        rows.append([f"{one.name}, {other.name}", rho, interval, str(found.n)])
    models = [[study.name, *(value for value, _, _ in _tiles(study)[:5])] for study in studies]
    return {
        "models": models,
        "labels": [label for _, label, _ in _tiles(studies[0])[:5]],
        "rows": rows,
        "panels": save_panels(panels, figures / "comparison.png"),
    }


def write_report(folder: Path) -> Path:
    """`report.html` and `figures/*.png` from every analysis inside `folder`.

    Raises:
        BadAnalysis: where there is none, or one cannot be read.
    """
    studies = find_studies(folder)
    if not studies:
        raise BadAnalysis(f"{folder} holds no analysis")
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        rendered = [_render(study, figures) for study in studies]
        comparison = compare(studies, figures)
    write_beside(folder / REPORT, render(REPORT, studies=rendered, comparison=comparison))
    return folder / REPORT
