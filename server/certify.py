"""`strace-llm certify`: what `routed` diverges by at every threshold, run by the engine that serves, and the risks that
follow for each class.

A text is drafted for as long as the limits allow, whatever that costs: no load and no machine can make the engine emit
more unverified, so what is certified does not hang on how fast anything was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.bench import cut_prompt
from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.certificate import Certificate, Level, Setting, Tested, hash_parts
from strace.certify import DELTA, RISKS, bound_mean, choose_threshold, count_certified
from strace.checkpoint import Checkpoint
from strace.classes import BadPrompts, Parts, Prompt, read_prompts, shipped_prompts, split_classes
from strace.costs import name_processor
from strace.duplicates import drop_repeats
from strace.graphs import choose_folder
from strace.losses import THRESHOLDS, Losses
from strace.material import gather_material
from strace.sampling import SamplingParams
from strace.subgraph import Manifest, find_subgraphs, read_manifest
from strace.template import write_chat

SIDE_BY_SIDE = 16
BETWEEN_SAVES = 64  # texts

Progress = Callable[[str, float], None]
"""Hears what is being measured and the share of it that is done."""


@dataclass(frozen=True)
class Asked:
    """What `strace-llm certify` was asked for. classes: only these (empty: all). prompts: a folder of documents that
    tracing has not seen (None: of those shipped, the part that it reports on). seconds: when to stop (None: never)."""

    model: str
    subgraphs: Path | None = None
    prompts: Path | None = None
    classes: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0, 0.0)
    tokens: int = 128
    seconds: float | None = None
    placement: Placement = field(default_factory=Placement)


def certify(asked: Asked, progress: Progress = lambda doing, share: None) -> tuple[dict[str, Certificate], bool]:
    """Measure and certify; writes a table and a certificate of this setting into the folder `routed` of each subgraph.
    What was measured before with the same subgraph, setting and prompts is not measured again.

    Returns the certificates by class, and whether all was measured before time was up.

    Raises:
        ValueError: no subgraphs, a class that has none, prompts that tracing may have seen; and what `build_engine` and
            `read_prompts` raise.
    """
    started = time.monotonic()
    folder = choose_folder(asked.model, asked.subgraphs)
    if folder is None:
        raise ValueError(f"model {asked.model!r} has no subgraphs to certify; name them with --subgraphs")
    options = Options(max_running=SIDE_BY_SIDE, max_waiting=BETWEEN_SAVES, seed=0, draft_length=Options.run_limit)
    engine, checkpoint = build_engine(asked.model, folder, placement=asked.placement, options=options)
    served = [name for name in find_subgraphs(folder) if name in engine.classes]
    if unknown := sorted(set(asked.classes) - set(served)):
        raise ValueError(f"no subgraph is served for class {', '.join(unknown)}; there are {', '.join(served)}")
    room = engine.limits.context - asked.tokens
    if room < 1:
        raise ValueError(f"{asked.tokens} tokens leave no room for a prompt in {engine.limits.context}")
    by_class: dict[str, list[list[int]]] = {name: [] for name in engine.classes}
    for ids in read_documents(checkpoint, asked.prompts, folder, room):
        by_class[engine.choose(ids)].append(ids)
    setting = Setting(engine.runner.name, engine.runner.isa, asked.placement.format)
    names = [name for name in served if name in asked.classes or not asked.classes]
    found, whole = {}, True
    for number, name in enumerate(names):

        def tell(doing: str, share: float, number: int = number) -> None:
            progress(doing, (number + share) / len(names))

        deadline = None if asked.seconds is None else started + asked.seconds
        measuring = Measuring(engine, folder, name, by_class[name], asked, setting, deadline, tell)
        whole &= measuring.run()
        found[name] = measuring.certify()
    return found, whole


def read_documents(checkpoint: Checkpoint, prompts: Path | None, folder: Path, room: int) -> list[list[int]]:
    """One prompt of every source that tracing neither fitted nor chose on, cut as benchmarks cut it, to `room` tokens.

    Raises:
        BadPrompts: see strace.classes.
        ValueError: the shipped prompts were not those of the trace, so that nothing says which it has seen.
    """
    unseen = find_unseen(checkpoint, prompts, folder)
    if not unseen:
        raise ValueError(
            f"the subgraphs in {folder} were not traced on the prompts shipped; name prompts with --prompts that "
            "tracing has not seen"
        )
    documents = []
    for own in unseen.values():
        order = np.random.default_rng(0).permutation(len(own))
        texts = {own[i].source: own[i].text for i in order}
        ids = (list(checkpoint.tokenizer(text, verbose=False)["input_ids"]) for text in texts.values())
        documents += [cut_prompt(some)[:room] for some in ids if some]
    # Bets learn from what they saw before: no class of files shall come first.
    return [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]


def find_unseen(checkpoint: Checkpoint, prompts: Path | None, folder: Path) -> dict[str, list[Prompt]]:
    """Prompts by file. Of a file that its class was traced on (the manifest has the hash), the part that was reported
    on; of another, all that the user names, and none that is shipped."""
    classes = read_prompts(prompts or shipped_prompts(), write_chat=partial(write_chat, checkpoint))
    manifests = {name: read_manifest(path) for name, path in find_subgraphs(folder).items()}
    unseen = {}
    for name, own in classes.items():
        manifest = manifests.get(name)
        parts = None if manifest is None else split_classes(classes, manifest.seed)[name]
        if manifest is not None and parts is not None and _was_traced(checkpoint, parts, manifest):
            unseen[name] = drop_repeats(parts).parts.report
        elif prompts is not None:
            unseen[name] = own
    return unseen


def _was_traced(checkpoint: Checkpoint, parts: Parts, manifest: Manifest) -> bool:
    """Whether a class was traced on these very parts."""
    fitted_on = manifest.data.get("fit")
    try:
        return fitted_on is not None and (
            gather_material(checkpoint, parts, manifest.seed, fitted_on.tokens).data == manifest.data
        )
    except BadPrompts:
        return False


class Measuring:
    """One class: its prompts through the engine at one threshold after the other, and what follows."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        name: str,
        documents: Sequence[list[int]],
        asked: Asked,
        setting: Setting,
        deadline: float | None,
        progress: Progress,
    ) -> None:
        """deadline: of the monotonic clock."""
        self.engine, self.folder, self.name, self.documents = engine, folder, name, documents
        self.asked, self.setting, self.deadline, self.progress = asked, setting, deadline, progress
        self.hashes = hash_parts(folder, name)
        parts = [self.hashes["subgraph"], vars(setting), asked.tokens, engine.options.run_limit, list(documents)]
        self.table = setting.path(folder / name).with_suffix(".safetensors")
        self.losses = _read_losses(self.table, hashlib.sha256(json.dumps(parts).encode()).hexdigest())

    def run(self) -> bool:
        """Measure what is missing; False if time was up before that."""
        columns = [(t, threshold) for t in self.asked.temperatures for threshold in THRESHOLDS]
        for number, (temperature, threshold) in enumerate(columns):
            if self._settled(temperature):
                continue
            self.progress(f"{self.name}, T {temperature:g}, threshold {threshold:g}", number / len(columns))
            if not self._measure(temperature, threshold):
                return False
        return True

    def _settled(self, temperature: float) -> bool:
        """Whether every risk has met a threshold that fails, so that no looser one is looked at."""
        thresholds = self.losses.measured(temperature, len(self.documents))
        if not thresholds:
            return False
        losses = self.losses.matrix(temperature, thresholds)
        return all(count_certified(losses, risk) < len(thresholds) for risk in RISKS)

    def _measure(self, temperature: float, threshold: float) -> bool:
        done = set(self.losses.at(temperature, threshold).document.tolist())
        left = [i for i in range(len(self.documents)) if i not in done]
        for first in range(0, len(left), BETWEEN_SAVES):
            if self.deadline is not None and time.monotonic() > self.deadline:
                return False
            some = left[first : first + BETWEEN_SAVES]
            params = SamplingParams(temperature)
            requests = [
                Request(f"{i}", self.documents[i], params, self.asked.tokens, mode=Mode.ROUTED, threshold=threshold)
                for i in some
            ]
            for i, ran in zip(some, run_texts(self.engine, requests), strict=True):
                self.losses.add(i, temperature, threshold, ran.tokens, ran.unverified, ran.divergent)
            self.losses.save(self.table)
        return True

    def certify(self) -> Certificate:
        """What was measured so far as a certificate, written beside the subgraph."""
        n, levels, tested = len(self.documents), [], []
        for temperature in self.asked.temperatures:
            thresholds = self.losses.measured(temperature, n)
            losses = self.losses.matrix(temperature, thresholds) if thresholds else np.zeros((n, 0))
            for risk in RISKS:
                choice = choose_threshold(losses, thresholds, risk)
                chosen = {"threshold": choice.threshold, "why": choice.why}
                levels.append(Level(temperature=temperature, risk=risk, delta=DELTA, **chosen))
            tested += [self._describe(temperature, threshold) for threshold in thresholds if n]
        certificate = Certificate(
            class_name=self.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **self.hashes,
            **vars(self.setting),
            processor=name_processor(self.asked.placement.device),
            tokens=self.asked.tokens,
            run_limit=self.engine.options.run_limit,
            prompts=n,
            levels=levels,
            tested=tested,
        )
        certificate.save(self.folder / self.name)
        return certificate

    def _describe(self, temperature: float, threshold: float) -> Tested:
        rows = self.losses.at(temperature, threshold)
        return Tested(
            temperature=temperature,
            threshold=threshold,
            documents=len(rows.document),
            divergence=float(rows.loss.mean()),
            bound=bound_mean(rows.loss),
            unverified=float(rows.unverified.sum() / rows.emitted.sum()),
        )


def _read_losses(path: Path, key: str) -> Losses:
    """The table to go on with; an empty one where there is none of the same key."""
    try:
        losses = Losses.load(path)
    except ValueError:
        return Losses(key)
    return losses if losses.key == key else Losses(key)


def run_texts(engine: Engine, requests: Sequence[Request]) -> list[Ran]:
    """Decode texts side by side in this thread; what ran for each."""
    rans: dict[int, Ran] = {}

    def submit(number: int, request: Request) -> None:
        def deliver(update: Update | Exception) -> None:
            if isinstance(update, Update) and update.ran is not None:
                rans[number] = update.ran

        engine.submit(request, deliver)

    for number, request in enumerate(requests):
        submit(number, request)
    while engine.stats().running or engine.stats().waiting:
        engine.step()
    if len(rans) < len(requests):
        raise ValueError(f"{len(requests) - len(rans)} texts failed; the log says why")
    return [rans[number] for number in range(len(requests))]


def show(certificates: Mapping[str, Certificate], console: Console) -> None:
    """The certified risks as a table, and why the others are not."""
    table = Table("class", "T", "risk", "threshold", "why", box=SIMPLE, title=f"With {1 - DELTA:.0%} confidence")
    for name, certificate in certificates.items():
        for level in certificate.levels:
            threshold = "exact" if level.threshold is None else f"{level.threshold:g}"
            table.add_row(name, f"{level.temperature:g}", f"{level.risk:g}", threshold, Text(level.why))
    console.print(table)
