"""The decode engine: one thread, one loop of admit, draft, full pass, settle, deliver.

Every step ends in one full-model pass over all texts it works on: a chunk of a prompt for some, for the others the last
token with the drafts of this step. Between steps a text is therefore either still being read or verified up to its last
token. Which texts a step works on is the scheduler's to say; its passes are the cycle's.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from server.engine.auditor import Auditor
from server.engine.blocks import BlockPool, blocks_for
from server.engine.check import Limits, check
from server.engine.cost import CostModel
from server.engine.cycle import Cycle, Passed
from server.engine.faults import lacks_memory
from server.engine.guard import Guard
from server.engine.observer import Nobody, Observer, Step
from server.engine.options import Options
from server.engine.request import Deliver, Mode, Ran, Refused, Request, Unavailable
from server.engine.risk import Gate, Promises
from server.engine.scheduler import Plan, Scheduler
from server.engine.sequence import Sequence, Shadow, Times
from server.engine.speculation import Speculation
from server.engine.text import Text
from server.engine.worker import Worker
from strace.certificate import Certificate
from strace.classes import POOLED
from strace.kv import Batch
from strace.runner import FULL, Runner
from strace.sampling import Noise

logger = logging.getLogger(__name__)


class StepFailed(RuntimeError):
    """The engine could not go on with a request; the message gives the reason."""


class Chooser(Protocol):
    """Picks the class of a prompt."""

    def choose(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Drafts:
    """What an engine drafts with: a runner over the engine's cache with the same full model, its graphs that can draft,
    what they cost, and the rest as `Engine` takes it."""

    runner: Runner
    classes: tuple[str, ...]
    cost: CostModel
    chooser: Chooser | None
    unpaying: Mapping[str, str]
    certificates: Mapping[str, Certificate] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """The engine at one moment; blocks are those of the KV cache."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int


class Handle:
    """The caller's end of a submitted request."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence

    @property
    def ran(self) -> Ran:
        """The accounts so far: mode and class are settled, the counts grow."""
        return self._sequence.ran

    def cancel(self) -> None:
        """Give the request up: nothing more is delivered and its blocks are freed before the next step."""
        self._engine.cancel(self._sequence)


class Engine:
    """Decodes many texts at once, in any mode, over one cache.

    drafts: names of the runner's graphs that can draft, `pooled` among them if there are any. unpaying: classes that
    requests may name although no subgraph pays for them, and why not; `pooled` drafts for them.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        *,
        drafts: Iterable[str],
        limits: Limits,
        cost: CostModel,
        chooser: Chooser | None = None,
        unpaying: Mapping[str, str] | None = None,
        observer: Observer | None = None,
        options: Options | None = None,
        worker: Worker | None = None,
        guard: Guard | None = None,
        certificates: Mapping[str, Certificate] | None = None,
    ) -> None:
        self.options = options or Options()
        self.limits = limits
        self.classes = tuple(drafts)
        self.unpaying = dict(unpaying or {})
        self.observer: Observer = observer or Nobody()
        self.scheduler = Scheduler(BlockPool(runner.cache.blocks), self.options)
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self.guard = guard or Guard(cost.table(FULL), active=self.options.draft_length is None)
        self.auditor = Auditor()
        self.cycle = self._make_cycle(runner, cost)
        self._chooser = chooser
        self._promises = Promises(certificates or {}, self.options.risk)
        self._seeds = random.Random(self.options.seed) if self.options.seed is not None else random.SystemRandom()
        self._wake = threading.Condition()
        self._stopping = self._draining = self._abandoned = False
        self._next: tuple[Drafts, Future[None]] | None = None
        self._busy_since: float | None = None
        self._worker = worker or Worker()
        self._loop_done: Future[None] | None = None
        self._marked: float | None = None
        self._proven = False

    def _make_cycle(self, runner: Runner, cost: CostModel) -> Cycle:
        always = self.options.draft_length is not None
        speculation = Speculation(cost, self.classes, self._stop_ids, always)
        return Cycle(runner, cost, speculation, self.guard, self.options)

    @property
    def runner(self) -> Runner:
        return self.cycle.runner

    @property
    def cost(self) -> CostModel:
        return self.cycle.cost

    @property
    def speculation(self) -> Speculation:
        return self.cycle.speculation

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    # Called from any thread.

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Queue a request; `deliver` gets its updates, or the exception that ended it, in the engine's thread.

        Raises:
            Refused: naming the field at fault.
            Overloaded: if the queue is full.
            Unavailable: if no requests are taken any more.
        """
        check(request, self.limits, self._stop_ids, self.pool)
        mode, class_name, gate, bypass = self._resolve(request)
        tripped = self.auditor.tripped(class_name) if mode == Mode.ROUTED else None
        if tripped is not None:
            mode, bypass = Mode.EXACT, tripped
        seed = request.params.seed
        noise = Noise(seed, shared=True) if seed is not None else Noise(self._seeds.getrandbits(64), shared=False)
        stop_ids = (frozenset() if request.ignore_eos else self._stop_ids) | frozenset(request.stop_ids)
        sequence = Sequence(
            request,
            noise,
            Text(self._tokenizer, request.prompt, request.stop, request.specials, request.min_tokens),
            stop_ids,
            Ran(mode, class_name, len(request.prompt), bypass=bypass, risk=None if tripped else gate.risk),
            deliver,
            Times(time.monotonic()),
            gate,
            np.zeros(blocks_for(self.limits.context), dtype=np.int64),
            Shadow() if tripped is not None else None,
            None if request.grammar is None else request.grammar.begin(stop_ids, request.min_tokens),
        )
        with self._wake:
            if self._stopping:
                raise Unavailable("the engine is stopping")
            if self._draining:
                raise Unavailable("the server is shutting down")
            self._adapt(sequence)
            self.scheduler.add(sequence)
            self._wake.notify()
        return Handle(self, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """See `Handle.cancel`."""
        with self._wake:
            sequence.cancelled = True
            self._wake.notify()

    def start(self) -> None:
        """Start the loop in the worker's thread."""
        self._loop_done = self._worker.submit(self._loop)

    def drain(self) -> None:
        """Take no more requests; those there are go on."""
        with self._wake:
            self._draining = True

    def stop(self) -> None:
        """Let the step in progress end, fail what is left, and wait for the loop to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._loop_done is None:
            self._close()
        elif not self._abandoned:
            wait([self._loop_done])

    def abandon(self, reason: str) -> None:
        """Fail what there is, and take no more requests, without the engine's thread, which is stuck or gone: whatever
        it still does reaches nobody."""
        self._abandoned = True
        self._close(reason)

    def swap(self, drafts: Drafts) -> Future[None]:
        """Draft with others from the next step on. What runs goes on; a text whose class is gone, with `pooled`."""
        done: Future[None] = Future()
        with self._wake:
            self._next = drafts, done
            self._wake.notify()
        return done

    @property
    def running(self) -> bool:
        """Whether requests are taken and worked on."""
        working = self._loop_done is not None and not self._loop_done.done()
        return working and not (self._stopping or self._draining)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    @property
    def busy_seconds(self) -> float:
        """How long the step in progress has taken; 0 while there is none."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def death(self) -> str | None:
        """Why its thread has ended without being told to, if it has."""
        if self._loop_done is None or not self._loop_done.done() or (error := self._loop_done.exception()) is None:
            return None
        return f"{type(error).__name__}: {error}"

    @property
    def ready(self) -> bool:
        """Whether it is running and the model has really produced a token."""
        return self.running and self._proven

    def stats(self) -> Stats:
        """How busy the engine is right now."""
        return Stats(len(self.scheduler.running), len(self.scheduler.waiting), self.pool.used, self.pool.total)

    def choose(self, prompt: list[int]) -> str:
        """The class whose subgraph drafts for a prompt that names none."""
        chosen = self._chooser.choose(prompt) if self._chooser else POOLED
        return chosen if chosen in self.classes else POOLED

    def _resolve(self, request: Request) -> tuple[Mode, str, Gate, str | None]:
        """Mode, class and gate that a request runs with, and why it does without what it asked for, if so."""
        name, passed = request.class_name, None
        if name in self.unpaying:
            name, passed = POOLED, f"class {name}: {self.unpaying[name]}; pooled drafts"
        if name is not None and name not in self.classes:
            known = ", ".join((*self.classes, *self.unpaying)) or "none: no subgraph is loaded"
            raise Refused(f"unknown class {name!r}; known are {known}", "class")
        if name is None:
            name = self.choose(request.prompt)
        if request.max_tokens == 0:
            return Mode.FULL, name, Gate(), "nothing is to be generated"
        if request.mode == Mode.FULL:
            return Mode.FULL, name, Gate(), passed
        if not self.classes:
            if request.mode != Mode.AUTO:
                raise Refused(f"mode {request.mode.value!r} needs a draft and none is loaded", "mode")
            return Mode.FULL, name, Gate(), "no draft is loaded"
        mode = self.options.auto if request.mode == Mode.AUTO else request.mode
        gate = self._promises.open(request, name, self.choose) if mode == Mode.ROUTED else Gate()
        mode = Mode.EXACT if gate.shut else mode
        return mode, name, gate, "max_draft is 0" if request.max_draft == 0 else gate.shut or passed

    # Called in the engine's thread only.

    def _loop(self) -> None:
        try:
            self._busy_since = time.monotonic()
            self._prove()
            while self._await_work():
                self.step()
        except BaseException:
            logger.exception("the engine's loop died")
            raise
        finally:
            self._busy_since = None
            self._close()

    def _await_work(self) -> bool:
        """Wait for something to do; False if it is to stop."""
        self._busy_since = None
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._next or not self.idle)
        self._busy_since = time.monotonic()
        return not self._stopping

    @torch.inference_mode()
    def _prove(self) -> None:
        """Produce one token: that a thread runs is no sign that the model does.

        Raises:
            RuntimeError: its logits are no numbers.
        """
        blocks = self.pool.take(1) or []
        batch = Batch([0], [1], [0], torch.tensor([blocks]))
        finite = bool(self.runner.forward(FULL, batch, [0]).isfinite().all())
        self.pool.give_back(blocks)
        if not finite:
            raise RuntimeError("the model's logits are not finite")
        self._proven = True

    def _close(self, reason: str = "the engine was stopped") -> None:
        """Take no more requests, and end those there are: nobody shall wait for a thread that is gone."""
        with self._wake:
            self._stopping = True
            left = [*self.scheduler.running, *self.scheduler.waiting]
        self._end(left, Unavailable(reason))

    def step(self) -> None:
        """One turn. A failure ends the requests it struck, with an error delivered to each, and no other."""
        if self._next is not None:
            self._take_drafts()
        with self._wake:
            given_up = self.scheduler.cancelled()
        for sequence in given_up:
            self._release(sequence, "cancelled")
        struck = list(self.scheduler.running)
        try:
            with self._wake:
                self.scheduler.admit()
                plan = self.scheduler.plan()
            struck = plan.sequences
            if struck:
                self._marked = self._marked or time.perf_counter()
                self._decode(plan)
        except Exception as error:
            logger.exception("a step failed; its %d requests are given up", len(struck))
            self._fail(struck, error)
        if not self.scheduler.running:
            self._marked = None

    def _take_drafts(self) -> None:
        """Take over what `swap` brought."""
        with self._wake:
            assert self._next is not None
            (drafts, done), self._next = self._next, None
            self.classes, self.unpaying, self._chooser = drafts.classes, dict(drafts.unpaying), drafts.chooser
            self._promises = Promises(drafts.certificates, self.options.risk)
            self.guard.forget()
            self.cycle = self._make_cycle(drafts.runner, drafts.cost)
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                self._adapt(sequence)
        done.set_result(None)

    def _adapt(self, sequence: Sequence) -> None:
        """Let a text whose class is gone go on with `pooled`, or without drafts: verified in any case, for nothing was
        promised of `pooled` when it began. What was promised of drafts that are gone is kept by verifying the rest."""
        ran, gate = sequence.ran, sequence.gate
        if gate.risk is not None and not self._promises.stands(gate, ran.class_name):
            sequence.gate = replace(gate, tokens=0)
        if ran.class_name not in self.classes:
            ran.class_name, sequence.shadow = POOLED, None
            ran.mode = Mode.FULL if not self.classes or ran.mode == Mode.FULL else Mode.EXACT

    def _decode(self, plan: Plan) -> None:
        before = {s: s.ran.tokens for s in plan.sequences}
        try:
            self.cycle.draft(plan)
        except Exception as error:
            self._shed(plan, error)  # those that are left go on without a draft
        drafted = [sequence for sequence in plan.decoding if sequence.draft.tokens]
        for sequence in drafted:
            if sequence.emitted:
                self._deliver(sequence)
        passed = self._full_pass(plan)
        for sequence, failure in self.cycle.settle(passed, plan).items():
            (self._end if isinstance(failure, Refused) else self._fail)([sequence], failure)
            plan.drop(sequence)
        self._account(before, plan, not drafted, time.perf_counter())
        for sequence in plan.sequences:
            self.scheduler.seal(sequence)
            self._deliver(sequence)

    def _full_pass(self, plan: Plan) -> Passed:
        """The cycle's, of as many texts as there is memory for."""
        while plan.decoding or plan.chunks:
            try:
                return self.cycle.full_pass(plan)
            except Exception as error:
                self._shed(plan, error)
        return Passed({})

    def _account(self, before: dict[Sequence, int], plan: Plan, plain: bool, ended: float) -> None:
        """Book the step. before: tokens of each text before it."""
        seconds, self._marked = ended - (self._marked or ended), ended
        if not plan.chunks:
            self.cycle.account(before, seconds, plain)
        tokens = sum(s.ran.tokens - n for s, n in before.items())
        spent, chunks = self.cycle.spent, sum(plan.chunks.values())
        self.observer.on_step(Step(seconds, len(plan.decoding), chunks, tokens, spent.seconds, spent.passes))

    def _deliver(self, sequence: Sequence) -> None:
        """Hand on what is new. A receiver that fails has given its request up."""
        if sequence.cancelled or sequence.times.finished is not None or (update := sequence.take_update()) is None:
            return
        sequence.times.updates.append(time.monotonic())
        if update.finish:
            self._release(sequence, update.finish)
        try:
            sequence.deliver(update)
        except Exception:
            logger.exception("request %s: its receiver failed", sequence.request.id)
            sequence.cancelled = True

    def _shed(self, plan: Plan, error: Exception) -> None:
        """End the younger half of what runs if memory has run out: the others may then go on. Raises any other
        error."""
        if not lacks_memory(error):
            raise error
        running = self.scheduler.running
        younger = running[len(running) // 2 :]
        logger.error("out of memory, %d of %d requests are given up: %s", len(younger), len(running), error)
        self._end(younger, Unavailable("out of memory; the request was given up so that others could go on"))
        for sequence in younger:
            plan.drop(sequence)

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        failure = StepFailed(f"decoding failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._end(sequences, failure)

    def _end(self, sequences: Iterable[Sequence], failure: Exception) -> None:
        """End requests before their time."""
        for sequence in sequences:
            if sequence.times.finished is None:
                self._release(sequence, "cancelled" if sequence.cancelled else "error")
                if sequence.cancelled:
                    continue
                try:
                    sequence.deliver(failure)
                except Exception:
                    logger.exception("request %s: its receiver failed", sequence.request.id)

    def _release(self, sequence: Sequence, outcome: str) -> None:
        """Take a text out of the engine and free its blocks at once."""
        with self._wake:
            self.scheduler.remove(sequence)
        sequence.times.finished = time.monotonic()
        ran = sequence.ran
        if ran.mode != Mode.FULL and not ran.drafts and ran.bypass is None:
            ran.bypass = "drafting did not pay"
        if outcome != "error":  # which leaves tokens that no full pass has judged
            self._audit(sequence)
        self.observer.on_finish(ran, sequence.times, outcome)

    def _audit(self, sequence: Sequence) -> None:
        """Tell the auditor of a request that was promised something: one with a threshold of its own was not. One whose
        gate was never open says nothing."""
        ran, shadow, risk = sequence.ran, sequence.shadow, sequence.gate.risk
        if risk is None:
            return
        if sequence.opened and ran.tokens:
            self.auditor.observe(ran.class_name, ran.divergent / ran.tokens, risk)
        elif shadow is not None and shadow.judged:
            self.auditor.observe_shadow(ran.class_name, shadow.divergent / shadow.judged, risk)
