"""What finished analyses show, as matplotlib figures: the paper's, and those that check them."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from strace.ablate import CONTROLS
from strace.analyze import MANIFEST, BadAnalysis, Manifest, Part, read_manifest, read_parts, read_states
from strace.metrics import NUCLEI, Correlation, Doubles, Phases, cka, fit_phases, gini, lorenz, spearman, split_quarters

STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e8ee",
    "axes.edgecolor": "#7a8595",
    "svg.fonttype": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
COLOURS = {
    "trace": "#1f5fa8",
    "trace+residuals": "#7fb0e0",
    "inverse": "#b5402c",
    "inverse+residuals": "#e39a8b",
    "random": "#4f7d3a",
    "random+residuals": "#a8c995",
}
KIND_COLOURS = {"attention": "#1f5fa8", "mlp": "#d9822b", "residual": "#9aa5b1"}
_QUARTERS = ("#c6dbef", "#85b4dc", "#3f86c2", "#0b4a8a")


@dataclass(frozen=True)
class Study:
    """A model's finished prompts as arrays: n prompts, S sizes, rising."""

    name: str
    folder: Path
    manifest: Manifest
    parts: list[Part]

    @cached_property
    def sizes(self) -> Doubles:
        return np.array(self.manifest.settings.sizes)

    @cached_property
    def counts(self) -> Doubles:
        """Edges [n, S]."""
        return np.array([part.counts for part in self.parts], np.float64)

    @cached_property
    def density(self) -> Doubles:
        return np.array([math.nan if p.density is None else p.density for p in self.parts])

    @cached_property
    def entropy(self) -> Doubles:
        return np.array([part.entropy for part in self.parts])

    def read(self, column: str, control: str) -> Doubles:
        """One column of the rows of a control, [n, S]."""
        return np.array([[getattr(r, column) for r in p.rows if r.control == control] for p in self.parts], np.float64)

    def measured(self, column: str) -> Doubles:
        """One of the lists over sizes of the parts, [n, S, ...], nan where it is not known."""
        return np.array([getattr(part, column) for part in self.parts], np.float64)

    def nearest(self, size: float) -> int:
        return int(np.abs(np.log(self.sizes / size)).argmin())

    @cached_property
    def reach(self) -> int:
        """The first size at which the median prompt's trace can hold a path from the embeddings."""
        long_enough = np.median(self.counts, 0) >= self.manifest.shape.steps
        return int(long_enough.argmax()) if long_enough.any() else len(self.sizes) - 1

    @cached_property
    def phases(self) -> Phases | None:
        """Fitted to the median TV from `reach` on."""
        return fit_phases(
            self.sizes[self.reach :].tolist(), np.median(self.read("tv", "trace"), 0)[self.reach :].tolist()
        )

    @cached_property
    def against_entropy(self) -> Correlation:
        return spearman(self.density, self.entropy)


def load_study(folder: Path) -> Study:
    """A folder that `analyze` filled.

    Raises:
        BadAnalysis: without a readable manifest, or without one finished prompt.
    """
    manifest, parts = read_manifest(folder), read_parts(folder)
    if not parts:
        raise BadAnalysis(f"{folder} holds no finished prompt")
    return Study(folder.name, folder, manifest, parts)


def find_studies(folder: Path) -> list[Study]:
    """Every analysis inside `folder`, by name."""
    return [load_study(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def _logarithmic(axes: Axes, label: str = "size (share of edges)") -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)


def _band(axes: Axes, x: Doubles, values: Doubles, colour: str, label: str | None = None) -> None:
    """The median over prompts with its quartiles."""
    low, middle, high = np.nanpercentile(values, [25, 50, 75], axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, middle, color=colour, label=label)


def draw_tv(study: Study) -> Figure:
    """TV against size, edges / path, and edges / single edges, with quartiles; fitted phases on the first."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    first, second, third = figure.subplots(1, 3, sharey=True)
    tv, shape = study.read("tv", "trace"), study.manifest.shape
    _band(first, study.sizes, tv, COLOURS["trace"])
    if study.phases is not None:
        _draw_phases(first, study, study.phases, np.median(tv, 0))
    _logarithmic(first)
    first.set_ylabel("TV to the full model")
    first.set_ylim(-0.02, 1.02)
    # MLP and residual edges grow with T, attention edges with its square: these two axes compare across lengths.
    tokens = np.median([part.tokens for part in study.parts])
    edges = np.median(study.counts, 0)
    single = max(1.0, float(np.median([part.residuals for part in study.parts])) + tokens * shape.layers)
    for axes, unit, label in (
        (second, shape.steps, f"edges / length of a path ({shape.steps})"),
        (third, single, "edges / (MLP + residual edges)"),
    ):
        _band(axes, np.maximum(edges, 0.5) / unit, tv, COLOURS["trace"])
        _logarithmic(axes, label)
        axes.axvline(1, color="#7a8595", linewidth=0.8, linestyle=":")
    return figure


def _draw_phases(axes: Axes, study: Study, phases: Phases, median: Doubles) -> None:
    """The fitted line, from its breaks and slopes, through the mean of the medians."""
    x = np.log10(study.sizes[study.reach :])
    a, b = math.log10(phases.first), math.log10(phases.second)
    one, two, three = phases.slopes
    shape = one * x + (two - one) * np.maximum(x - a, 0) + (three - two) * np.maximum(x - b, 0)
    axes.plot(10**x, shape + (median[study.reach :] - shape).mean(), "--", color="#1c2430", linewidth=1, label="fit")
    for at in (phases.first, phases.second):
        axes.axvline(at, color="#7a8595", linewidth=0.8, linestyle=":")
    axes.legend()


def draw_nucleus(study: Study) -> Figure:
    """Shares of prompts whose nuclei are recovered, and top-1 agreement beside the controls."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    nucleus = study.read("nucleus", "trace")
    shades = matplotlib.colormaps["viridis"](np.linspace(0.92, 0, len(NUCLEI)))
    for shade, k in zip(shades, NUCLEI, strict=True):
        left.plot(study.sizes, (nucleus >= k).mean(0), color=shade, label=f"{k} %")
    left.legend(title="nucleus", ncols=2)
    left.set_ylabel("share of prompts recovered in order")
    for control in ("trace", "inverse", "random"):
        right.plot(study.sizes, study.read("top1", control).mean(0), color=COLOURS[control], label=control)
    right.legend()
    right.set_ylabel("top-1 agreement")
    for axes in (left, right):
        _logarithmic(axes)
        axes.set_ylim(-0.02, 1.02)
    return figure


def draw_composition(study: Study) -> Figure:
    """Shares of the edges by kind and by quarter of the layers."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    held = study.counts > 0
    amounts = [study.measured(name).reshape(*held.shape, -1).sum(2) for name in KIND_COLOURS]
    shares = [_mean_where(amount / np.maximum(study.counts, 1), held) for amount in amounts]
    left.stackplot(study.sizes, shares, labels=list(KIND_COLOURS), colors=list(KIND_COLOURS.values()))
    left.set_ylabel("share of the trace's edges")
    quarters = _mean_where(_quarters(study), held)
    right.stackplot(study.sizes, quarters.T, labels=[f"layers, quarter {i}" for i in range(1, 5)], colors=_QUARTERS)
    for axes in (left, right):
        _logarithmic(axes)
        axes.set_ylim(0, 1)
        axes.grid(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, columnspacing=1, handlelength=1.2)
    return figure


def _per_layer(study: Study) -> Doubles:
    """Edges [n, S, L], those of a layer's steps together."""
    layers = study.manifest.shape.layers
    residual = study.measured("residual")
    by_layer = residual.reshape(*residual.shape[:2], layers, -1).sum(3)
    total: Doubles = study.measured("attention").sum(3) + study.measured("mlp") + by_layer
    return total


def _quarters(study: Study) -> Doubles:
    return split_quarters(_per_layer(study))


def _mean_where(values: Doubles, held: np.ndarray[Any, Any]) -> Doubles:
    """Means over the prompts whose trace is not empty; 0 where all are."""
    weight = held.reshape(*held.shape, *(1,) * (values.ndim - 2)).astype(np.float64)
    means: Doubles = (values * weight).sum(0) / np.maximum(weight.sum(0), 1)
    return means


def draw_entropy(study: Study) -> Figure:
    """Density against the full model's entropy."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(study.entropy, study.density, s=14, color=COLOURS["trace"], alpha=0.6, linewidth=0)
    axes.set_xlabel("entropy of the full model (nats)")
    axes.set_ylabel("density (mean TV over log size)")
    axes.set_title(f"Spearman {say_correlation(study.against_entropy)}", fontsize=9)
    return figure


def draw_controls(study: Study) -> Figure:
    """TV of all controls, against the size they were made for and the edges they hold."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for control in CONTROLS:
        tv, edges = study.read("tv", control), study.read("edges", control)
        style = "--" if "+" in control else "-"
        left.plot(study.sizes, np.median(tv, 0), style, color=COLOURS[control], label=control)
        share = np.median(edges / np.array([part.edges for part in study.parts])[:, None], 0)
        order = np.argsort(share)
        right.plot(share[order], np.median(tv, 0)[order], style, color=COLOURS[control])
    left.legend(fontsize=8)
    left.set_ylabel("median TV to the full model")
    left.set_ylim(-0.02, 1.02)
    _logarithmic(left, "size of the trace that the control was made for")
    _logarithmic(right, "share of edges that the control really holds")
    right.set_xlim(left.get_xlim())
    return figure


def draw_presence(study: Study) -> Figure:
    """Lorenz curves of component presence, and presence by component."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for shade, size in zip((0.35, 0.65, 1.0), (1e-3, 1e-2, 1e-1), strict=True):
        amounts = presence(study, study.nearest(size))
        shares, held = lorenz(amounts)
        label = f"s = {study.sizes[study.nearest(size)]:g}, Gini {gini(amounts):.2f}"
        left.plot(shares, held, color=COLOURS["trace"], alpha=shade, label=label)
    left.plot([0, 1], [0, 1], color="#7a8595", linewidth=0.8)
    left.set_xlabel("share of components (heads and MLPs), rarest first")
    left.set_ylabel("share of presence")
    left.legend(fontsize=8)
    at = study.nearest(1e-2)
    shown = right.imshow(presence_grid(study, at), aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    heads = study.manifest.shape.heads
    right.set_xticks([*range(0, heads, -(-heads // 8)), heads], [*range(0, heads, -(-heads // 8)), "MLP"])
    right.set_xlabel("head")
    right.set_ylabel("layer")
    right.set_title(f"share of prompts whose trace of s = {study.sizes[at]:g} holds it", fontsize=9)
    right.grid(False)
    figure.colorbar(shown, ax=right)
    return figure


def presence_grid(study: Study, at: int) -> Doubles:
    """[L, H + 1]: the share of prompts in whose trace a head, or last the MLP, has at least one edge."""
    attention, mlp = study.measured("attention")[:, at] > 0, study.measured("mlp")[:, at] > 0
    return np.concatenate([attention.mean(0), mlp.mean(0)[:, None]], 1)


def presence(study: Study, at: int) -> Doubles:
    """`presence_grid` as one list."""
    return presence_grid(study, at).ravel()


def draw_unigram(study: Study) -> Figure:
    """Rank correlation of the traces' outputs with the corpus's token counts."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    rho = study.measured("unigram")
    known = np.isfinite(rho).any(0)
    _band(axes, study.sizes[known], rho[:, known], COLOURS["trace"])
    _logarithmic(axes)
    axes.set_ylabel("Spearman with unigram counts")
    return figure


def draw_geometry(study: Study) -> Figure:
    """The last position's states beside the full run's."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    cosine, distance = study.measured("cosine"), study.measured("distance")
    _band(left, study.sizes, cosine[:, :, -1], COLOURS["trace"], "cosine")
    left.plot(study.sizes, state_alignment(study), color="#d9822b", label="CKA over prompts")
    _band(left, study.sizes, np.minimum(distance[:, :, -1], 2), COLOURS["inverse"], "L2 distance / norm")
    left.legend()
    left.set_ylabel("last layer, last position")
    _logarithmic(left)
    mean = cosine.mean(0).T
    # As an image: between the rectangles of an SVG browsers leave white seams.
    shown = right.pcolormesh(
        study.sizes, np.arange(len(mean)), mean, cmap="RdBu", vmin=-1, vmax=1, shading="nearest", rasterized=True
    )
    _logarithmic(right)
    right.set_ylabel("layer")
    right.set_title("mean cosine to the full run", fontsize=9)
    right.grid(False)
    figure.colorbar(shown, ax=right)
    return figure


def state_alignment(study: Study) -> Doubles:
    """Linear CKA [S] over prompts between the last states of the traces' runs and the full runs'."""
    states = torch.stack([read_states(study.folder, part.index) for part in study.parts], 1)
    return np.array([cka(some, states[-1]) for some in states[:-1]])


def say_correlation(found: Correlation) -> str:
    """rho with its interval, or that it is not known."""
    if math.isnan(found.rho):
        return f"not known (n = {found.n})"
    return f"{found.rho:.2f} [{found.low:.2f}, {found.high:.2f}], n = {found.n}"


def save_figure(figure: Figure, path: Path) -> str:
    """Write the figure as PNG, and give it as an SVG element."""
    # Ids inside an SVG are hashed with this salt; equal ids of two figures on one page would clash.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=150)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
