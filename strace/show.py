"""One trace as a picture: tokens across, levels of the residual stream up, edges as strong as their weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from strace.ablate import Selection, Selections, run_masked
from strace.analyze import FORMATS, BadAnalysis, BadOption, check_choice, check_size
from strace.checkpoint import load_decoder, open_checkpoint
from strace.extract import Edge, Traces
from strace.figures import KIND_COLOURS, STYLE
from strace.files import write_beside
from strace.importance import MEASURES, weigh_edges
from strace.sampling import total_variation

PICTURES = (".png", ".svg")
_MOST_TOKENS = 400  # across a picture
_LIKELIEST = 5


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
    limit = min(_MOST_TOKENS, checkpoint.spec.context)
    if not 0 < len(ids) <= limit:
        raise BadAnalysis(f"the prompt has {len(ids)} tokens; a picture is drawn of 1 to {limit}")
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
    across, up = len(shown.tokens), shown.levels
    figure = Figure(figsize=(min(40, 2.5 + 0.42 * across), min(24, 2.2 + 0.16 * up)), layout="constrained")
    axes = figure.subplots()
    strongest = max(edge.weight for edge in shown.edges) or 1.0
    for kind, colour in KIND_COLOURS.items():
        edges = [edge for edge in shown.edges if edge.kind == kind]
        # An MLP and a residual edge join the same two nodes; a small shift keeps both in sight.
        shift = {"mlp": 0.09, "residual": -0.09}.get(kind, 0.0)
        lines = [[(e.source + shift, e.step), (e.target + shift, e.step + 1)] for e in edges]
        if lines:
            strength = np.sqrt([edge.weight / strongest for edge in edges])
            axes.add_collection(
                LineCollection(lines, colors=colour, alpha=0.15 + 0.85 * strength, linewidths=0.5 + 2 * strength)
            )
    nodes = {(e.source, e.step) for e in shown.edges} | {(e.target, e.step + 1) for e in shown.edges}
    places, levels = zip(*nodes, strict=True)
    axes.scatter(places, levels, s=5, color="#1c2430", zorder=3, linewidth=0)
    axes.set_xlim(-0.6, across - 0.4)
    axes.set_ylim(-0.5, up - 0.5)
    axes.set_xticks(range(across), [_readable(token) for token in shown.tokens], rotation=60, ha="right", fontsize=7)
    starts = [step for step, layer in enumerate(shown.layers) if layer not in shown.layers[:step]]
    axes.set_yticks([*starts, up - 1], [*(str(shown.layers[step]) for step in starts), "out"], fontsize=7)
    axes.set_ylabel("the stream before layer")
    axes.grid(False)
    count = len(shown.edges)
    said = "; ".join(
        f"{name}: {_readable(some[0].token)} ({some[0].probability:.2f})"
        for name, some in (("full model", shown.full), ("trace", shown.trace))
    )
    axes.set_title(
        f"s = {shown.size:g}: {count:,} of {shown.all_edges:,} edges, TV {shown.tv:.2f}. {said}", fontsize=9, loc="left"
    )
    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in KIND_COLOURS.items()]
    axes.legend(handles=handles, loc="upper left", fontsize=7)
    return figure


def _readable(token: str) -> str:
    """A token as a label: white space made visible, and no $, which would begin a formula."""
    named = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$")
    named = "".join(c if c.isprintable() else "�" for c in named)
    return named or "∅"


def say_likeliest(shown: Shown) -> list[str]:
    """A line each for the full model and the trace: their likeliest next tokens."""
    return [
        f"{name:10}  " + "  ".join(f"{likely.token!r} {likely.probability:.3f}" for likely in some)
        for name, some in (("full model", shown.full), ("trace", shown.trace))
    ]


def save_trace(shown: Shown, picture: Path) -> Path:
    """Write the picture (PNG or SVG, by its name) and beside it the same as JSON; gives the JSON's path.

    Raises:
        BadOption: for another kind of picture.
    """
    if picture.suffix not in PICTURES:
        raise BadOption(f"{picture}: a picture ends in {' or '.join(PICTURES)}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw_trace(shown).savefig(picture, dpi=150)
    beside = picture.with_suffix(".json")
    write_beside(beside, json.dumps(as_record(shown), indent=1))
    return beside


def as_record(shown: Shown) -> dict[str, Any]:
    """JSON of a trace, its edges as rows of the named columns."""
    columns: Sequence[str] = tuple(Edge.__dataclass_fields__)
    record = asdict(shown)
    record["columns"], record["edges"] = list(columns), [[getattr(e, c) for c in columns] for e in shown.edges]
    return record
