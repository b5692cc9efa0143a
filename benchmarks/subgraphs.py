"""What a subgraph accepts at equal bytes: ours beside every control, on held-out texts of sources never used before.

For each class and each share of the full model's bf16 bytes per step (all weights, scales, biases and head rows; no
KV): the share of next tokens accepted at temperature 1 (1 - TV) and the agreement of the arg max, in draft blocks of 8
over the full model's cache. Fitted and chosen on the prompts that are shipped for tracing, reported on
`benchmarks/prompts`. No times are measured, so other load on the machine does no harm. It goes on where it was cut off.

| method | what |
|---|---|
| ours | the best of several heads (chosen on texts apart), units by `refit`, second-order rounding and repair |
| no repair | the same units and head, plainly rounded |
| flow, uniform, random, magnitude, wanda, first | the same head and repair, units scored otherwise (strace.controls) |
| pooled, other | ours of all classes together; ours of another class |
| int8, int4, int3, int2 | quantise-only: the whole model plainly rounded, at its own bytes; the last two emulated |

Examples:
  python benchmarks/subgraphs.py --state /tmp/subgraphs
  python benchmarks/subgraphs.py --classes chat --sizes 0.25
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import describe, finish, read_prompts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from strace import trace as pipeline
from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint, quantise_decoder
from strace.classes import POOLED, Parts, shipped_prompts, split_classes
from strace.classes import read_prompts as read_classes
from strace.controls import score_units
from strace.decoder import Decoder, Layer
from strace.files import write_beside
from strace.flow import Flow, measure_flow
from strace.graphs import choose_dtype
from strace.head import count_tokens, cut_head, measure_mass, rank_tokens, special_ids
from strace.keep import Kept, Plan, fit_size, full_bytes, keep_units, kept_bytes, slice_decoder
from strace.linear import GROUP, Linear
from strace.measure import Acceptance, measure_acceptance
from strace.repair import repair
from strace.subgraph import restore_tensors, save_tensors
from strace.texts import LONGEST, Texts, batch_texts, cut_pieces

CLASSES = ("chat", "code", "facts", "math", "stories")
SIZES = (0.125, 0.25, 1 / 3, 0.5)
COVERAGES = (0.98, 0.99, 0.995)
CONTROLS = ("flow", "uniform", "random", "magnitude", "wanda", "first")
WHOLE = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
REPORTED = 8192  # tokens of the valid part read of a class


@dataclass(frozen=True)
class Made:
    """A subgraph, what it keeps and the plan that says so."""

    subgraph: Decoder
    kept: Kept
    plan: Plan


class Traced:
    """What one class's texts say of the model's units."""

    def __init__(self, checkpoint: Checkpoint, full: Decoder, name: str, parts: Parts, state: Path) -> None:
        self.full, self.name, self.state = full, name, state
        material = pipeline.gather_material(checkpoint, parts, 0)
        self.fit, self.choose = material.texts["fit"], material.texts["choose"]
        self._specials = special_ids(checkpoint)
        self._headless: dict[tuple[Any, ...], Decoder] = {}

    @cached_property
    def flow(self) -> Flow:
        return measure_flow(self.full, self.fit[:: max(1, len(self.fit) // 2)])

    @cached_property
    def head(self) -> pipeline.Head:
        mass = measure_mass(self.full, self.fit)
        counts = count_tokens(self.fit, self.full.spec.vocabulary)
        return pipeline.Head(rank_tokens(mass, counts, self._specials), mass)

    @cached_property
    def refit(self) -> Flow:
        return score_units("refit", self.flow, self.full, self.fit)

    def make(self, plan: Plan, scores: Flow, repaired: bool = True) -> Made:
        """A plan's subgraph; layers that several heads share are repaired once."""
        ids = self.head.cut(plan.coverage)
        kept = keep_units(scores, plan)
        if not repaired:
            return Made(cut_head(quantise_decoder(slice_decoder(self.full, kept), plan.format), ids), kept, plan)
        key = (plan.format, *(tuple(t.tolist()) for t in (*kept.groups, *kept.neurons)))
        if key not in self._headless:
            self._headless[key] = repair(self.full, kept, plan.format, self.fit, self.choose)
        return Made(cut_head(self._headless[key], ids), replace(kept, token_ids=ids), plan)

    def ours(self, size: float) -> Made:
        """The best on the texts to choose by of all heads, in the widest format that leaves room; kept on disk."""
        about = self.state / f"{self.name}-{size:.3f}.json"
        path = about.with_suffix(".safetensors")
        if about.exists():
            plan = Plan(**json.loads(about.read_text()))
            kept = keep_units(self.refit, plan, self.head.cut(plan.coverage))
            found = restore_tensors(path, kept, self.full)
            if found is not None:
                return Made(found, kept, plan)
        budget, tried = size * full_bytes(self.full), []
        for format in ("int4",) if size < 0.4 else ("int4", "int8"):
            for coverage in COVERAGES if format == "int4" else (0.995,):
                ids = self.head.cut(coverage)
                plan = fit_size(Plan("ours", coverage=coverage, format=format), self.refit, self.full.spec, ids, budget)
                if plan is not None and plan.mlp > 0:
                    made = self.make(plan, self.refit)
                    tried.append((measure_acceptance(self.full, made.subgraph, self.choose).mean, made))
        best = max(tried, key=lambda t: t[0])[1]
        save_tensors(path, best.subgraph, best.kept)
        write_beside(about, json.dumps(vars(best.plan)))
        return best

    def control(self, units: str, size: float, like: Plan) -> Made:
        """Units scored by `units` within the same bytes, with the head of `like`, repaired alike."""
        budget, ids = size * full_bytes(self.full), self.head.cut(like.coverage)
        scores = score_units(units, self.flow, self.full, self.fit)
        if units != "first":
            plan = fit_size(replace(like, mlp=1.0), scores, self.full.spec, ids, budget)
            assert plan is not None, "what is like it fits"
            return self.make(plan, scores)
        layers = self.full.spec.layers
        for kept in range(layers, 0, -1):
            plan = replace(like, attention=kept / layers, mlp=kept / layers, whole=True)
            if kept_bytes(self.full.spec, keep_units(scores, plan, ids), plan.format) <= budget:
                break
        return self.make(plan, scores)


def emulate(full: Decoder, bits: int) -> tuple[Decoder, float]:
    """The whole model plainly rounded to so many bits, a bf16 scale per 32 inputs, in dense matrices; and its bytes
    over the full model's in bf16."""
    if bits in (4, 8):
        whole = quantise_decoder(full, f"int{bits}")
        return whole, whole.bytes_per_step / full_bytes(full)

    def convert(linear: Linear) -> Linear:
        return Linear(round_plainly(linear.dense(), bits).to(full.dtype), linear.bias)

    layers = []
    for layer in full.layers:
        assert layer.attention is not None and layer.mlp is not None
        attention = replace(layer.attention, qkv=convert(layer.attention.qkv), o=convert(layer.attention.o))
        mlp = replace(layer.mlp, inner=convert(layer.mlp.inner), down=convert(layer.mlp.down))
        layers.append(Layer(attention, mlp))
    return replace(full, layers=layers, head=convert(full.head)), (bits + 16 / GROUP) / 16


def round_plainly(weight: Tensor, bits: int) -> Tensor:
    """float32 [N, K] on the grid of `bits`; each group's scale is the best in squared error of a few, as in int4."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks = weight.reshape(len(weight), -1, GROUP)
    peak = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    best, least = blocks, torch.full_like(peak, torch.inf)
    for shrink in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        scale = peak * shrink / low
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        rounded = (blocks / scale).round().clamp(low, high) * scale
        error = (rounded - blocks).square().sum(2, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


class Results:
    """Rows measured so far, kept on disk after each."""

    def __init__(self, state: Path) -> None:
        self.path = state / "results.json"
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []

    def add(self, name: str, method: str, size: float, measure: Callable[[], tuple[Acceptance, float, str]]) -> None:
        """Measure unless it was."""
        key = {"prompts": name, "method": method, "size": round(size, 3)}
        if any(key.items() <= row.items() for row in self.rows):
            return
        acceptance, share, plan = measure()
        row = key | {
            "bytes": round(share, 4),
            "accepted": round(acceptance.mean, 4),
            "agreement": round(statistics.fmean(acceptance.agreement), 4),
            "positions": acceptance.positions,
            "plan": plan,
        }
        self.rows.append(row)
        write_beside(self.path, json.dumps(self.rows))
        print(f"{name} {method} at {size:.3f}: {row['bytes']} accepted {row['accepted']} ({plan})", flush=True)


def read_texts(checkpoint: Checkpoint, name: str) -> list[Texts]:
    """The valid part of a class, up to a number of tokens."""
    ids = [checkpoint.tokenizer(text, verbose=False)["input_ids"] for text in read_prompts(name, 1000)]
    pieces, total = [], 0
    for piece in cut_pieces(ids, min(LONGEST, checkpoint.spec.context)):
        pieces.append(piece)
        total += len(piece)
        if total >= REPORTED:
            break
    return batch_texts(pieces)


def measure_class(
    name: str, traced: dict[str, Traced], results: Results, texts: list[Texts], sizes: Sequence[float], controls: bool
) -> None:
    """Ours, or all methods, on the texts of one class."""
    own, full = traced[name], traced[name].full

    def report(make: Callable[[], Made]) -> Callable[[], tuple[Acceptance, float, str]]:
        def measure() -> tuple[Acceptance, float, str]:
            made = make()
            plan, share = made.plan, made.subgraph.bytes_per_step / full_bytes(full)
            kept = f"{plan.format}, {plan.mlp:.2f} of the neurons, head {made.subgraph.head.shape[0]}"
            return measure_acceptance(full, made.subgraph, texts), share, kept

        return measure

    for size in sizes:
        results.add(name, "ours", size, report(lambda size=size: own.ours(size)))
    if not controls:
        return
    for method, bits in WHOLE.items():

        def whole(bits: int = bits) -> tuple[Acceptance, float, str]:
            decoder, share = emulate(full, bits)
            return measure_acceptance(full, decoder, texts), share, "whole model"

        results.add(name, method, 1.0, whole)
    classes = [each for each in traced if each != POOLED]
    other = classes[classes.index(name) - 1]
    for size in sizes:
        like = own.ours(size).plan
        results.add(name, "no repair", size, report(lambda like=like: own.make(like, own.refit, repaired=False)))
        if other != name:
            results.add(name, "other", size, report(lambda size=size: traced[other].ours(size)))
        results.add(name, "pooled", size, report(lambda size=size: traced[POOLED].ours(size)))
        for units in CONTROLS if like.mlp < 1 else ("first",):
            results.add(name, units, size, report(lambda u=units, s=size, p=like: own.control(u, s, p)))


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print means over the classes, and give them."""
    means = []
    for size in sorted({row["size"] for row in rows}, reverse=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [row for row in rows if (row["method"], row["size"]) == (method, size)]
            if some:
                mean = {
                    key: round(statistics.fmean(row[key] for row in some), 4)
                    for key in ("bytes", "accepted", "agreement")
                }
                spread = [min(row["accepted"] for row in some), max(row["accepted"] for row in some)]
                means.append({"method": method, "size": size, "classes": len(some)} | mean | {"spread": spread})
    table = Table()
    for column in means[0]:
        table.add_column(column)
    for row in means:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    return means


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES, metavar="CLASS")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, help="shares of the full model's bytes")
    parser.add_argument("--state", type=Path, required=True, help="folder of what was done before; made if missing")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    full = load_decoder(checkpoint, choose_dtype("cpu"))
    split = split_classes(read_classes(shipped_prompts(), arguments.classes))
    traced = {name: Traced(checkpoint, full, name, parts, arguments.state) for name, parts in split.items()}
    results = Results(arguments.state)
    for controls in (False, True):  # ours of all classes come first: cut off there, the run has said the most
        for name in arguments.classes:
            measure_class(name, traced, results, read_texts(checkpoint, name), arguments.sizes, controls)
    finish(
        {
            "benchmark": "subgraphs",
            "machine": describe(),
            "model": arguments.model,
            "dtype": str(full.dtype),
            "means": show(results.rows),
            "results": results.rows,
        }
    )


if __name__ == "__main__":
    main()
