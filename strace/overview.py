"""What a folder of subgraphs holds and what was measured of it: for a terminal, as a JSON object, as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from strace import classifier
from strace.checkpoint import open_checkpoint
from strace.classes import POOLED
from strace.classifier import ClassifierManifest, read_classifier
from strace.graphs import choose_folder
from strace.page import render
from strace.subgraph import BadSubgraph, Candidate, Manifest, check_base, find_subgraphs, read_manifest

PAGE = "overview.html"
POSITIONS = 8
COLUMNS = ("class", "format", "MB", "share", "head", "accept", "agree", "S", "greedy", "pays")
_SHADES = " ▁▂▃▄▅▆▇█"
_BAR = 20  # characters of a layer's neurons
_COLUMN, _CELL, _HEIGHT = 26, 9, 110  # of the page's picture, in pixels: a layer, a group, the neurons
_PLOT = (460, 210, 44)  # width, height and margin of the page's plot


@dataclass(frozen=True)
class Overview:
    """The manifests of a folder by class, and that of its classifier, which a folder may lack."""

    folder: Path
    manifests: dict[str, Manifest]
    classifier: ClassifierManifest | None


def open_overview(model: str, subgraphs: Path | None = None, only: str | None = None) -> Overview:
    """The subgraphs of a model: those in `subgraphs`, which must be of this model, those that the embedded model has,
    or those in the folder that `model` itself is. only: one class of them.

    Raises:
        BadSubgraph, BadClassifier, BadCheckpoint: naming what cannot be read or does not fit.
    """
    folder = choose_folder(model, subgraphs) or Path(model)
    found = find_subgraphs(folder)
    if only is not None and only not in found:
        raise BadSubgraph(f"{folder} has no class {only!r}; it has {', '.join(found)}")
    manifests = {name: read_manifest(path) for name, path in found.items() if only in (None, name)}
    if subgraphs is not None:
        checkpoint = open_checkpoint(model)
        for name, manifest in manifests.items():
            check_base(found[name], manifest, checkpoint)
    told = read_classifier(folder) if (folder / classifier.MANIFEST).exists() else None
    return Overview(folder, manifests, told)


def as_record(overview: Overview) -> dict[str, Any]:
    """JSON: the manifests as they are stored."""
    told = overview.classifier
    return {
        "folder": str(overview.folder),
        "classifier": None if told is None else told.model_dump(mode="json"),
        "subgraphs": {name: m.model_dump(mode="json", by_alias=True) for name, m in overview.manifests.items()},
    }


def chosen(manifest: Manifest) -> Candidate:
    """The candidate that became the subgraph."""
    return next(c for c in manifest.candidates if c.plan == manifest.plan)


def describe_training(manifest: Manifest) -> str:
    """Whether the subgraph was distilled."""
    return f"distilled for {manifest.distilled:g} minutes" if manifest.distilled else "not distilled"


def describe_place(manifest: Manifest) -> str:
    """Where and when it was measured."""
    m = manifest.machine
    about = ", ".join(part for part in (m.isa, m.dtype) if part)
    return (
        f"measured {manifest.created[:10]} on {m.processor or m.device} ({m.device}), {m.threads} threads, "
        f"{m.runner} runner{f' ({about})' if about else ''}, torch {m.torch}"
    )


def draw_layers(manifest: Manifest) -> list[str]:
    """Two lines, attention and MLP, with one bar per layer: the share of its units that is kept, blank where it
    vanished."""
    groups = [len(layer.groups) / manifest.base.kv_heads for layer in manifest.kept]
    neurons = [layer.neurons / manifest.base.neurons for layer in manifest.kept]
    bars = ("".join(_SHADES[min(8, int(share * 8 + 0.999))] for share in shares) for shares in (groups, neurons))
    return [
        f"  {kind:9} layer 0 |{bar}| {len(manifest.kept) - 1}"
        for kind, bar in zip(("attention", "MLP"), bars, strict=True)
    ]


def draw_units(manifest: Manifest) -> list[str]:
    """A line per layer: each key/value group, kept or not, and how many neurons."""
    lines = []
    for number, layer in enumerate(manifest.kept):
        groups = "".join("█" if g in layer.groups else "·" for g in range(manifest.base.kv_heads))
        filled = -(-layer.neurons * _BAR // manifest.base.neurons)
        neurons = "█" * filled + "·" * (_BAR - filled)
        lines.append(f"  layer {number:2}  groups {groups}  neurons {neurons} {layer.neurons}/{manifest.base.neurons}")
    return [*lines, f"  head {manifest.head_rows} rows; every matrix in {manifest.plan.format}"]


def show(overview: Overview, whole: bool) -> RenderableType:
    """The folder as a table, and each class's picture and acceptance; whole: layer by layer, with the search."""
    parts: list[RenderableType] = [_tabulate(overview)]
    for name, manifest in overview.manifests.items():
        accepted = " ".join(f"{a:.3f}" for a in manifest.measured.accepted)
        parts.append(Text.assemble("\n", (name, "bold"), f": {manifest.why}"))
        parts += [Text(line) for line in (draw_units if whole else draw_layers)(manifest)]
        parts.append(Text(f"  accepted at draft positions 1..{POSITIONS}: {accepted}"))
        parts.append(Text(f"  {describe_training(manifest)}; {describe_place(manifest)}"))
        parts += [_tabulate_search(manifest)] if whole else []
    if not whole:
        parts += map(Text, ("", *describe_classifier(overview.classifier)))
    return Group(*parts)


def describe_classifier(told: ClassifierManifest | None) -> list[str]:
    """How well prompts are told apart, on texts apart."""
    if told is None:
        return ["no classifier: the folder was made by an earlier version; trace again to have one"]
    measured = "; ".join(
        f"{t.read}: {t.precision:.1%} right of the {t.answered:.1%} given a class" for t in told.confusion
    )
    strangers = ", ".join(f"{name} {share:.0%}" for name, share in told.strangers.items())
    lines = [f"classifier of {', '.join(told.names)}, all else to {POOLED}; {measured or 'one class cannot be told'}"]
    return [*lines, *([f"texts of a class that it did not know, sent to {POOLED}: {strangers}"] if strangers else [])]


def _tabulate(overview: Overview) -> Table:
    base = next(iter(overview.manifests.values())).base
    table = Table(title=f"Subgraphs of {base.model} (weights {base.weight_hash[:12]})", box=SIMPLE, pad_edge=False)
    for column in COLUMNS:
        justify: Any = "left" if column in ("class", "format", "pays") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in list_rows(overview):
        table.add_row(*row)
    return table


def list_rows(overview: Overview) -> list[list[str]]:
    """A row per class: format, bytes, head, acceptance on texts apart, predicted speedups, whether it pays."""
    return [
        [
            name,
            m.plan.format,
            f"{m.measured.bytes_per_step / 1e6:.2f}",
            f"{m.measured.bytes_share:.3f}",
            str(m.head_rows),
            f"{fmean(m.measured.accepted):.3f}",
            f"{fmean(m.measured.agreement):.3f}",
            f"{chosen(m).speedup:.2f}",
            f"{chosen(m).greedy:.2f}" if chosen(m).greedy else "",
            "yes" if m.pays else "no",
        ]
        for name, m in overview.manifests.items()
    ]


_SEARCH = ("plan", "share", "accept", "agree", "c", "drafts", "S", "greedy", "")


def list_search(manifest: Manifest) -> list[list[str]]:
    """A row per candidate, the smallest first; marked: the one chosen, and those that none beats in bytes and speed."""
    return [
        [
            c.plan.name,
            f"{c.bytes_share:.3f}",
            f"{fmean(c.accepted):.3f}",
            f"{fmean(c.agreement):.3f}",
            f"{c.c:.3f}",
            str(c.draft_length),
            f"{c.speedup:.2f}",
            f"{c.greedy:.2f}",
            "chosen" if c.plan == manifest.plan else "best" if c.best else "",
        ]
        for c in sorted(manifest.candidates, key=lambda c: c.bytes_share)
    ]


def _tabulate_search(manifest: Manifest) -> Table:
    table = Table(title="What was tried", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in _SEARCH:
        table.add_column(column, justify="left" if column in ("plan", "") else "right", no_wrap=True)
    for row in list_search(manifest):
        table.add_row(*row)
    return table


def list_acceptance(manifest: Manifest) -> list[list[str]]:
    """Rows of acceptance by draft position: on texts apart, then on the full model's own by temperature."""
    measured = manifest.measured
    rows: list[tuple[str, Sequence[float]]] = [
        ("texts apart, accepted at temperature 1", measured.accepted),
        ("texts apart, same likeliest token", measured.agreement),
    ]
    rows += [(f"the model's own text, temperature {t}", own.accepted) for t, own in measured.on_policy.items()]
    return [[title, *(f"{a:.3f}" for a in values)] for title, values in rows]


def render_page(overview: Overview) -> str:
    """One HTML page that needs nothing else."""
    base = next(iter(overview.manifests.values())).base
    told = overview.classifier
    return render(
        PAGE,
        base=base,
        folder=str(overview.folder),
        columns=COLUMNS,
        rows=list_rows(overview),
        positions=range(1, POSITIONS + 1),
        search=_SEARCH,
        classes=[_describe(name, manifest) for name, manifest in overview.manifests.items()],
        classifier=told,
        about_classifier=describe_classifier(told),
        pooled=POOLED,
    )


def _describe(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": name,
        "why": manifest.why,
        "facts": [
            ("bytes per step", f"{manifest.measured.bytes_per_step:,} ({manifest.measured.bytes_share:.1%} of bf16)"),
            ("format", f"every matrix in {manifest.plan.format}; {describe_training(manifest)}"),
            ("head", f"{manifest.head_rows:,} rows with {manifest.measured.coverage:.1%} of the probability"),
            ("predicted speedup", f"{chosen(manifest).speedup:.2f}, greedy {chosen(manifest).greedy:.2f}"),
            ("texts", "; ".join(f"to {use} {d.prompts} of {d.sources} sources" for use, d in manifest.data.items())),
            ("machine", describe_place(manifest)),
        ],
        "picture": _place_units(manifest),
        "acceptance": list_acceptance(manifest),
        "rows": list_search(manifest),
        "plot": _place_candidates(manifest),
    }


def _place_units(manifest: Manifest) -> dict[str, Any]:
    """Rectangles (x, y, width, height, kept) of the layers: groups above, neurons filled from the bottom below."""
    heads = manifest.base.kv_heads
    cells: list[tuple[float, float, float, float, bool]] = []
    top = heads * _CELL + 8
    for number, layer in enumerate(manifest.kept):
        x = 60 + number * _COLUMN
        cells += [(x, g * _CELL, _COLUMN - 4, _CELL - 2, g in layer.groups) for g in range(heads)]
        filled = round(layer.neurons / manifest.base.neurons * _HEIGHT, 1)
        cells += [(x, top, _COLUMN - 4, _HEIGHT, False), (x, top + _HEIGHT - filled, _COLUMN - 4, filled, True)]
    labels = [(60 + n * _COLUMN + _COLUMN / 2 - 2, top + _HEIGHT + 13, str(n)) for n in range(len(manifest.kept))]
    width, height = 60 + len(manifest.kept) * _COLUMN, top + _HEIGHT + 18
    return {"cells": cells, "labels": labels, "width": width, "height": height, "neurons_at": top + _HEIGHT / 2}


def _place_candidates(manifest: Manifest) -> dict[str, Any]:
    """Points (x, y, kind, title) of the candidates: bytes across, predicted speedup up; and the borders' values."""
    width, height, margin = _PLOT
    shares = [c.bytes_share for c in manifest.candidates]
    speeds = [c.speedup for c in manifest.candidates] + [1.0]
    low, high = min(shares), max(shares)
    slow, fast = min(speeds), max(speeds)

    def across(share: float) -> float:
        return round(margin + (share - low) / ((high - low) or 1) * (width - 2 * margin), 1)

    def up(speed: float) -> float:
        return round(height - margin - (speed - slow) / ((fast - slow) or 1) * (height - 2 * margin), 1)

    kinds = ["chosen" if c.plan == manifest.plan else "best" if c.best else "tried" for c in manifest.candidates]
    points = [
        (across(c.bytes_share), up(c.speedup), kind, f"{c.plan.name}: {c.speedup:.2f}")
        for c, kind in zip(manifest.candidates, kinds, strict=True)
    ]
    return {
        "points": points,
        "width": width,
        "height": height,
        "margin": margin,
        "one": up(1.0),
        "shares": (f"{low:.0%}", f"{high:.0%}"),
        "speeds": [(up(s), f"{s:.2f}") for s in (slow, fast)],
    }
