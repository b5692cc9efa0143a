"""What a subgraph accepts at equal bytes: ours beside every control, on held-out texts of sources never used before.

For each class and each share of the full model's bf16 bytes per step (all weights, scales, biases and head rows; no
KV): the share of next tokens accepted at temperature 1 (1 - TV) and the agreement of the arg max, in draft blocks of 8
over the full model's cache. Fitted and chosen on the prompts that are shipped for tracing, reported on
`benchmarks/prompts`. No times are measured, so other load on the machine does no harm. It goes on where it was cut off,
and several processes may share a state (one for some classes each, say; the last one prints the table of all).
All classes together are fitted on as many tokens as one: they are also what classes with shuffled labels would be. What
a method loses against ours comes with a bootstrap interval (95 %, sources drawn within each class).

| method | what |
|---|---|
| ours | the best of several heads (chosen on texts apart), units by `refit`, repaired and the head fitted |
| no repair | the same units and head, plainly rounded and not fitted |
| flow, uniform, random, magnitude, wanda, moment, first | the same head and repair, other scores (strace.controls) |
| pooled, other | ours of all classes together; ours of another class |
| pooled units, other units | ours, but the units are scored on all classes together or on another class |
| pooled repair, other repair | ours, but repaired on the texts of all classes together or of another class |
| int8, int4, int3, int2 | quantise-only: the whole model plainly rounded, at its own bytes; the last two emulated |
| distilled | ours, trained for --distill minutes on the fitted texts and on the full model's own; only where asked |
| more text, more text distilled | the same two, repaired, heads fitted and trained on --more; only where asked |

Examples:
  python benchmarks/subgraphs.py --state /tmp/subgraphs
  python benchmarks/subgraphs.py --state /tmp/subgraphs --classes chat --sizes 0.25
  python benchmarks/subgraphs.py --state /tmp/subgraphs --sizes 0.125 --methods ours distilled --distill 10
  python benchmarks/subgraphs.py --state /tmp/subgraphs --sizes 0.125 --methods ours "more text" --more my-prompts
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, finish, read_sources
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from strace.blocks import even_starts
from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint, quantise_decoder
from strace.classes import POOLED, Parts, Prompt, shipped_prompts, split_classes
from strace.classes import read_prompts as read_classes
from strace.controls import score_units
from strace.decoder import Decoder, Layer
from strace.distill import distill
from strace.files import file_beside, write_beside
from strace.flow import Flow, measure_flow
from strace.graphs import choose_dtype, make_runner
from strace.head import Head, cut_head, fit_head, rank_head, special_ids
from strace.keep import Kept, Plan, fit_size, full_bytes, keep_units, kept_bytes, slice_decoder
from strace.linear import GROUP, Linear
from strace.material import GIVEN, SOME_TOKENS, gather_material
from strace.measure import block_streams, compare, measure_acceptance
from strace.onpolicy import continue_prompts, count_cache
from strace.repair import repair
from strace.runner import FULL
from strace.subgraph import restore_tensors, save_tensors
from strace.texts import LONGEST, Texts, batch_texts, cut_pieces, take_pieces, take_some
from strace.trace import WRITTEN

CLASSES = ("chat", "code", "facts", "math", "stories")
SIZES = (0.125, 0.25, 0.5, 1 / 3)
SMALL = 0.2  # below this share of the bytes a long head would leave no neurons
CONTROLS = ("flow", "wanda", "moment", "magnitude", "uniform", "random", "first")
OF_CLASS = ("pooled repair", "pooled units", "other repair", "other units")
OTHERS = ("pooled", "other", *CONTROLS, *OF_CLASS, "no repair")
WHOLE = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
METHODS = ("ours", *WHOLE, *OTHERS)
DISTILLED, MORE, MORE_DISTILLED = ASKED = ("distilled", "more text", "more text distilled")
ALL = (*METHODS, *ASKED)
CONTINUED = 4  # times that each prompt to fit on is continued, to distill on
DRAWS = 2000  # of the bootstrap


Counts = dict[str, list[float]]  # by source: accepted, agreeing, positions


@dataclass(frozen=True)
class Made:
    """A subgraph, what it keeps and the plan that says so."""

    subgraph: Decoder
    kept: Kept
    plan: Plan


class Traced:
    """What one class's texts say of the model's units."""

    def __init__(
        self, checkpoint: Checkpoint, full: Decoder, name: str, parts: Parts, state: Path, more: Sequence[Texts] = ()
    ) -> None:
        """more: texts that `on_more` fits on."""
        self.full, self.name, self.state, self.more = full, name, state, more
        material = gather_material(checkpoint, parts, 0)
        self.fit, self.choose, self._prompts = material.texts["fit"], material.texts["choose"], material.prompts["fit"]
        self.some = take_some(self.fit, SOME_TOKENS)
        self._specials, self._stop_ids = special_ids(checkpoint), checkpoint.stop_ids
        self._headless: dict[tuple[Any, ...], Decoder] = {}

    def _keep(self, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, made once and kept on disk."""
        path = self.state / f"{self.name}-{what}.safetensors"
        if not path.exists():
            with file_beside(path) as beside:
                save_file(make(), beside)
        return load_file(path)

    @cached_property
    def flow(self) -> Flow:
        some = self.fit[:: max(1, len(self.fit) // 2)]
        return make_flow(self._keep("flow", lambda: flow_tensors(measure_flow(self.full, some))))

    @cached_property
    def head(self) -> Head:
        return Head(**self._keep("head", lambda: vars(rank_head(self.full, self.some, self.fit, self._specials))))

    @cached_property
    def refit(self) -> Flow:
        spec = self.full.spec
        groups, neurons = (torch.zeros(spec.layers, n, dtype=torch.float64) for n in (spec.kv_heads, spec.mlp))
        nothing = Flow(groups, neurons, torch.zeros(0))  # attention is kept whole
        return make_flow(self._keep("refit", lambda: flow_tensors(score_units("refit", nothing, self.full, self.some))))

    def make(self, plan: Plan, scores: Flow, repaired: bool = True, on: Traced | None = None) -> Made:
        """A plan's subgraph, repaired and its head fitted on the texts of another class where `on` is given; layers
        that several heads share are repaired once."""
        ids = self.head.cut(plan.coverage)
        kept = keep_units(scores, plan)
        if not repaired:
            return Made(cut_head(quantise_decoder(slice_decoder(self.full, kept), plan.format), ids), kept, plan)
        by = on or self
        key = (by.name, plan.format, *(tuple(t.tolist()) for t in (*kept.groups, *kept.neurons)))
        if key not in self._headless:
            self._headless[key] = repair(self.full, kept, plan.format, by.fit, by.choose)
        cut = cut_head(self._headless[key], ids)
        return Made(fit_head(self.full, cut, by.fit), replace(kept, token_ids=ids), plan)

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
        coverages = (0.95, 0.98) if size < SMALL else (0.99, 0.995)
        for format in ("int4",) if size < 0.4 else ("int4", "int8"):
            for coverage in coverages if format == "int4" else (0.995,):
                ids = self.head.cut(coverage)
                asked = Plan("ours", coverage=coverage, format=format)
                fitted = fit_size(asked, self.refit, self.full.spec, ids, budget)
                if fitted is not None and fitted.mlp > 0:
                    made = self.make(fitted, self.refit)
                    tried.append((measure_acceptance(self.full, made.subgraph, self.choose).mean, made))
        best = max(tried, key=lambda t: t[0])[1]
        save_tensors(path, best.subgraph, best.kept)
        write_beside(about, json.dumps(vars(best.plan)))
        return self.ours(size)  # as the disk gives it back, it can be trained

    def on_more(self, size: float) -> Made:
        """The units and the head of ours, repaired and fitted on `more`."""
        made = self.ours(size)

        def fit() -> Decoder:
            units = replace(made.kept, token_ids=None)
            headless = repair(self.full, units, made.plan.format, self.more, self.choose)
            return fit_head(self.full, cut_head(headless, made.kept.token_ids), self.more)

        return self._restore(made, f"{size:.3f}-more", fit)

    def distilled(self, size: float, minutes: float, more: bool = False) -> Made:
        """Ours, trained for so many minutes of this thread: what other work takes of the machine does not count."""
        made, texts = (self.on_more(size), self.more) if more else (self.ours(size), self.fit)

        def train() -> Decoder:
            runner = make_runner({FULL: self.full}, count_cache(GIVEN, WRITTEN))
            ask = partial(continue_prompts, runner, self._prompts, 1.0, WRITTEN, self._stop_ids)
            written = batch_texts([each.ids for seed in range(CONTINUED) for each in ask(seed)])
            trained = distill(self.full, made.subgraph, [*texts, *written], 60 * minutes, clock=time.thread_time)
            print(f"{self.name}: {trained.steps} steps", flush=True)
            return trained.subgraph

        return self._restore(made, f"{size:.3f}{'-more' if more else ''}-distilled-{minutes:g}", train)

    def _restore(self, like: Made, what: str, make: Callable[[], Decoder]) -> Made:
        """What `make` gives of the same units, made once and kept on disk."""
        path = self.state / f"{self.name}-{what}.safetensors"
        if not path.exists():
            save_tensors(path, make(), like.kept)
        found = restore_tensors(path, like.kept, self.full)
        assert found is not None, "it was just written"
        return replace(like, subgraph=found)

    def chosen_by(self, scores: Flow, size: float, like: Plan) -> Made:
        """Units by `scores` within the same bytes, with the head of `like`, repaired alike."""
        budget, ids = size * full_bytes(self.full), self.head.cut(like.coverage)
        plan = fit_size(replace(like, mlp=1.0), scores, self.full.spec, ids, budget)
        assert plan is not None, "what is like it fits"
        return self.make(plan, scores)

    def control(self, units: str, size: float, like: Plan) -> Made:
        """Units scored by `units` within the same bytes, with the head of `like`, repaired alike."""
        scores = score_units(units, self.flow, self.full, self.some)
        if units != "first":
            return self.chosen_by(scores, size, like)
        budget, ids = size * full_bytes(self.full), self.head.cut(like.coverage)
        layers = self.full.spec.layers
        for kept in range(layers, 0, -1):
            plan = replace(like, attention=kept / layers, mlp=kept / layers, whole=True)
            if kept_bytes(self.full.spec, keep_units(scores, plan, ids), plan.format) <= budget:
                break
        return self.make(plan, scores)


def flow_tensors(flow: Flow) -> dict[str, Tensor]:
    """What of a flow decides which units are kept, and `levels`."""
    return {"groups": flow.groups, "neurons": flow.neurons, "levels": flow.levels}


def make_flow(tensors: dict[str, Tensor]) -> Flow:
    """The inverse of `flow_tensors`."""
    return Flow(tensors["groups"], tensors["neurons"], tensors["levels"])


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
    """Rows measured so far, a file each, so that several processes may share a state."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "rows"
        self.folder.mkdir(exist_ok=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, by class, method and size."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def add(self, name: str, method: str, size: float, measure: Callable[[], tuple[Counts, float, str]]) -> None:
        """Measure unless it was."""
        path = self.folder / f"{name}-{method.replace(' ', '-')}-{size:.3f}.json"
        if path.exists():
            return
        counts, share, plan = measure()
        accepted, agreed, positions = (sum(column) for column in zip(*counts.values(), strict=True))
        row = {
            "prompts": name,
            "method": method,
            "size": round(size, 3),
            "bytes": round(share, 4),
            "accepted": round(accepted / positions, 4),
            "agreement": round(agreed / positions, 4),
            "positions": round(positions),
            "plan": plan,
            "sources": {source: [round(x, 2) for x in sums] for source, sums in counts.items()},
        }
        write_beside(path, json.dumps(row))
        print(f"{name} {method} at {size:.3f}: {row['bytes']} accepted {row['accepted']} ({plan})", flush=True)


@dataclass(frozen=True)
class Held:
    """Held-out texts, and the source of every row of every batch."""

    batches: list[Texts]
    sources: list[list[str]]


def read_held(checkpoint: Checkpoint, name: str, tokens: int) -> Held:
    """The valid part of a class, up to about so many tokens."""
    found: list[tuple[list[int], str]] = []
    for prompt in read_sources(name):
        ids = checkpoint.tokenizer(prompt["text"], verbose=False)["input_ids"]
        found += [(piece, prompt["source"]) for piece in cut_pieces([ids], min(LONGEST, checkpoint.spec.context))]
        if sum(len(piece) for piece, _ in found) >= tokens:
            break
    found.sort(key=lambda each: len(each[0]), reverse=True)  # as batch_texts does, which keeps this order
    batches, sources = batch_texts([piece for piece, _ in found]), iter(source for _, source in found)
    return Held(batches, [[next(sources) for _ in range(batch.shape[0])] for batch in batches])


def read_more(checkpoint: Checkpoint, prompts: Sequence[Prompt], parts: Parts, tokens: int) -> list[Texts]:
    """Pieces of texts of no source that is chosen by, up to about so many tokens."""
    without = {prompt.source for prompt in parts.choose}
    texts = [prompt.text for prompt in prompts if prompt.source not in without]
    ids = [checkpoint.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    pieces = cut_pieces(ids, min(LONGEST, checkpoint.spec.context))
    random.Random(0).shuffle(pieces)
    return batch_texts(take_pieces(pieces, tokens))


@torch.inference_mode()
def count_accepted(full: Decoder, subgraph: Decoder, held: Held) -> Counts:
    """By source what is accepted at temperature 1, what agrees, and of how many positions; in draft blocks of 8."""
    generator = torch.Generator().manual_seed(0)
    counts: Counts = {}
    for batch, sources in zip(held.batches, held.sources, strict=True):
        whole, own = block_streams(full, subgraph, batch, even_starts(batch.shape, generator))
        for row, (real, source) in enumerate(zip(batch.real, sources, strict=True)):
            at = row * batch.shape[1] + real.nonzero().flatten()
            p, q = full.logits(whole[at]).softmax(-1), subgraph.logits(own[at]).softmax(-1)
            accepted, agreed = compare(p, q, subgraph.token_ids)
            before = counts.get(source, [0.0, 0.0, 0.0])
            now = float(accepted.sum()), float(agreed.sum()), float(len(at))
            counts[source] = [a + b for a, b in zip(before, now, strict=True)]
    return counts


def measure_method(
    method: str, name: str, size: float, traced: dict[str, Traced], held: Held, minutes: float
) -> tuple[Counts, float, str]:
    """Acceptance of one method on the texts of one class, its share of the bytes, and what it keeps."""
    full = traced[name].full
    if method in WHOLE:
        decoder, share = emulate(full, WHOLE[method])
        return count_accepted(full, decoder, held), share, "whole model"
    if method in (DISTILLED, MORE_DISTILLED):
        made = traced[name].distilled(size, minutes, more=method == MORE_DISTILLED)
    else:
        made = make_method(method, name, size, traced)
    kept = f"{made.plan.format}, {made.plan.mlp:.2f} of the neurons, head {made.subgraph.head.shape[0]}"
    return count_accepted(full, made.subgraph, held), made.subgraph.bytes_per_step / full_bytes(full), kept


def make_method(method: str, name: str, size: float, traced: dict[str, Traced]) -> Made:
    """A subgraph of one method for one class."""
    own, classes = traced[name], [each for each in traced if each != POOLED]
    if method == "ours":
        return own.ours(size)
    if method == MORE:
        return own.on_more(size)
    if method in ("pooled", "other", *OF_CLASS):
        whose, _, what = method.partition(" ")
        other = traced[POOLED if whose == "pooled" else classes[classes.index(name) - 1]]
        if not what:
            return other.ours(size)
        like = own.ours(size).plan
        return own.chosen_by(other.refit, size, like) if what == "units" else own.make(like, own.refit, on=other)
    like = own.ours(size).plan
    return own.make(like, own.refit, repaired=False) if method == "no repair" else own.control(method, size, like)


def list_cells(
    classes: Sequence[str], sizes: Sequence[float], methods: Sequence[str] = METHODS
) -> list[tuple[str, str, float]]:
    """Method, class and size, the most telling first: cut off anywhere, the run has whole rows of the table."""
    cells = [("ours", name, size) for size in sizes for name in classes]
    cells += [(method, name, 1.0) for method in WHOLE for name in classes]
    cells += [(method, name, size) for method in OTHERS for size in sizes for name in classes]
    cells += [(method, name, size) for method in ASKED for size in sizes for name in classes]
    alone = len(classes) == 1
    return [cell for cell in cells if cell[0] in methods and not (alone and cell[0].startswith("other"))]


def draw_losses(ours: list[dict[str, Any]], other: list[dict[str, Any]], seed: int = 0) -> list[float]:
    """What `other` loses against ours in accepted share, a mean over classes: the middle 95 % of bootstrap draws."""
    rng, losses = np.random.default_rng(seed), np.zeros(DRAWS)
    for row in other:
        (same,) = [each for each in ours if each["prompts"] == row["prompts"]]
        a, b = (np.array([each["sources"][s] for s in sorted(row["sources"])]) for each in (same, row))
        drawn = rng.integers(len(a), size=(DRAWS, len(a)))
        losses += (a[drawn, 0].sum(1) - b[drawn, 0].sum(1)) / a[drawn, 2].sum(1) / len(other)
    return [round(float(x), 4) for x in np.quantile(losses, (0.025, 0.975))]


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print means over the classes, and give them."""
    means = []
    for size in sorted({row["size"] for row in rows}, reverse=True):
        ours = [row for row in rows if (row["method"], row["size"]) == ("ours", size)]
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [row for row in rows if (row["method"], row["size"]) == (method, size)]
            if some:
                mean = {
                    key: round(statistics.fmean(row[key] for row in some), 4)
                    for key in ("bytes", "accepted", "agreement")
                }
                spread = [min(row["accepted"] for row in some), max(row["accepted"] for row in some)]
                loss = draw_losses(ours, some) if ours else None
                about = {"method": method, "size": size, "classes": len(some)}
                means.append(about | mean | {"spread": spread, "loss": loss})
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
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=ALL, metavar="METHOD", help="only these")
    parser.add_argument("--distill", type=float, default=10, metavar="MINUTES", help="(default %(default)s)")
    parser.add_argument("--more", type=Path, metavar="PROMPTS", help="as `strace-llm trace --prompts` takes them")
    parser.add_argument("--more-tokens", type=int, default=250_000, help="of it, a class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the valid part, a class (default %(default)s)")
    parser.add_argument("--state", type=Path, required=True, help="folder of what was done before; made if missing")
    arguments = parser.parse_args()
    if {MORE, MORE_DISTILLED}.intersection(arguments.methods) and arguments.more is None:
        parser.error(f"{MORE!r} wants --more")
    arguments.state.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(arguments.model)
    full = load_decoder(checkpoint, choose_dtype("cpu", runner="torch"))
    split = split_classes(read_classes(shipped_prompts(), arguments.classes))
    given = read_classes(arguments.more, arguments.classes) if arguments.more else {}
    more = {n: read_more(checkpoint, prompts, split[n], arguments.more_tokens) for n, prompts in given.items()}
    traced = {n: Traced(checkpoint, full, n, parts, arguments.state, more.get(n, ())) for n, parts in split.items()}
    results = Results(arguments.state)
    held = {name: read_held(checkpoint, name, arguments.tokens) for name in arguments.classes}
    for method, name, size in list_cells(arguments.classes, arguments.sizes, arguments.methods):
        measure = partial(measure_method, method, name, size, traced, held[name], arguments.distill)
        results.add(name, method, size, measure)
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
