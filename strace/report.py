"""A self-contained HTML page of everything that a folder's analyses show, and every figure as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from strace.analyze import BadAnalysis, Manifest
from strace.figures import (
    COLOURS,
    STYLE,
    Study,
    draw_composition,
    draw_controls,
    draw_entropy,
    draw_geometry,
    draw_nucleus,
    draw_presence,
    draw_tv,
    draw_unigram,
    find_studies,
    save_figure,
    say_correlation,
)
from strace.files import write_beside
from strace.metrics import Doubles, spearman

REPORT, FIGURES = "report.html", "figures"
_SHOWN = 1e-3  # the size near which the paper finds a core


@dataclass(frozen=True)
class Plot:
    """A figure of the report: its file name, title, what it shows, and how it is drawn."""

    name: str
    title: str
    caption: str
    draw: Callable[[Study], Figure]


PLOTS = (
    Plot(
        "tv",
        "TV against size",
        "Median and quartiles over prompts. Dashed: the best continuous line of three pieces through the medians, from "
        "the first size that can hold a path; dotted: its breaks, and in the other panels 1.",
        draw_tv,
    ),
    Plot(
        "nucleus",
        "Nucleus recovery",
        "Left: prompts whose tokens up to that mass are the full model's, in order; at s = 1 rounding alone may still "
        "swap tokens of the tail that are equally likely. Right: same likeliest token.",
        draw_nucleus,
    ),
    Plot(
        "composition",
        "Composition",
        "Mean shares of a trace's edges by kind and by quarter of the layers. Nearly all edges are attention edges, so "
        "at s = 1 the share of a kind is its share of the graph.",
        draw_composition,
    ),
    Plot("entropy", "Density against entropy", "One point per prompt.", draw_entropy),
    Plot(
        "controls",
        "Controls",
        "Inverse: every edge that the trace leaves out. Random: grown from the output over random weights, as many "
        "edges as the trace. Dashed: with every residual edge added, as in the paper; such sets are larger than the "
        "trace, as the right panel shows.",
        draw_controls,
    ),
    Plot(
        "presence",
        "Component presence",
        "How unevenly heads and MLPs occur in traces: Lorenz curves over components, and presence by component.",
        draw_presence,
    ),
    Plot(
        "unigram",
        "Unigram frequency",
        "Rank correlation of a trace's output distribution with the corpus's token counts, median and quartiles; at "
        "s = 1 it is the full model's own.",
        draw_unigram,
    ),
    Plot(
        "geometry",
        "Hidden states",
        "The stream at the last position of a trace's run beside the full run's.",
        draw_geometry,
    ),
)


def _facts(study: Study) -> list[tuple[str, str]]:
    tokens = [part.tokens for part in study.parts]
    total = [part.edges for part in study.parts]
    phases, at = study.phases, study.nearest(_SHOWN)
    facts = [
        ("prompts", f"{len(study.parts)} of {study.manifest.prompts}"),
        ("tokens of a prompt", f"{np.median(tokens):g} ({min(tokens)} to {max(tokens)})"),
        ("edges of a prompt", f"{np.median(total):,.0f} ({min(total):,} to {max(total):,})"),
        ("density, median and quartiles", _quartiles(study.density)),
        ("density against entropy, Spearman", say_correlation(study.against_entropy)),
        (f"median TV at s = {study.sizes[at]:g}", f"{np.median(study.read('tv', 'trace')[:, at]):.3f}"),
    ]
    if phases is not None:
        one, two, three = phases.slopes
        facts.append(("fitted breaks", f"{phases.first:g} and {phases.second:g}"))
        facts.append(("TV per decade of size", f"{one:+.3f}, {two:+.3f}, {three:+.3f}"))
    return facts


def _quartiles(values: Doubles) -> str:
    low, middle, high = np.nanpercentile(values, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


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


_HEAD = ("size", "edges", "edges / path", "M MACs", "MB touched", "TV", "top-1", "nucleus %")


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
    drawn = [
        {
            "title": p.title,
            "caption": p.caption,
            "svg": save_figure(p.draw(study), figures / f"{study.name}-{p.name}.png"),
        }
        for p in PLOTS
    ]
    return {
        "name": study.name,
        "about": _about(study.manifest),
        "facts": _facts(study),
        "empty": _empty_sizes(study),
        "head": _HEAD,
        "rows": _tabulate(study),
        "figures": drawn,
    }


def compare(studies: Sequence[Study], figures: Path) -> dict[str, Any] | None:
    """Densities of the prompts that two models share, for every pair of models; None for one model."""
    pairs = list(combinations(studies, 2))
    if not pairs:
        return None
    figure = Figure(figsize=(3.6 * min(3, len(pairs)), 3.4 * -(-len(pairs) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(pairs) // 3), min(3, len(pairs)), squeeze=False)
    rows = []
    for axes, (one, other) in zip(grid.flat, pairs, strict=False):
        mine, theirs = ({p.text: p.density for p in s.parts if p.density is not None} for s in (one, other))
        shared = [text for text in mine if text in theirs]
        x, y = [mine[t] for t in shared], [theirs[t] for t in shared]
        found = spearman(x, y)
        axes.scatter(x, y, s=14, color=COLOURS["trace"], alpha=0.6, linewidth=0)
        axes.set_xlabel(one.name)
        axes.set_ylabel(other.name)
        known = not math.isnan(found.rho)
        rows.append(
            [
                f"{one.name}, {other.name}",
                f"{found.rho:.3f}" if known else "not known",
                f"{found.low:.3f} to {found.high:.3f}" if known else "",
                str(found.n),
            ]
        )
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    return {"rows": rows, "svg": save_figure(figure, figures / "comparison.png")}


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
    template = Environment(autoescape=True).from_string((files("strace") / REPORT).read_text(encoding="utf-8"))
    with matplotlib.rc_context(STYLE):
        rendered = [_render(study, figures) for study in studies]
        comparison = compare(studies, figures)
    write_beside(folder / REPORT, template.render(studies=rendered, comparison=comparison))
    return folder / REPORT
