"""From a model and prompts to a folder of subgraphs: score, keep, repair, measure, choose, save, class by class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint
from strace.classes import SHARES, Classifier, Parts, Prompt, read_prompts, shipped_prompts, split_classes
from strace.costs import TYPICAL, count_blocks, draw_curve, list_cases, measure_costs, name_processor
from strace.decoder import Decoder
from strace.flow import Flow, measure_flow
from strace.graphs import make_runner
from strace.head import count_tokens, measure_mass, rank_tokens, short_enough, special_ids
from strace.keep import Kept, Plan, fit_size, full_bytes, keep_units
from strace.measure import Acceptance, measure_acceptance, predict_speedup
from strace.repair import repair
from strace.runner import FULL
from strace.subgraph import (
    MANIFEST,
    SCHEMA,
    BadSubgraph,
    Base,
    Candidate,
    Data,
    KeptLayer,
    Machine,
    Manifest,
    Measured,
    read_manifest,
    read_tensors,
    save_subgraph,
)
from strace.texts import LONGEST, Texts, batch_texts, cut_pieces

# Tokens read of each part. Moments of a few hundred inputs are settled by some twenty thousand rows, unit scores by
# fewer.
BUDGETS = {"fit": 16_384, "choose": 4_096, "report": 8_192}
FLOW_TOKENS = 8_192
LENGTHS = (1, 2, 4, 9)  # tokens of the full passes timed; 9 verifies the longest draft
WORTH = 1.05  # a predicted speedup below this is not worth a subgraph


@dataclass(frozen=True)
class Options:
    """What `strace-llm trace` was asked for. `size`: share of the full model's bf16 bytes per step (None: the best of a
    few). `prompts`: a folder (None: the shipped ones). `classes`: only these of it (empty: all)."""

    model: str
    output: Path
    prompts: Path | None = None
    size: float | None = None
    classes: tuple[str, ...] = ()
    format: str = "int4"
    seed: int = 0


@dataclass(frozen=True)
class Material:
    """A class's texts, tokenised and batched, by use; `data` is what the manifest says of them."""

    texts: dict[str, list[Texts]]
    data: dict[str, Data]


def plan_candidates(size: float | None, format: str) -> list[Plan]:
    """What is tried. Without a size, several of them; with one, several ways to spend it: each attention share takes
    its bytes and the neurons get the rest."""
    # Attention is kept before neurons: at 14 % of the embedded model's bytes .915 is accepted with all attention and a
    # third of the neurons, .885 with half of both, .826 with a quarter and more neurons (stories).
    if size is None:
        return [
            Plan("all units", format=format),
            Plan("1/2 of the neurons", mlp=1 / 2, format=format),
            Plan("1/3 of the neurons", mlp=1 / 3, format=format),
            Plan("1/2 of the MLPs", mlp=1 / 2, whole=True, format=format),
        ]
    return [
        Plan("all attention", format=format),
        Plan("3/4 of the attention", attention=3 / 4, format=format),
        Plan("1/2 of the attention", attention=1 / 2, format=format),
        Plan("all attention, whole MLPs", whole=True, format=format),
    ]


def gather_material(checkpoint: Checkpoint, parts: Parts, seed: int) -> Material:
    """Tokenise and cut a class's texts, each part to its budget of tokens, in an order drawn by `seed`."""
    texts, data = {}, {}
    for use in SHARES:
        prompts: Sequence[Prompt] = getattr(parts, use)
        chosen = _draw_pieces(checkpoint, prompts, BUDGETS[use], seed)
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        texts[use] = batch_texts(chosen)
        sources = len({prompt.source for prompt in prompts})
        data[use] = Data(prompts=len(prompts), sources=sources, tokens=sum(map(len, chosen)), hash=digest)
    return Material(texts, data)


def _draw_pieces(checkpoint: Checkpoint, prompts: Sequence[Prompt], budget: int, seed: int) -> list[list[int]]:
    ids = [checkpoint.tokenizer(prompt.text, verbose=False)["input_ids"] for prompt in prompts]
    pieces = cut_pieces(ids, min(LONGEST, checkpoint.spec.context)) or [list(text) for text in ids if text]
    order = np.random.default_rng(seed).permutation(len(pieces))
    ends = np.cumsum([len(pieces[i]) for i in order])
    return [pieces[i] for i in order[: int((ends < budget).sum()) + 1]]


@dataclass(frozen=True)
class Head:
    """What short heads of a class are cut from: ids by use, and the full model's mean probability of each."""

    ranked: Tensor
    mass: Tensor

    def cut(self, coverage: float) -> Tensor | None:
        """The ids that hold `coverage` of the mass; None: all."""
        return short_enough(self.ranked, self.mass, coverage)


@dataclass(frozen=True)
class Built:
    """A candidate's subgraph and its acceptance on the texts to choose by."""

    plan: Plan
    subgraph: Decoder
    kept: Kept
    acceptance: Acceptance


@dataclass(frozen=True)
class Tried:
    """A candidate whose speedup was predicted from costs on `runner`."""

    built: Built
    record: Candidate
    runner: str


class Tracer:
    """Traces the classes of one model, one after the other; `say` hears what goes on, a line at a time."""

    def __init__(self, checkpoint: Checkpoint, full: Decoder, options: Options, say: Callable[[str], None]) -> None:
        self.checkpoint, self.full, self.options, self.say = checkpoint, full, options, say
        self.base = Base(
            model=options.model,
            revision=checkpoint.revision,
            weight_hash=checkpoint.weight_hash,
            tokenizer_hash=checkpoint.tokenizer_hash,
            kv_heads=checkpoint.spec.kv_heads,
            neurons=checkpoint.spec.mlp,
        )

    def recipe(self, material: Material) -> str:
        """The hash of everything a class's subgraph depends on: a finished folder with the same one need not be made
        again."""
        plans = [asdict(plan) for plan in plan_candidates(self.options.size, self.options.format)]
        data = {use: about.hash for use, about in material.data.items()}
        parts = [
            SCHEMA,
            self.base.weight_hash,
            self.base.tokenizer_hash,
            data,
            plans,
            self.options.size,
            self.options.seed,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def finished(self, name: str, recipe: str) -> bool:
        """Whether the class's folder is already there, whole, and of this recipe."""
        folder = self.options.output / name
        if not (folder / MANIFEST).exists():
            return False
        try:
            manifest = read_manifest(folder)
            read_tensors(folder, manifest)
        except BadSubgraph as error:
            self.say(f"{name}: made again: {error}")
            return False
        return manifest.recipe == recipe

    def trace_class(self, name: str, parts: Parts) -> Manifest | None:
        """Make and save the subgraph of a class; None when a finished one is there."""
        material = gather_material(self.checkpoint, parts, self.options.seed)
        recipe = self.recipe(material)
        if self.finished(name, recipe):
            self.say(f"{name}: finished before")
            return None
        fit = material.texts["fit"]
        self.say(f"{name}: scoring units on {material.data['fit'].tokens} tokens")
        flow = measure_flow(self.full, _first(fit, FLOW_TOKENS))
        mass = measure_mass(self.full, fit)
        counts = count_tokens(fit, self.full.spec.vocabulary)
        head = Head(rank_tokens(mass, counts, special_ids(self.checkpoint)), mass)
        built = [self.build(name, plan, flow, head, material) for plan in self.list_plans(flow, head)]
        costs = time_graphs(self.full, [b.subgraph for b in built])
        whole = full_bytes(self.full)
        tried = [Tried(b, _record(b, whole, c), c.runner) for b, c in zip(built, costs, strict=True)]
        for t in tried:
            self.say(f"{name}: {_summarise(t.record)}")
        best = max(tried, key=lambda t: t.record.speedup)
        manifest = self.describe(name, material, recipe, best, tried)
        return save_subgraph(self.options.output / name, manifest, best.built.subgraph, best.built.kept)

    def list_plans(self, flow: Flow, head: Head) -> list[Plan]:
        """The candidates, fitted to the size that was asked for.

        Raises:
            ValueError: if none fits.
        """
        plans, size = plan_candidates(self.options.size, self.options.format), self.options.size
        if size is None:
            return plans
        budget = size * full_bytes(self.full)
        fitted = [fit_size(plan, flow, self.full.spec, head.cut(plan.coverage), budget) for plan in plans]
        if not any(fitted):
            raise ValueError(f"size {size} allows {budget / 1e6:.2f} MB per step: too little for attention and head")
        return [plan for plan in fitted if plan is not None]

    def build(self, name: str, plan: Plan, flow: Flow, head: Head, material: Material) -> Built:
        """A plan's subgraph, repaired, and its acceptance on the texts to choose by."""
        self.say(f"{name}: repairing {plan.name}")
        kept = keep_units(flow, plan, head.cut(plan.coverage))
        fit, choose = material.texts["fit"], material.texts["choose"]
        subgraph = repair(self.full, kept, plan.format, fit, choose, self.options.seed)
        return Built(plan, subgraph, kept, measure_acceptance(self.full, subgraph, choose, self.options.seed))

    def describe(self, name: str, material: Material, recipe: str, best: Tried, tried: Sequence[Tried]) -> Manifest:
        """Measure the chosen subgraph on the texts to report and write down everything about it."""
        report, subgraph, kept = material.texts["report"], best.built.subgraph, best.built.kept
        acceptance = measure_acceptance(self.full, subgraph, report, self.options.seed)
        ids = kept.token_ids
        covered = 1.0 if ids is None else float(measure_mass(self.full, report)[ids].sum())
        self.say(f"{name}: chosen {best.record.plan.name}, accepted {acceptance.mean:.3f} on texts apart")
        return Manifest(
            class_name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base=self.base,
            seed=self.options.seed,
            recipe=recipe,
            data=material.data,
            plan=best.record.plan,
            why=_explain(best, tried),
            kept=[_kept_layer(g, n) for g, n in zip(kept.groups, kept.neurons, strict=True)],
            head_rows=subgraph.head.shape[0],
            measured=Measured(
                accepted=list(acceptance.accepted),
                agreement=list(acceptance.agreement),
                positions=acceptance.positions,
                coverage=covered,
                bytes_per_step=subgraph.bytes_per_step,
                bytes_share=best.record.bytes_share,
            ),
            candidates=[t.record for t in tried],
            machine=describe_machine(self.full, best.runner),
        )


def _first(batches: Sequence[Texts], tokens: int) -> list[Texts]:
    """Batches spread evenly over all (they are sorted by length), together about `tokens`."""
    total = sum(int(batch.lengths.sum()) for batch in batches)
    return list(batches[:: max(1, total // tokens)])


@dataclass(frozen=True)
class Costs:
    """A subgraph's step costs in full-model steps: c of a draft step, v(n) of a full pass over n tokens; `full_ms` is
    the unit, `runner` ran them: the one that would serve."""

    c: float
    v: dict[int, float]
    full_ms: float
    runner: str


def time_graphs(full: Decoder, subgraphs: Sequence[Decoder]) -> list[Costs]:
    """The costs of each subgraph, all timed in turns; v(n) is the full model's and the same for all."""
    drafts = {str(i): subgraph for i, subgraph in enumerate(subgraphs)}
    cases = list_cases(full.spec.context, (TYPICAL,), (1,), LENGTHS)
    runner = make_runner({FULL: full, **drafts}, count_blocks(cases))
    costs = measure_costs(runner, list(drafts), cases)
    curve = draw_curve(costs, FULL)
    v = {n: seconds / curve[1] for n, seconds in curve.items()}
    return [Costs(draw_curve(costs, draft)[1] / curve[1], v, curve[1] * 1000, runner.name) for draft in drafts]


def _record(built: Built, whole: int, costs: Costs) -> Candidate:
    speedup, length = predict_speedup(built.acceptance.accepted, costs.c, costs.v)
    return Candidate(
        plan=built.plan,
        bytes_share=built.subgraph.bytes_per_step / whole,
        accepted=list(built.acceptance.accepted),
        agreement=list(built.acceptance.agreement),
        c=costs.c,
        v=costs.v,
        full_ms=costs.full_ms,
        speedup=speedup,
        draft_length=length,
    )


def _summarise(record: Candidate) -> str:
    return (
        f"{record.plan.name}: {record.bytes_share:.3f} of the bytes, accepted {fmean(record.accepted):.3f}, "
        f"c {record.c:.2f}, predicted speedup {record.speedup:.2f} with {record.draft_length} drafts"
    )


def _kept_layer(groups: Tensor, neurons: Tensor) -> KeptLayer:
    return KeptLayer(groups=groups.tolist(), neurons=len(neurons))


def _explain(best: Tried, tried: Sequence[Tried]) -> str:
    record = best.record
    text = f"{record.plan.name}: highest predicted speedup ({record.speedup:.2f}) of {len(tried)} candidates"
    if record.speedup < WORTH:
        text += f"; below {WORTH} on this machine and runner, where it does not pay"
    return text


def describe_machine(full: Decoder, runner: str) -> Machine:
    """The device, runner and torch that the costs of `full` were measured with."""
    device = full.embed.device
    return Machine(
        device=str(device),
        processor=name_processor(device),
        threads=torch.get_num_threads(),
        runner=runner,
        torch=version("torch"),
    )


def trace(options: Options, say: Callable[[str], None] = print) -> dict[str, Manifest]:
    """Trace every class and `pooled` into `options.output`, and fit the classifier; the manifests of those newly made.

    Raises:
        BadPrompts, BadCheckpoint, UnsupportedModel: see strace.classes, strace.checkpoint, strace.families.
        ValueError: for a size too small for the model.
    """
    classes = read_prompts(options.prompts or shipped_prompts(), options.classes)
    checkpoint = open_checkpoint(options.model)
    split = split_classes(classes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    tracer = Tracer(checkpoint, load_decoder(checkpoint), options, say)
    fit_classifier(checkpoint, {name: split[name] for name in classes}, options.seed).save(options.output)
    made = {name: tracer.trace_class(name, parts) for name, parts in split.items()}
    return {name: manifest for name, manifest in made.items() if manifest is not None}


def fit_classifier(checkpoint: Checkpoint, split: dict[str, Parts], seed: int) -> Classifier:
    """The classifier of the classes, from the texts to fit on."""
    ids = {
        n: [checkpoint.tokenizer(p.text, verbose=False)["input_ids"] for p in parts.fit] for n, parts in split.items()
    }
    return Classifier.fit(ids, checkpoint.spec.vocabulary, seed)
