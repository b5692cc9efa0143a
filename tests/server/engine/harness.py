"""Engines of tiny models, driven step by step in the test's own thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from server.engine.check import Limits
from server.engine.cost import CostModel
from server.engine.engine import Chooser, Engine, Handle
from server.engine.guard import Guard
from server.engine.logprobs import TokenLogprob
from server.engine.observer import Observer
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.certificate import Certificate
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Decoder, Layer
from strace.graphs import make_runner as run_graphs
from strace.runner import FULL, Runner
from strace.sampling import SamplingParams
from tests.tiny import make_tokenizer, save_tiny

VOCABULARY, CONTEXT = 300, 256


@cache
def load(seed: int = 0) -> Decoder:
    with TemporaryDirectory() as folder:
        return load_decoder(open_checkpoint(str(save_tiny(Path(folder), seed=seed))), "fp32")


@cache
def graphs() -> dict[str, Decoder]:
    """The full model, a good draft of it, one that lacks a layer, and a model that has nothing to do with it."""
    full = load()
    lame = replace(full, layers=[full.layers[0], Layer(None, None), full.layers[2]])
    return {FULL: full, "pooled": quantise_decoder(full, "int4"), "lame": lame, "stranger": load(1)}


class FixedCost(CostModel):
    """Costs that live passes do not change; by default drafting always pays."""

    def __init__(self, c: float = 0.01, v8: float = 1.01) -> None:
        super().__init__({FULL: {1: 1.0, 8: v8}, **{g: {1: c, 8: c} for g in ("pooled", "lame", "stranger")}})

    def observe(self, graph: str, passes: Iterable[int], seconds: float) -> None: ...


def make_engine(
    options: Options | None = None,
    *,
    stop_ids: Iterable[int] = (),
    blocks: int = 64,
    cost: CostModel | None = None,
    runner: Runner | None = None,
    drafts: Iterable[str] = ("pooled", "lame", "stranger"),
    observer: Observer | None = None,
    guard: Guard | None = None,
    certificates: Mapping[str, Certificate] | None = None,
    chooser: Chooser | None = None,
) -> Engine:
    """By default no guard: what it decides depends on the time that passes."""
    return Engine(
        runner or make_runner(blocks),
        make_tokenizer().backend_tokenizer,
        stop_ids,
        drafts=drafts,
        limits=Limits(CONTEXT, VOCABULARY),
        cost=cost or FixedCost(),
        observer=observer,
        options=options or Options(seed=0),
        certificates=certificates,
        chooser=chooser,
        guard=guard or Guard(FixedCost().table(FULL), active=False),
    )


def make_runner(blocks: int = 64, kind: str = "torch") -> Runner:
    return run_graphs(graphs(), blocks, kind)


def make_request(
    prompt: list[int] | None = None,
    mode: Mode = Mode.EXACT,
    max_tokens: int = 16,
    stop: tuple[str, ...] = (),
    class_name: str | None = "pooled",
    threshold: float | None = None,
    max_draft: int | None = None,
    **params: float | None,
) -> Request:
    shaped = SamplingParams(**{"temperature": 0.0} | params)
    return Request("r", prompt or [1, 2, 3], shaped, max_tokens, stop, mode, class_name, threshold, max_draft)


@dataclass
class Got:
    """What one request was given.

    unverified: numbers of the tokens delivered before a full pass saw them. complaints: what was wrong with a delivery;
    the engine survives a receiver that raises.
    """

    handle: Handle | None = None
    updates: list[Update] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    unverified: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token for update in self.updates for token in update.ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [told for update in self.updates for told in update.logprobs]

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.updates)

    @property
    def finish(self) -> str | None:
        return self.updates[-1].finish if self.updates else None

    @property
    def ran(self) -> Ran:
        assert self.updates[-1].ran is not None
        return self.updates[-1].ran

    @property
    def outcome(self) -> tuple[list[int], str, str | None]:
        return self.ids, self.text, self.finish

    def receive(self, update: Update | Exception) -> None:
        if isinstance(update, Exception):
            self.errors.append(update)
            return
        if self.finish is not None:
            self.complaints.append("delivered after the end")
        self.updates.append(update)
        sequence = self.handle._sequence
        prompt, last = len(sequence.request.prompt), len(sequence.ids) - 1
        if sequence.verified < last:
            if update.finish is not None:
                self.complaints.append("ended by a token that the full model never saw")
            self.unverified += range(sequence.verified + 1 - prompt, last + 1 - prompt)
        elif sequence.verified > last:
            self.complaints.append("the last token counts as verified")


def submit(engine: Engine, request: Request) -> Got:
    got = Got()
    got.handle = engine.submit(request, got.receive)
    return got


def drain(engine: Engine) -> None:
    for _ in range(2000):
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def decode(engine: Engine, *requests: Request) -> list[Got]:
    """All requests side by side, to their ends; no block may be left behind."""
    got = [submit(engine, request) for request in requests]
    drain(engine)
    assert engine.stats().blocks_used == 0
    assert not any(g.errors or g.complaints for g in got), [(g.errors, g.complaints) for g in got]
    return got


def decode_full(*requests: Request, stop_ids: Iterable[int] = ()) -> list[Got]:
    """What the full model alone makes of the requests."""
    plain = [replace(request, mode=Mode.FULL, class_name=None) for request in requests]
    return decode(make_engine(stop_ids=stop_ids), *plain)
