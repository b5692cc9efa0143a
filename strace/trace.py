"""From a model and prompts to a folder of subgraphs: score, keep, repair, measure, choose, save, class by class."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from strace.beside import Drafter, compare_speedups
from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint, quantise_decoder
from strace.classes import (
    POOLED,
    BadPrompts,
    Parts,
    WriteChat,
    read_log,
    read_prompts,
    shipped_prompts,
    split_classes,
)
from strace.classifier import Classifier, fit_classifier
from strace.cluster import Clusters, cluster_prompts, save_clusters
from strace.controls import score_units
from strace.costs import name_processor, read_table
from strace.decoder import Decoder
from strace.distill import distill
from strace.duplicates import drop_repeats
from strace.flow import Flow, measure_flow
from strace.graphs import choose_dtype, make_runner
from strace.head import Head, cut_head, fit_head, measure_mass, rank_head, special_ids
from strace.keep import Kept, Plan, fit_size, full_bytes, keep_units, slice_decoder
from strace.linear import DENSE, Linear
from strace.material import BUDGETS, CONTINUED, GIVEN, SOME_TOKENS, Material, gather_material
from strace.measure import measure_acceptance, predict_speedup
from strace.onpolicy import (
    TEMPERATURES,
    Continuation,
    Positions,
    calibrate,
    conditional_acceptance,
    continue_prompts,
    count_cache,
    measure_heads,
    measure_positions,
    share_agreeing,
)
from strace.repair import repair
from strace.runner import FULL, Runner
from strace.search import StepCosts, price_steps, project_table
from strace.subgraph import (
    MANIFEST,
    SCHEMA,
    BadSubgraph,
    Base,
    Beside,
    Candidate,
    KeptLayer,
    Machine,
    Manifest,
    Measured,
    OnPolicy,
    load_subgraph,
    read_manifest,
    read_tensors,
    restore_tensors,
    save_manifest,
    save_subgraph,
    save_tensors,
)
from strace.template import read_frame, write_chat
from strace.texts import batch_texts, count_positions, take_some
from strace.verdict import find_front, judge, tell_candidate, tell_projected

Progress = Callable[[float], None]

FLOW_TOKENS = 8_192
WRITTEN = 96  # tokens that the full model goes on with a prompt
ROUND_MINUTES = 5.0
COVERAGES = (0.97, 0.98, 0.99, 0.995, 1.0)
AUTO = ("auto",)
PLAIN = "all units, plainly rounded"  # what serves where nothing was traced


@dataclass(frozen=True)
class Options:
    """What `strace-llm trace` was asked for. `size`: share of the full model's bf16 bytes per step (None: the best of
    many). `prompts`: a file or folder (None: the shipped ones). `classes`: only these of it (empty: all; `auto` alone:
    those found in it, `clusters` of them). `class_name`: of prompts that name none. `units`: how they are scored
    (strace.controls). `runner`: what is timed and continues prompts. `distill`: minutes of training a class. `costs`:
    tables of other machines, for which speedups are projected. `fit_tokens`: of a class's texts, the most to fit on."""

    model: str
    output: Path
    prompts: Path | None = None
    size: float | None = None
    classes: tuple[str, ...] = ()
    format: str = "int4"
    seed: int = 0
    units: str = "refit"
    runner: str = "auto"
    distill: float = 0.0
    class_name: str | None = None
    clusters: int | None = None
    costs: tuple[Path, ...] = ()
    fit_tokens: int = BUDGETS["fit"]


def plan_candidates(size: float | None, format: str, units: str = "refit") -> list[Plan]:
    """What is tried. Without a size, shares of the neurons by heads of several coverages; with one, several ways to
    spend it: the attention share and the head take their bytes and the neurons get the rest. Plans that differ in
    coverage alone are repaired once."""
    # Attention is kept before neurons: at 14 % of the embedded model's bytes .915 is accepted with all attention and a
    # third of the neurons, .885 with half of both, .826 with a quarter and more neurons (stories).
    made = [Plan(PLAIN, coverage=1.0, format=format, units=units, repaired=False)] if size is None else []
    shares = (("all", 1.0), ("3/4", 0.75), ("1/2", 0.5), ("1/3", 1 / 3)) if size is None else (("most", 1.0),)
    for share, mlp in shares:
        for coverage in COVERAGES:
            name = f"{share} neurons, head of {coverage:.1%}"
            made.append(Plan(name, mlp=mlp, coverage=coverage, format=format, units=units))
    if size is not None:
        made.append(Plan("3/4 of the attention", attention=3 / 4, coverage=0.99, format=format, units=units))
        made.append(Plan("whole MLPs", whole=True, coverage=0.99, format=format, units=units))
    return made


@dataclass(frozen=True)
class Tried:
    """What a candidate keeps and how it does. Its subgraph is built again if it is chosen: all together would take
    more memory than the model."""

    kept: Kept
    record: Candidate


@dataclass(frozen=True)
class Chosen:
    """The candidate of a class and its subgraph; distilled: minutes."""

    tried: Tried
    subgraph: Decoder
    distilled: float = 0.0


class Tracer:
    """Traces the classes of one model, one after the other; `say` hears what goes on, a line at a time."""

    def __init__(self, checkpoint: Checkpoint, full: Decoder, options: Options, say: Callable[[str], None]) -> None:
        self.checkpoint, self.full, self.options, self.say = checkpoint, full, options, say
        self.progress: Progress = ignore  # hears the share of a class that is done
        self._runner: Runner | None = None
        self._head = full.head.weight
        self.machine = describe_machine(full, self.runner)
        self.base = Base(
            model=options.model,
            revision=checkpoint.revision,
            weight_hash=checkpoint.weight_hash,
            tokenizer_hash=checkpoint.tokenizer_hash,
            kv_heads=checkpoint.spec.kv_heads,
            neurons=checkpoint.spec.mlp,
        )

    @property
    def runner(self) -> Runner:
        """What continues prompts. It has all weights of the full model in memory, until `rest`."""
        if self._runner is None:
            self._runner = make_runner({FULL: self.lend()}, count_cache(GIVEN, WRITTEN), self.options.runner)
        return self._runner

    def lend(self) -> Decoder:
        """The full model to be packed. Its head is as it was read, not as torch multiplies by it: so one that is the
        embedding too is packed once."""
        self.full.head = Linear(self._head, self.full.head.bias, self.full.dtype)
        return self.full

    def rest(self) -> None:
        """Let go of the runner: units are scored and fitted on a layer at a time."""
        self._runner = None

    @cached_property
    def full_bytes(self) -> int:
        """The whole that a size is a share of."""
        return full_bytes(self.full)

    @cached_property
    def costs(self) -> StepCosts:
        """What steps cost here, timed at the first class that needs it."""
        self.say("timing steps")
        full, served = self.lend(), choose_dtype("cpu", runner=self.options.runner)
        if DENSE[served] is not full.dtype:
            full = load_decoder(self.checkpoint, served, streamed=True)
        return price_steps(full, self.base.weight_hash, self.options.format, self.options.runner)

    def recipe(self, material: Material) -> str:
        """The hash of everything a class's subgraph and its choice depend on: a finished folder with the same one need
        not be made again."""
        options = self.options
        plans = [asdict(plan) for plan in plan_candidates(options.size, options.format, options.units)]
        data = {use: about.hash for use, about in material.data.items()}
        base = [SCHEMA, self.base.weight_hash, self.base.tokenizer_hash, self.machine.model_dump()]
        prompts = {use: material.prompts[use] for use in CONTINUED}
        parts = [*base, data, prompts, WRITTEN, plans, options.size, options.seed]
        parts += [options.distill] if options.distill else []
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

    def trace_class(self, name: str, material: Material) -> Manifest | None:
        """Make and save the subgraph of a class; None when a finished one is there."""
        recipe = self.recipe(material)
        if self.finished(name, recipe):
            self.say(f"{name}: finished before")
            return None
        some, seed = take_some(material.texts["fit"], SOME_TOKENS), self.options.seed
        own = {use: self.continue_part(material, use, TEMPERATURES) for use in CONTINUED}
        self.rest()
        self.say(f"{name}: scoring units on {count_positions(some)} tokens")
        flow = measure_flow(self.full, take_some(some, FLOW_TOKENS))
        flow = score_units(self.options.units, flow, self.full, some, seed)
        head = rank_head(self.full, some, material.texts["fit"], special_ids(self.checkpoint))
        work = self.options.output / ".work" / f"{name}-{recipe[:16]}"
        tried = self.try_plans(name, flow, head, material, own["choose"], work)
        best = self.pick(name, choose(tried), material, own["choose"], work)
        if self.options.distill:
            best = self.distil(name, best, material, own["choose"], work)
        tried = [best.tried if t.record.plan == best.tried.record.plan else t for t in tried]
        manifest, positions = self.describe(name, material, recipe, best, tried, own)
        saved = save_subgraph(self.options.output / name, manifest, best.subgraph, best.tried.kept, positions)
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # another class's may be in it
            work.parent.rmdir()
        return saved

    def compare_pooled(self, name: str, material: Material) -> Manifest | None:
        """Draft for a class with its own subgraph and with `pooled`'s, and write down whether its own is to be served;
        None where the two were compared before."""
        folder, drafters = self.options.output, []
        manifest, pooled = (read_manifest(folder / each) for each in (name, POOLED))
        if manifest.beside is not None and manifest.beside.pooled == pooled.tensors_hash:
            return None
        texts = self.continue_part(material, "report", (1.0,))
        self.rest()
        for each in (name, POOLED):
            subgraph = load_subgraph(folder / each, self.checkpoint, self.full)
            positions = measure_positions(self.full, subgraph, texts, self.options.seed)
            drafters.append(Drafter(positions, self.costs.c(subgraph)))
        gain, low, high = compare_speedups(drafters[0], drafters[1], self.costs.v, self.options.seed)
        sources = len(drafters[0].positions.sources)
        beside = Beside(pooled=pooled.tensors_hash, gain=gain, interval=(low, high), sources=sources)
        [best] = [c for c in manifest.candidates if c.plan == manifest.plan]
        pays, why = judge(best, manifest.candidates, beside)
        self.say(f"{name}: {why}")
        judged = manifest.model_copy(update={"beside": beside, "pays": pays, "why": why})
        save_manifest(folder / name, judged)
        return judged

    def continue_part(self, material: Material, use: str, temperatures: Sequence[float]) -> list[Continuation]:
        """The prompts of a use, continued by the full model at each temperature."""
        stop, seed = self.checkpoint.stop_ids, self.options.seed
        written = min(WRITTEN, self.full.spec.context - GIVEN if self.full.spec.context > GIVEN else 1)
        return [
            each
            for temperature in temperatures
            for each in continue_prompts(self.runner, material.prompts[use], temperature, written, stop, seed)
        ]

    def list_plans(self, flow: Flow, head: Head) -> list[Plan]:
        """The candidates, fitted to the size that was asked for.

        Raises:
            ValueError: if none fits.
        """
        size = self.options.size
        plans = plan_candidates(size, self.options.format, self.options.units)
        if size is None:
            return plans
        budget = size * self.full_bytes
        fitted = [fit_size(plan, flow, self.full.spec, head.cut(plan.coverage), budget) for plan in plans]
        if not any(fitted):
            raise ValueError(f"size {size} allows {budget / 1e6:.2f} MB per step: too little for attention and head")
        return [plan for plan in fitted if plan is not None]

    def try_plans(
        self, name: str, flow: Flow, head: Head, material: Material, own: Sequence[Continuation], work: Path
    ) -> list[Tried]:
        """Every candidate, measured on the continuations `own`; those that the Pareto front holds are marked."""
        tried: list[Tried] = []
        plans = self.list_plans(flow, head)
        for _, group in groupby(plans, lambda plan: replace(plan, name="", coverage=1.0)):
            some = list(group)
            self.progress(len(tried) / len(plans))
            kept = keep_units(flow, some[0])
            headless = self.build(name, some[0], kept, material, SOME_TOKENS, work)
            heads = [head.cut(plan.coverage) for plan in some]
            records = self.record(some, [cut_head(headless, ids) for ids in heads], own)
            for ids, record in zip(heads, records, strict=True):
                self.say(f"{name}: {tell_candidate(record)}")
                tried.append(Tried(replace(kept, token_ids=ids), record))
        front = find_front([t.record for t in tried])
        return [replace(t, record=t.record.model_copy(update={"best": b})) for t, b in zip(tried, front, strict=True)]

    def pick(self, name: str, tried: Tried, material: Material, own: Sequence[Continuation], work: Path) -> Chosen:
        """A candidate with its subgraph, fitted on all texts, its head too."""
        plan, kept = tried.record.plan, replace(tried.kept, token_ids=None)

        def build(tokens: int) -> Decoder:
            return cut_head(self.build(name, plan, kept, material, tokens, work), tried.kept.token_ids)

        best = Chosen(tried, build(SOME_TOKENS))
        if not plan.repaired:
            return best
        fitted = fit_head(self.full, build(self.options.fit_tokens), material.texts["fit"], self.options.seed)
        return self.better(name, "fitted on all texts", best, replace(best, subgraph=fitted), own)

    def better(self, name: str, how: str, before: Chosen, after: Chosen, own: Sequence[Continuation]) -> Chosen:
        """`after`, measured, or `before` where it is not predicted to be faster."""
        was = before.tried.record
        [record] = self.record([was.plan], [after.subgraph], own)
        self.say(f"{name}: {how}: {tell_candidate(record)}")
        if record.speedup <= was.speedup:
            return before
        return replace(after, tried=replace(before.tried, record=record.model_copy(update={"best": was.best})))

    def build(self, name: str, plan: Plan, kept: Kept, material: Material, tokens: int, work: Path) -> Decoder:
        """A plan's layers, rounded and repaired on about so many tokens, with every head row. What was repaired is kept
        in the folder `work`, so that a trace that was cut off goes on where it was."""
        if not plan.repaired:
            return quantise_decoder(slice_decoder(self.full, kept), plan.format)
        fit, choose = take_some(material.texts["fit"], tokens), material.texts["choose"]
        parts = [plan.attention, plan.mlp, plan.whole, plan.format, count_positions(fit)]
        path = work / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.safetensors"
        if restored := restore_tensors(path, kept, self.full):
            return restored
        self.say(f"{name}: repairing {plan.name} on {count_positions(fit)} tokens")
        repaired = repair(self.full, kept, plan.format, fit, choose, self.options.seed)
        work.mkdir(parents=True, exist_ok=True)
        save_tensors(path, repaired, kept)
        return repaired

    def distil(self, name: str, best: Chosen, material: Material, own: Sequence[Continuation], work: Path) -> Chosen:
        """The chosen subgraph trained for the minutes asked for, on texts to fit and the full model's continuations of
        their prompts; as it was where that did not raise its predicted speedup. Each round is kept in `work`."""
        written = self.continue_part(material, "fit", (1.0,))
        self.rest()
        texts = [*material.texts["fit"], *batch_texts([c.ids for c in written])]
        rounds = max(1, round(self.options.distill / ROUND_MINUTES))
        work.mkdir(parents=True, exist_ok=True)
        subgraph, kept = best.subgraph, best.tried.kept
        for number in range(rounds + 1):
            path = work / f"distilled-{number}.safetensors"
            if not path.exists():
                if number:
                    self.say(f"{name}: distilling, round {number} of {rounds}")
                    seconds = 60 * self.options.distill / rounds
                    subgraph = distill(self.full, subgraph, texts, seconds, self.options.seed + number).subgraph
                save_tensors(path, subgraph, kept)
            restored = restore_tensors(path, kept, self.full)  # holds no inference tensor
            assert restored is not None, "it was just written"
            subgraph = restored
        return self.better(name, "distilled", best, Chosen(best.tried, subgraph, self.options.distill), own)

    def record(
        self, plans: Sequence[Plan], subgraphs: Sequence[Decoder], own: Sequence[Continuation]
    ) -> list[Candidate]:
        """The acceptance of candidates that differ in their heads alone on the full model's own text, and what that is
        predicted to bring."""
        some = [c for c in own if c.temperature in (0.0, 1.0)]
        tables = measure_heads(self.full, subgraphs, some, self.options.seed)
        return [self.price(*each) for each in zip(plans, subgraphs, tables, strict=True)]

    def price(self, plan: Plan, subgraph: Decoder, positions: Positions) -> Candidate:
        """A candidate, by its table."""
        accepted, agreement = (conditional_acceptance(positions.at(t)) for t in (1.0, 0.0))
        c, v = self.costs.c(subgraph), self.costs.v
        speedup, length = predict_speedup(accepted, c, v)
        return Candidate(
            plan=plan,
            bytes_share=subgraph.bytes_per_step / self.full_bytes,
            accepted=accepted,
            agreement=agreement,
            c=c,
            v=v,
            full_ms=self.costs.full_ms,
            speedup=speedup,
            draft_length=length,
            greedy=predict_speedup(agreement, c, v)[0],
            head_rows=subgraph.head.shape[0],
        )

    def describe(
        self,
        name: str,
        material: Material,
        recipe: str,
        best: Chosen,
        tried: Sequence[Tried],
        own: dict[str, list[Continuation]],
    ) -> tuple[Manifest, Positions]:
        """Measure the chosen subgraph on what is to report and write down everything about it."""
        report, subgraph, seed = material.texts["report"], best.subgraph, self.options.seed
        kept, record = best.tried.kept, best.tried.record
        acceptance = measure_acceptance(self.full, subgraph, report, seed)
        chosen_by, reported = (measure_positions(self.full, subgraph, own[use], seed) for use in CONTINUED)
        ids = kept.token_ids
        covered = 1.0 if ids is None else float(measure_mass(self.full, report)[ids].sum())
        pays, why = judge(record, [t.record for t in tried])
        self.say(f"{name}: {why}; accepted {acceptance.mean:.3f} on texts apart")
        manifest = Manifest(
            class_name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            base=self.base,
            seed=seed,
            recipe=recipe,
            data=material.data,
            plan=record.plan,
            why=why,
            pays=pays,
            distilled=best.distilled,
            kept=[_kept_layer(g, n) for g, n in zip(kept.groups, kept.neurons, strict=True)],
            head_rows=subgraph.head.shape[0],
            measured=Measured(
                accepted=list(acceptance.accepted),
                agreement=list(acceptance.agreement),
                positions=acceptance.positions,
                coverage=covered,
                bytes_per_step=subgraph.bytes_per_step,
                bytes_share=record.bytes_share,
                on_policy={f"{t:g}": summarise(chosen_by.at(t), reported.at(t)) for t in TEMPERATURES},
            ),
            candidates=[t.record for t in tried],
            machine=self.machine,
        )
        return manifest, reported


def choose(tried: Sequence[Tried]) -> Tried:
    """The candidate of the highest predicted speedup at temperature 1; of those within a hundredth of it, which is less
    than the prediction is good for, the best greedy one."""
    most = max(t.record.speedup for t in tried)
    return max((t for t in tried if t.record.speedup >= 0.99 * most), key=lambda t: t.record.greedy)


def summarise(chosen_by: Positions, reported: Positions) -> OnPolicy:
    """What the table says of one temperature; confidence is calibrated on the part to choose by."""
    calibrated = calibrate(chosen_by, reported)
    return OnPolicy(
        accepted=conditional_acceptance(reported),
        agreement=share_agreeing(reported),
        tv=float(reported.tv.mean()),
        positions=len(reported),
        curve=calibrated.curve,
        reliability=calibrated.reliability,
        ece=calibrated.ece,
    )


def _kept_layer(groups: Tensor, neurons: Tensor) -> KeptLayer:
    return KeptLayer(groups=groups.tolist(), neurons=len(neurons))


def describe_machine(full: Decoder, runner: Runner) -> Machine:
    """The device, runner and torch that a trace's numbers were measured with."""
    device = full.embed.device
    return Machine(
        device=str(device),
        processor=name_processor(device),
        threads=torch.get_num_threads(),
        runner=runner.name,
        torch=version("torch"),
        isa=runner.isa,
        dtype=str(full.dtype).removeprefix("torch."),
    )


def ignore(share: float) -> None:
    """Progress that nobody follows."""


def trace(options: Options, say: Callable[[str], None] = print, progress: Progress = ignore) -> dict[str, Manifest]:
    """Trace every class and `pooled` into `options.output`, and fit the classifier; the manifests of those newly made.

    Nothing is written before all prompts are read and found fit for use. progress: hears the share that is done of all
    classes and plans.

    Raises:
        BadPrompts, BadCheckpoint, UnsupportedModel: see strace.classes, strace.checkpoint, strace.families.
        ValueError: for a size too small for the model, or costs that cannot be read.
        OSError: something cannot be written; what was is kept, and the same call goes on there.
    """
    projections = [project_table(read_table(path)) for path in options.costs]
    opened = cache(lambda: open_checkpoint(options.model))
    found = find_classes(options, lambda messages: write_chat(opened(), messages))
    checkpoint, classes = opened(), found.classes
    split = split_classes(classes, options.seed)
    materials = {name: _gather(checkpoint, name, parts, options) for name, parts in split.items()}
    for name in classes:
        if long := materials[name].long:
            say(
                f"{name}: {len(long)} prompts are longer than the context of {checkpoint.spec.context}: cut ({long[0]})"
            )
    classifier = make_classifier(checkpoint, {name: split[name] for name in classes}, options.seed)
    dtype = choose_dtype("cpu", runner="torch")  # which computes all but the continuations
    tracer = Tracer(checkpoint, load_decoder(checkpoint, dtype, streamed=True), options, say)
    made = {}
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.classes == AUTO:
            say(
                f"classes {', '.join(classes)} (silhouette {found.silhouette:.2f}), by prompt in "
                f"{save_clusters(options.output, found)}"
            )
        classifier.save(options.output)
        for number, (name, material) in enumerate(materials.items()):
            tracer.progress = partial(_report, progress, number, len(materials))
            made[name] = tracer.trace_class(name, material)
            for projection in projections:
                say(tell_projected(made[name] or read_manifest(options.output / name), projection))
            tracer.progress(1.0)
        for name in classes if len(classes) > 1 else ():  # pooled of one class is that class
            made[name] = tracer.compare_pooled(name, materials[name]) or made[name]
    except OSError as error:
        raise OSError(f"{error}; what is done is kept in {options.output}, the same command goes on there") from error
    return {name: manifest for name, manifest in made.items() if manifest is not None}


def _report(progress: Progress, number: int, classes: int, share: float) -> None:
    progress((number + share) / classes)


def _gather(checkpoint: Checkpoint, name: str, parts: Parts, options: Options) -> Material:
    try:
        return gather_material(checkpoint, parts, options.seed, options.fit_tokens)
    except BadPrompts as error:
        raise BadPrompts(f"class {name}: {error}") from error


def find_classes(options: Options, write_chat: WriteChat) -> Clusters:
    """The classes asked for, read or found.

    Raises:
        BadPrompts: see strace.classes, strace.cluster.
    """
    if options.classes == AUTO:
        if options.prompts is None:
            raise BadPrompts("--classes auto finds classes in the prompts of --prompts; there are none")
        return cluster_prompts(read_log(options.prompts, write_chat), options.clusters, options.seed)
    place = options.prompts or shipped_prompts()
    return Clusters(read_prompts(place, options.classes, options.class_name, write_chat), 1.0)


def make_classifier(checkpoint: Checkpoint, split: Mapping[str, Parts], seed: int) -> Classifier:
    """The classifier of the classes, fitted on what is to fit and to choose by, judged on what is to report; prompts
    that repeat an earlier part's are left out."""
    known, reported = {}, {}
    for name, parts in split.items():
        distinct = drop_repeats(parts).parts
        known[name], reported[name] = (
            [(p.source, checkpoint.tokenizer(p.text, verbose=False)["input_ids"]) for p in prompts]
            for prompts in ([*distinct.fit, *distinct.choose], distinct.report)
        )
    return fit_classifier(
        known,
        reported,
        checkpoint.spec.vocabulary,
        tokenizer_hash=checkpoint.tokenizer_hash,
        ignored=special_ids(checkpoint),
        frame=read_frame(checkpoint),
        seed=seed,
    )
