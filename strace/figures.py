"""What finished analyses show, as matplotlib figures: the paper's, and those that check them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from strace.ablate import CONTROLS
from strace.analyze import MANIFEST, BadAnalysis, Manifest, Part, read_manifest, read_parts, read_states
from strace.files import file_beside
from strace.metrics import NUCLEI, Correlation, Doubles, Phases, cka, fit_phases, gini, lorenz, spearman, split_quarters
from strace.page import GRID, INK, MUTED, follow_page

STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
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
MODEL_COLOURS = ("#1f5fa8", "#d9822b", "#4f7d3a", "#b5402c", "#7a4fa3", "#2a8c8c")
_QUARTERS = ("#c6dbef", "#85b4dc", "#3f86c2", "#0b4a8a")
_WIDTH, _HEIGHT = 4.8, 3.5  # inches of a panel: two beside each other on a page, one across a telephone
Draw = Callable[[Axes], None]
POINTS = "prompts"  # id of the points of `draw_entropy`
PRESENT = 1e-2  # the size near which `draw_presence` looks


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


def _against_size(axes: Axes, study: Study, label: str = "size (share of edges)") -> None:
    """Size along x, grey where the median prompt's trace is too short to reach the embeddings."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    first, reach = study.sizes[0], study.sizes[study.reach]
    if reach > first:
        axes.axvspan(first, reach, color=GRID, alpha=0.6, linewidth=0, zorder=0)


def _band(axes: Axes, x: Doubles, values: Doubles, colour: str, label: str | None = None) -> None:
    """The median over prompts with its quartiles."""
    low, middle, high = np.nanpercentile(values, [25, 50, 75], axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, middle, color=colour, label=label)


def _tv_along(axes: Axes, study: Study) -> None:
    axes.set_ylabel("TV to the full model")
    axes.set_ylim(-0.02, 1.02)


def draw_tv(axes: Axes, study: Study) -> None:
    """TV against size with quartiles, and the fitted phases."""
    tv = study.read("tv", "trace")
    _band(axes, study.sizes, tv, COLOURS["trace"], "median")
    if study.phases is not None:
        _draw_phases(axes, study, study.phases, np.median(tv, 0))
    axes.legend()
    _against_size(axes, study)
    _tv_along(axes, study)


def _draw_phases(axes: Axes, study: Study, phases: Phases, median: Doubles) -> None:
    """The fitted line, from its breaks and slopes, through the mean of the medians."""
    x = np.log10(study.sizes[study.reach :])
    a, b = math.log10(phases.first), math.log10(phases.second)
    one, two, three = phases.slopes
    shape = one * x + (two - one) * np.maximum(x - a, 0) + (three - two) * np.maximum(x - b, 0)
    line = shape + (median[study.reach :] - shape).mean()
    axes.plot(10**x, line, "--", color=INK, linewidth=1, label="three lines, fitted")
    for at in (phases.first, phases.second):
        axes.axvline(at, color=MUTED, linewidth=0.8, linestyle=":")


def draw_tv_by_paths(axes: Axes, study: Study) -> None:
    """TV against edges over the length of a path."""
    steps = study.manifest.shape.steps
    _draw_tv_by_unit(axes, study, steps, f"edges / edges of one path ({steps})")


def draw_tv_by_singles(axes: Axes, study: Study) -> None:
    """TV against edges over the number of MLP and residual edges, which grow with T, attention edges with its square:
    this axis compares across lengths."""
    tokens = np.median([part.tokens for part in study.parts])
    residuals = float(np.median([part.residuals for part in study.parts]))
    single = max(1.0, residuals + tokens * study.manifest.shape.layers)
    _draw_tv_by_unit(axes, study, single, "edges / (MLP + residual edges)")


def _draw_tv_by_unit(axes: Axes, study: Study, unit: float, label: str) -> None:
    edges = np.maximum(np.median(study.counts, 0), 0.5)
    _band(axes, edges / unit, study.read("tv", "trace"), COLOURS["trace"])
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
    _tv_along(axes, study)


def draw_tv_by_macs(axes: Axes, study: Study) -> None:
    """TV against the share of the multiplications that the trace's edges need."""
    macs = study.measured("macs")
    share = np.median(macs / np.maximum(macs.max(1, keepdims=True), 1), 0)
    some = share > 0
    _band(axes, share[some], study.read("tv", "trace")[:, some], COLOURS["trace"])
    axes.set_xscale("log")
    axes.set_xlabel("share of the MACs of all its edges")
    _tv_along(axes, study)


def draw_nucleus(axes: Axes, study: Study) -> None:
    """Shares of prompts whose nuclei are recovered."""
    nucleus = study.read("nucleus", "trace")
    # From the map's middle: its ends vanish on a white or on a black page.
    shades = matplotlib.colormaps["viridis"](np.linspace(0.88, 0.25, len(NUCLEI)))
    for shade, k in zip(shades, NUCLEI, strict=True):
        axes.plot(study.sizes, (nucleus >= k).mean(0), color=shade, label=f"{k} %")
    axes.legend(title="probability mass", ncols=2)
    axes.set_ylabel("share of prompts")
    _against_size(axes, study)
    axes.set_ylim(-0.02, 1.02)


def draw_top1(axes: Axes, study: Study) -> None:
    """How often the likeliest token is the full model's, of traces and controls."""
    for control in ("trace", "inverse", "random"):
        axes.plot(study.sizes, study.read("top1", control).mean(0), color=COLOURS[control], label=control)
    axes.legend()
    axes.set_ylabel("share of prompts")
    _against_size(axes, study)
    axes.set_ylim(-0.02, 1.02)


def draw_kinds(axes: Axes, study: Study) -> None:
    """Shares of the edges by kind."""
    held = study.counts > 0
    amounts = [study.measured(name).reshape(*held.shape, -1).sum(2) for name in KIND_COLOURS]
    shares = [_mean_where(amount / np.maximum(study.counts, 1), held) for amount in amounts]
    _stack(axes, study, shares, list(KIND_COLOURS), list(KIND_COLOURS.values()))


def draw_quarters(axes: Axes, study: Study) -> None:
    """Shares of the edges by quarter of the layers."""
    shares = _mean_where(split_quarters(_per_layer(study)), study.counts > 0).T
    _stack(axes, study, list(shares), ["first", "second", "third", "last quarter"], list(_QUARTERS))


def _stack(axes: Axes, study: Study, shares: list[Doubles], labels: list[str], colours: list[str]) -> None:
    axes.stackplot(study.sizes, shares, labels=labels, colors=colours)
    axes.set_xscale("log")
    axes.set_xlabel("size (share of edges)")
    axes.set_ylabel("share of the trace's edges")
    axes.set_ylim(0, 1)
    axes.set_xlim(study.sizes[0], study.sizes[-1])
    axes.grid(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, columnspacing=1, handlelength=1.2)


def _per_layer(study: Study) -> Doubles:
    """Edges [n, S, L], those of a layer's steps together."""
    layers = study.manifest.shape.layers
    residual = study.measured("residual")
    by_layer = residual.reshape(*residual.shape[:2], layers, -1).sum(3)
    total: Doubles = study.measured("attention").sum(3) + study.measured("mlp") + by_layer
    return total


def _mean_where(values: Doubles, held: np.ndarray[Any, Any]) -> Doubles:
    """Means over the prompts whose trace is not empty; 0 where all are."""
    weight = held.reshape(*held.shape, *(1,) * (values.ndim - 2)).astype(np.float64)
    means: Doubles = (values * weight).sum(0) / np.maximum(weight.sum(0), 1)
    return means


def draw_entropy(axes: Axes, study: Study) -> None:
    """Density against the full model's entropy; `name_points` names the points."""
    known = np.isfinite(study.density)
    points = axes.scatter(study.entropy[known], study.density[known], s=26, color=COLOURS["trace"], alpha=0.65)
    points.set_linewidth(0)
    points.set_gid(POINTS)
    axes.set_xlabel("entropy of the full model (nats)")
    axes.set_ylabel("density (mean TV over log size)")
    axes.set_title(f"Spearman {say_correlation(study.against_entropy)}")


def draw_densities(axes: Axes, study: Study) -> None:
    """How densities are spread over prompts."""
    known = study.density[np.isfinite(study.density)]
    axes.hist(known, bins=np.linspace(0, 1, 21).tolist(), color=COLOURS["trace"], alpha=0.8)
    axes.set_xlabel("density (mean TV over log size)")
    axes.set_ylabel("prompts")


def draw_controls(axes: Axes, study: Study) -> None:
    """TV of all controls against the size that they were made for."""
    for control in CONTROLS:
        tv = np.median(study.read("tv", control), 0)
        axes.plot(study.sizes, tv, _dash(control), color=COLOURS[control], label=control)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1)
    _against_size(axes, study, "size of the trace that it was made for")
    _tv_along(axes, study)


def draw_controls_by_edges(axes: Axes, study: Study) -> None:
    """TV of all controls against the edges that they really hold."""
    for control in CONTROLS:
        tv, edges = study.read("tv", control), study.read("edges", control)
        share = np.median(edges / np.array([part.edges for part in study.parts])[:, None], 0)
        order = np.argsort(share)
        axes.plot(share[order], np.median(tv, 0)[order], _dash(control), color=COLOURS[control])
    _against_size(axes, study, "share of edges that it holds")
    axes.set_xlim(study.sizes[0] * 0.7, 1.4)
    _tv_along(axes, study)


def _dash(control: str) -> str:
    return "--" if "+" in control else "-"


def draw_lorenz(axes: Axes, study: Study) -> None:
    """Lorenz curves of component presence."""
    for colour, size in zip(("#9aa5b1", "#7fb0e0", "#1f5fa8"), (1e-3, 1e-2, 1e-1), strict=True):
        amounts = presence(study, study.nearest(size))
        shares, held = lorenz(amounts)
        axes.plot(
            shares, held, color=colour, label=f"s = {study.sizes[study.nearest(size)]:g}, Gini {gini(amounts):.2f}"
        )
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
    axes.set_xlabel("share of heads and MLPs, rarest first")
    axes.set_ylabel("share of presence")
    axes.legend()


def draw_presence(axes: Axes, study: Study) -> None:
    """Presence by component."""
    at = study.nearest(PRESENT)
    shown = axes.imshow(presence_grid(study, at), aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    heads = study.manifest.shape.heads
    axes.set_xticks([*range(0, heads, -(-heads // 8)), heads], [*range(0, heads, -(-heads // 8)), "MLP"])
    axes.axvline(heads - 0.5, color="#ffffff", linewidth=2)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)
    _add_scale(axes, shown)


def _add_scale(axes: Axes, shown: Any) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(shown, ax=axes).outline.set_visible(False)


def presence_grid(study: Study, at: int) -> Doubles:
    """[L, H + 1]: the share of prompts in whose trace a head, or last the MLP, has at least one edge."""
    attention, mlp = study.measured("attention")[:, at] > 0, study.measured("mlp")[:, at] > 0
    return np.concatenate([attention.mean(0), mlp.mean(0)[:, None]], 1)


def presence(study: Study, at: int) -> Doubles:
    """`presence_grid` as one list."""
    return presence_grid(study, at).ravel()


def draw_unigram(axes: Axes, study: Study) -> None:
    """Rank correlation of the traces' outputs with the corpus's token counts."""
    rho = study.measured("unigram")
    known = np.isfinite(rho).any(0)
    _band(axes, study.sizes[known], rho[:, known], COLOURS["trace"])
    _against_size(axes, study)
    axes.set_ylabel("Spearman with unigram counts")


def draw_states(axes: Axes, study: Study) -> None:
    """The last position's last state beside the full run's."""
    cosine, distance = study.measured("cosine"), study.measured("distance")
    _band(axes, study.sizes, cosine[:, :, -1], COLOURS["trace"], "cosine")
    axes.plot(study.sizes, state_alignment(study), color=KIND_COLOURS["mlp"], label="CKA over prompts")
    _band(axes, study.sizes, np.minimum(distance[:, :, -1], 2), COLOURS["inverse"], "L2 distance / norm")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)
    axes.set_ylabel("after the last layer")
    _against_size(axes, study)


def draw_cosines(axes: Axes, study: Study) -> None:
    """The mean cosine of every layer's state to the full run's."""
    mean = study.measured("cosine").mean(0).T
    # As an image: between the rectangles of an SVG browsers leave white seams.
    shown = axes.pcolormesh(
        study.sizes, np.arange(len(mean)), mean, cmap="RdBu", vmin=-1, vmax=1, shading="nearest", rasterized=True
    )
    axes.set_xscale("log")
    axes.set_xlabel("size (share of edges)")
    axes.set_ylabel("layer")
    axes.grid(False)
    _add_scale(axes, shown)


def state_alignment(study: Study) -> Doubles:
    """Linear CKA [S] over prompts between the last states of the traces' runs and the full runs'."""
    states = torch.stack([read_states(study.folder, part.index) for part in study.parts], 1)
    return np.array([cka(some, states[-1]) for some in states[:-1]])


def draw_models(axes: Axes, studies: Sequence[Study]) -> None:
    """The median TV of every model against size."""
    for colour, study in zip(cycle(MODEL_COLOURS), studies, strict=False):
        axes.plot(study.sizes, np.median(study.read("tv", "trace"), 0), color=colour, label=study.name)
    axes.set_xscale("log")
    axes.set_xlabel("size (share of edges)")
    axes.set_ylabel("median TV to the full model")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()


def draw_spreads(axes: Axes, studies: Sequence[Study]) -> None:
    """The densities of every model's prompts: each a point, the line their median."""
    generator = np.random.default_rng(0)
    for at, (colour, study) in enumerate(zip(cycle(MODEL_COLOURS), studies, strict=False)):
        known = study.density[np.isfinite(study.density)]
        beside = at + generator.uniform(-0.16, 0.16, len(known))  # else equal points hide each other
        axes.scatter(known, beside, s=16, color=colour, alpha=0.5, linewidth=0)
        if len(known):
            axes.plot([np.median(known)] * 2, [at - 0.3, at + 0.3], color=colour)
    axes.set_yticks(range(len(studies)), [study.name for study in studies])
    axes.set_ylim(len(studies) - 0.5, -0.5)
    axes.set_xlabel("density (mean TV over log size)")


def draw_pair(axes: Axes, one: Study, other: Study) -> None:
    """Density in one model against density in another, of the prompts of both."""
    x, y = shared_densities(one, other)
    axes.scatter(x, y, s=26, color=COLOURS["trace"], alpha=0.65, linewidth=0)
    axes.set_xlabel(f"density in {one.name}")
    axes.set_ylabel(f"density in {other.name}")
    axes.set_title(f"Spearman {say_correlation(spearman(x, y))}")


def shared_densities(one: Study, other: Study) -> Doubles:
    """[2, n]: the densities of the prompts that both have."""
    mine, theirs = ({p.text: p.density for p in s.parts if p.density is not None} for s in (one, other))
    return np.array([[mine[text], theirs[text]] for text in mine if text in theirs], np.float64).reshape(-1, 2).T


def say_correlation(found: Correlation) -> str:
    """rho with its interval, or that it is not known."""
    if math.isnan(found.rho):
        return f"not known (n = {found.n})"
    return f"{found.rho:.2f} [{found.low:.2f}, {found.high:.2f}], n = {found.n}"


def save_panels(panels: Sequence[Draw], path: Path) -> list[str]:
    """Write the panels side by side as one PNG, and give each as an SVG element in the page's colours."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(_WIDTH * across, _HEIGHT * down), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    with file_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
    return [_draw_alone(draw, f"{path.stem}-{number}") for number, draw in enumerate(panels)]


def _draw_alone(draw: Draw, salt: str) -> str:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    draw(figure.subplots())
    return as_element(figure, salt)


def as_element(figure: Figure, salt: str) -> str:
    """The figure as an SVG element whose colours follow the page's."""
    # Ids inside an SVG are hashed with the salt; equal ids of two figures on one page would clash.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return follow_page(text[text.index("<svg") :])


def name_marks(svg: str, group: str, titles: Sequence[str]) -> str:
    """Give the marks of the group of that id, in the order of drawing, a title that shows under a pointer."""
    start = svg.index(f'<g id="{group}">')
    end = svg.find('<g id="', start + 1)
    said = iter(titles)
    named = re.sub(
        r"<(use|path) ([^>]*clip-path[^>]*|[^>]*xlink:href[^>]*)/>",
        lambda found: f"<{found[1]} {found[2]}><title>{escape(next(said))}</title></{found[1]}>",
        svg[start:end],
    )
    return svg[:start] + named + svg[end:]
