"""One trace as a picture: tokens across, levels of the residual stream up, edges as strong as their weight.

A long prompt's trace touches few of its tokens: columns of which it touches none are drawn as one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from strace.ablate import Selection, Selections, run_masked
from strace.analyze import FORMATS, BadAnalysis, BadOption, check_choice, check_size
from strace.checkpoint import load_decoder, open_checkpoint
from strace.extract import Edge, Traces
from strace.figures import KIND_COLOURS, STYLE, as_element, name_marks
from strace.files import file_beside, write_beside
from strace.importance import MEASURES, weigh_edges
from strace.page import INK, render
from strace.sampling import total_variation

PICTURES = (".png", ".svg", ".html")
PAGE = "show.html"
_MOST_DRAWN = 20_000  # edges of a picture, the heaviest
_MOST_POINTED = 5_000  # edges of a page that say what they are
_LIKELIEST = 5
_HEAVIEST = 12  # attention edges that a page lists


@dataclass(frozen=True)
class Likely:
    """A token that may come next, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class Shown:
    """One trace: edges lead from level `step` to level `step + 1` of `levels`; `layers` holds each step's layer; `tv`
    is that of the trace's masked run."""

    model: str
    prompt: str
    tokens: list[str]
    levels: int
    layers: list[int]
    size: float
    all_edges: int
    edges: list[Edge]
    tv: float
    full: list[Likely]
    trace: list[Likely]


def trace_prompt(model: str, prompt: str, size: float, importance: str = "l1", format: str = "fp32") -> Shown:
    """The trace of `size` of a prompt, and what the model says with it and without it.

    Raises:
        BadOption: for a size outside (0, 1], an importance or a format that does not exist.
        BadAnalysis: for an empty or too long prompt, or a size so small that it holds no edge.
        BadCheckpoint, UnsupportedModel: see strace.checkpoint, strace.families.
    """
    check_size(size)
    check_choice("importance", importance, MEASURES)
    check_choice("format", format, FORMATS)
    checkpoint = open_checkpoint(model)
    ids: list[int] = checkpoint.tokenizer(prompt, verbose=False)["input_ids"]
    if not 0 < len(ids) <= checkpoint.spec.context:
        raise BadAnalysis(f"the prompt has {len(ids)} tokens; the model's context is 1 to {checkpoint.spec.context}")
    decoder, tokens = load_decoder(checkpoint, format), torch.tensor(ids)
    traces = Traces(weigh_edges(decoder, tokens, importance))
    count = traces.count_of(size)
    if not count:
        raise BadAnalysis(
            f"size {size:g} of {traces.total:,} edges holds none; ask for at least {1 / traces.total:.2g}"
        )
    sets = Selections(traces, traces, [Selection("trace", count)])
    p = run_masked(decoder, tokens, None).logits[0].softmax(-1)
    q = run_masked(decoder, tokens, sets).logits[0].softmax(-1)

    def likeliest(distribution: torch.Tensor) -> list[Likely]:
        values, places = distribution.topk(min(_LIKELIEST, len(distribution)))
        named = [str(checkpoint.tokenizer.decode([i])) for i in places.tolist()]
        return [Likely(token, value) for token, value in zip(named, values.tolist(), strict=True)]

    return Shown(
        model=model,
        prompt=prompt,
        tokens=[str(checkpoint.tokenizer.decode([i])) for i in ids],
        levels=len(traces.weights.steps) + 1,
        layers=[step.layer for step in traces.weights.steps],
        size=size,
        all_edges=traces.total,
        edges=traces.edges(count),
        tv=float(total_variation(p, q)),
        full=likeliest(p),
        trace=likeliest(q),
    )


def draw_trace(shown: Shown) -> Figure:
    """The picture: one column per token, one row per level, the output at the top right."""
    edges, columns = _heaviest(shown.edges, _MOST_DRAWN), _place_tokens(shown)
    across, up = columns[-1] + 1, shown.levels
    figure = Figure(figsize=(min(40, max(6.5, 1.6 + 0.42 * across)), min(24, 2.4 + 0.17 * up)), layout="constrained")
    axes = figure.subplots()
    strongest = max(edge.weight for edge in edges) or 1.0
    for kind, colour in KIND_COLOURS.items():
        _draw_kind(axes, [edge for edge in edges if edge.kind == kind], columns, strongest, colour)
    nodes = {(columns[e.source], e.step) for e in edges} | {(columns[e.target], e.step + 1) for e in edges}
    places, levels = zip(*nodes, strict=True)
    axes.scatter(places, levels, s=7, color=INK, zorder=3, linewidth=0)
    axes.set_xlim(-0.6, across - 0.4)
    axes.set_ylim(-0.5, up - 0.5)
    ticks = _label_columns(shown, columns)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=55, ha="right", rotation_mode="anchor", fontsize=9)
    starts = [step for step, layer in enumerate(shown.layers) if layer not in shown.layers[:step]]
    axes.set_yticks([*starts, up - 1], [*(str(shown.layers[step]) for step in starts), "out"], fontsize=9)
    axes.set_ylabel("stream before layer")
    axes.grid(False)
    axes.set_title("\n".join(_head(shown, len(edges))), fontsize=9.5, loc="left")
    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in KIND_COLOURS.items()]
    axes.legend(handles=handles, loc="upper left")  # where an empty corner is: what comes late is near the output
    return figure


def _heaviest(edges: Sequence[Edge], most: int) -> Sequence[Edge]:
    """At most so many of the edges, in their order."""
    if len(edges) <= most:
        return edges
    least = sorted((edge.weight for edge in edges), reverse=True)[most - 1]
    return [edge for edge in edges if edge.weight >= least][:most]


def _place_tokens(shown: Shown) -> list[int]:
    """The column of every token: tokens beside each other that the trace does not touch share one."""
    touched = {edge.source for edge in shown.edges} | {edge.target for edge in shown.edges}
    columns = [0]
    for place in range(1, len(shown.tokens)):
        columns.append(columns[-1] + (place in touched or place - 1 in touched))
    return columns


def _label_columns(shown: Shown, columns: Sequence[int]) -> dict[int, str]:
    """What stands under each column: its token, or how many there are."""
    counts = Counter(columns)
    return {
        column: readable(token) if counts[column] == 1 else f"… {counts[column]} tokens"
        for column, token in zip(columns, shown.tokens, strict=True)
    }


def _draw_kind(axes: Axes, edges: Sequence[Edge], columns: Sequence[int], strongest: float, colour: str) -> None:
    """The edges of one kind as one group, whose id is the kind's name."""
    if not edges:
        return
    kind = edges[0].kind
    # An MLP and a residual edge join the same two nodes; a small shift keeps both in sight.
    shift = {"mlp": 0.09, "residual": -0.09}.get(kind, 0.0)
    lines = [[(columns[e.source] + shift, e.step), (columns[e.target] + shift, e.step + 1)] for e in edges]
    strength = np.sqrt([edge.weight / strongest for edge in edges])
    drawn = LineCollection(lines, colors=colour, alpha=0.2 + 0.8 * strength, linewidths=0.6 + 2 * strength)
    drawn.set_gid(kind)
    axes.add_collection(drawn)


def _head(shown: Shown, drawn: int) -> list[str]:
    count = len(shown.edges)
    first = f"s = {shown.size:g}: {count:,} of {shown.all_edges:,} edges, TV {shown.tv:.2f}"
    if drawn < count:
        first += f" (drawn: the {drawn:,} heaviest)"
    said = [
        f"{name}: " + ",  ".join(f"{readable(some.token)} {some.probability:.2f}" for some in likely[:3])
        for name, likely in (("full model", shown.full), ("trace", shown.trace))
    ]
    return [first, *said]


def readable(token: str) -> str:
    """A token as a label: white space made visible, and no $, which would begin a formula."""
    return _visible(token).replace("$", r"\$")


def _visible(token: str) -> str:
    named = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else "�" for c in named) or "∅"


def say_likeliest(shown: Shown) -> list[str]:
    """A line each for the full model and the trace: their likeliest next tokens."""
    return [
        f"{name:10}  " + "  ".join(f"{likely.token!r} {likely.probability:.3f}" for likely in some)
        for name, some in (("full model", shown.full), ("trace", shown.trace))
    ]


def save_trace(shown: Shown, picture: Path) -> Path:
    """Write the picture (PNG, SVG or a page, by its name) and beside it the same as JSON; gives the JSON's path.

    Raises:
        BadOption: for another kind of picture.
    """
    if picture.suffix not in PICTURES:
        raise BadOption(f"{picture}: a picture ends in {', '.join(PICTURES)}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        if picture.suffix == ".html":
            write_beside(picture, make_page(shown))
        else:
            with file_beside(picture) as beside:
                draw_trace(shown).savefig(beside, format=picture.suffix[1:], dpi=150, bbox_inches="tight")
    beside = picture.with_suffix(".json")
    write_beside(beside, json.dumps(as_record(shown), indent=1))
    return beside


def make_page(shown: Shown) -> str:
    """One HTML page that needs nothing else: the picture, its edges named under a pointer, and what it says."""
    figure = draw_trace(shown)
    figure.axes[0].set_title("", loc="left")
    svg, drawn = as_element(figure, "trace"), _heaviest(shown.edges, _MOST_DRAWN)
    if len(drawn) <= _MOST_POINTED:
        for kind in KIND_COLOURS:
            titles = [_name_edge(shown, edge) for edge in drawn if edge.kind == kind]
            svg = name_marks(svg, kind, titles) if titles else svg
    attention = sorted((e for e in shown.edges if e.kind == "attention"), key=lambda e: -e.weight)[:_HEAVIEST]
    return render(
        PAGE,
        shown=shown,
        svg=svg,
        drawn=len(drawn),
        likely=[
            (_visible(a.token), f"{a.probability:.3f}", _visible(b.token), f"{b.probability:.3f}")
            for a, b in zip(shown.full, shown.trace, strict=True)
        ],
        layers=_count_by_layer(shown),
        kinds=list(KIND_COLOURS),
        attention=[(*_ends(shown, e), e.layer, e.head, f"{e.weight:.3f}") for e in attention],
    )


def _count_by_layer(shown: Shown) -> list[tuple[int, list[int]]]:
    """Every layer with its edges of each kind, the last layer first."""
    counts = Counter((edge.layer, edge.kind) for edge in shown.edges)
    return [
        (layer, [counts[layer, kind] for kind in KIND_COLOURS]) for layer in sorted(set(shown.layers), reverse=True)
    ]


def _ends(shown: Shown, edge: Edge) -> tuple[str, str]:
    """The tokens that an edge leads from and to, with their places."""
    source, target = (f"{_visible(shown.tokens[place])} ({place})" for place in (edge.source, edge.target))
    return source, target


def _name_edge(shown: Shown, edge: Edge) -> str:
    source, target = _ends(shown, edge)
    where = f"layer {edge.layer}" if edge.head is None else f"layer {edge.layer}, head {edge.head}"
    ends = source if edge.source == edge.target else f"{source} to {target}"
    return f"{edge.kind}, {where}: {ends}, weight {edge.weight:.3g}"


def as_record(shown: Shown) -> dict[str, Any]:
    """JSON of a trace, its edges as rows of the named columns."""
    columns: Sequence[str] = tuple(Edge.__dataclass_fields__)
    record = asdict(shown)
    record["columns"], record["edges"] = list(columns), [[getattr(e, c) for c in columns] for e in shown.edges]
    return record
