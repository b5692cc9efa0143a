"""The decode engine: one thread, one loop of admit, draft, full pass, settle, deliver.

Every step ends in one full-model pass over all running texts: a chunk of a prompt for some, for the others the last
token with the drafts of this step. Between steps a text is therefore either still being read or verified up to its last
token.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from server.engine.blocks import BlockPool, blocks_for
from server.engine.cost import CostModel
from server.engine.observer import Nobody, Observer, Step
from server.engine.options import Options
from server.engine.request import Deliver, Mode, Overloaded, Ran, Refused, Request
from server.engine.sequence import Sequence, Times
from server.engine.settle import settle
from server.engine.speculation import Speculation
from server.engine.text import Text
from server.engine.worker import Worker
from strace.classes import POOLED
from strace.draft import DraftLimits, DraftPlan, GainRule, count_alive
from strace.kv import Batch
from strace.runner import FULL, Runner
from strace.sampling import Noise

logger = logging.getLogger(__name__)
PROBE = 4  # drafts of a probe


class StepFailed(RuntimeError):
    """The engine could not go on with a request; the message gives the reason."""


class Chooser(Protocol):
    """Picks the class of a prompt."""

    def choose(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Limits:
    """What the model can take: tokens of prompt and continuation together, and token ids."""

    context: int
    vocabulary: int


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

    drafts: names of the runner's graphs that can draft, `pooled` among them if there are any.
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
        observer: Observer | None = None,
        options: Options | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.options = options or Options()
        self.limits = limits
        self.classes = tuple(drafts)
        self.cost = cost
        self.observer: Observer = observer or Nobody()
        self.pool = BlockPool(runner.cache.blocks)
        self.runner, self._tokenizer, self._stop_ids = runner, tokenizer, frozenset(stop_ids)
        always = self.options.draft_length is not None
        self.speculation = Speculation(cost, self.classes, self._stop_ids, always)
        self._chooser = chooser
        self._seeds = random.Random(self.options.seed) if self.options.seed is not None else random.SystemRandom()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._worker = worker or Worker()
        self._loop_done: Future[None] | None = None
        self._marked: float | None = None
        self._proven = False

    # Called from any thread.

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Queue a request; `deliver` gets its updates, or the exception that ended it, in the engine's thread.

        Raises:
            Refused: naming the field at fault.
            Overloaded: if the queue is full.
        """
        self._check(request)
        mode, class_name, bypass = self._resolve(request)
        seed = request.params.seed
        noise = Noise(seed, shared=True) if seed is not None else Noise(self._seeds.getrandbits(64), shared=False)
        sequence = Sequence(
            request,
            noise,
            Text(self._tokenizer, request.prompt, request.stop, request.specials),
            (frozenset() if request.ignore_eos else self._stop_ids) | frozenset(request.stop_ids),
            Ran(mode, class_name, len(request.prompt), bypass=bypass),
            deliver,
            Times(time.monotonic()),
            self.options.threshold if request.threshold is None else request.threshold,
        )
        with self._wake:
            if self._stopping:
                raise Overloaded("the engine is stopping")
            if len(self._waiting) >= self.options.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(sequence)
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

    def stop(self) -> None:
        """Let the step in progress end, fail what is left, and wait for the loop to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._loop_done is None:
            self._close()
        else:
            wait([self._loop_done])

    @property
    def running(self) -> bool:
        """Whether requests are taken and worked on."""
        return self._loop_done is not None and not self._loop_done.done() and not self._stopping

    @property
    def ready(self) -> bool:
        """Whether it is running and the model has really produced a token."""
        return self.running and self._proven

    def stats(self) -> Stats:
        """How busy the engine is right now."""
        return Stats(len(self._running), len(self._waiting), self.pool.used, self.pool.total)

    def _resolve(self, request: Request) -> tuple[Mode, str, str | None]:
        """Mode and class that a request runs with, and why it does without drafts, if so."""
        name = request.class_name
        if name is not None and name not in self.classes:
            known = ", ".join(self.classes) or "none: no subgraph is loaded"
            raise Refused(f"unknown class {name!r}; known are {known}", "class")
        if name is None:
            chosen = self._chooser.choose(request.prompt) if self._chooser else POOLED
            name = chosen if chosen in self.classes else POOLED
        if request.mode == Mode.FULL:
            return Mode.FULL, name, None
        if not self.classes:
            if request.mode != Mode.AUTO:
                raise Refused(f"mode {request.mode.value!r} needs a draft and none is loaded", "mode")
            return Mode.FULL, name, "no draft is loaded"
        mode = self.options.auto if request.mode == Mode.AUTO else request.mode
        if mode == Mode.ROUTED and request.logprobs is not None:
            mode = Mode.EXACT  # they are the full model's, which has not seen what is emitted unverified
        return mode, name, "max_draft is 0" if request.max_draft == 0 else None

    def _check(self, request: Request) -> None:
        tokens = len(request.prompt) + request.max_tokens
        if not request.prompt:
            raise Refused("the prompt is empty", "prompt")
        if not all(0 <= token < self.limits.vocabulary for token in request.prompt):
            raise Refused(f"the prompt has token ids outside 0..{self.limits.vocabulary - 1}", "prompt")
        if request.max_tokens < 1:
            raise Refused(f"max_tokens must be at least 1, got {request.max_tokens}", "max_tokens")
        for name, ids in (
            ("logit_bias", [id for id, _ in request.params.logit_bias]),
            ("stop_token_ids", request.stop_ids),
        ):
            if not all(0 <= id < self.limits.vocabulary for id in ids):
                raise Refused(f"{name} has token ids outside 0..{self.limits.vocabulary - 1}", name)
        if request.min_tokens and len(self._stop_ids.union(request.stop_ids)) >= self.limits.vocabulary:
            raise Refused("min_tokens: every token would end the text", "min_tokens")
        if not 0 <= request.min_tokens <= request.max_tokens:
            raise Refused(f"min_tokens must be at most max_tokens ({request.max_tokens})", "min_tokens")
        if request.max_draft is not None and request.max_draft < 0:
            raise Refused(f"max_draft must not be negative, got {request.max_draft}", "max_draft")
        if "" in request.stop:
            raise Refused("a stop string is empty", "stop")
        if len(request.prompt) >= self.limits.context:
            raise Refused(
                f"the prompt has {len(request.prompt)} tokens, the model's context {self.limits.context}", "prompt"
            )
        if tokens > self.limits.context:
            raise Refused(
                f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens}) exceed the model's context of "
                f"{self.limits.context} tokens",
                "max_tokens",
            )
        if not self.pool.fits(tokens):
            raise Refused(f"{tokens} tokens do not fit the KV cache of {self.pool.total} blocks", "max_tokens")

    # Called in the engine's thread only.

    def _loop(self) -> None:
        try:
            self._prove()
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or self._waiting or self._running)
                    if self._stopping:
                        return
                self.step()
        except BaseException:
            logger.exception("the engine's loop died")
            raise
        finally:
            self._close()

    @torch.inference_mode()
    def _prove(self) -> None:
        """Produce one token: that a thread runs is no sign that the model does.

        Raises:
            RuntimeError: its logits are no numbers.
        """
        blocks = self.pool.take(1) or []
        batch = Batch(torch.zeros(1, dtype=torch.int64), [1], [0], torch.tensor([blocks]))
        finite = bool(self.runner.forward(FULL, batch, [0]).isfinite().all())
        self.pool.give_back(blocks)
        if not finite:
            raise RuntimeError("the model's logits are not finite")
        self._proven = True

    def _close(self) -> None:
        """Take no more requests, and end those there are: nobody shall wait for a thread that is gone."""
        with self._wake:
            self._stopping = True
            left, self._waiting = [*self._running, *self._waiting], deque()
        self._fail(left, RuntimeError("the engine was stopped"))

    @torch.inference_mode()
    def step(self) -> None:
        """One turn. A failure ends the requests it struck, with an error delivered to each, and no other."""
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return
        running = list(self._running)
        try:
            self._decode(running)
        except Exception as error:
            logger.exception("a step failed; its %d requests are given up", len(running))
            self._fail(running, error)
        if not self._running:
            self._marked = None

    def _drop_cancelled(self) -> None:
        with self._wake:
            given_up = [s for s in (*self._running, *self._waiting) if s.cancelled]
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
        for sequence in given_up:
            self._release(sequence, "cancelled")

    def _admit(self) -> None:
        """Let waiting requests in, in order, while there is a place and memory for all that they may become."""
        while len(self._running) < self.options.max_running:
            with self._wake:
                if not self._waiting or (blocks := self.pool.take(self._waiting[0].most_tokens)) is None:
                    return
                sequence = self._waiting.popleft()
                self._running.append(sequence)
            sequence.blocks = blocks
            sequence.table = torch.zeros(blocks_for(self.limits.context), dtype=torch.int64)
            sequence.table[: len(blocks)] = torch.tensor(blocks)
            sequence.times.admitted = time.monotonic()
            if self._marked is None:
                self._marked = time.perf_counter()

    def _decode(self, running: list[Sequence]) -> None:
        decoding = [s for s in running if not s.prefilling]
        chunks = self._chunks([s for s in running if s.prefilling])
        before = {s: s.ran.tokens for s in running}
        self._draft(decoding, len(decoding) + sum(chunks.values()))
        plain = not any(s.draft.tokens for s in decoding)
        for sequence in decoding:
            self._deliver(sequence)
        begun = time.perf_counter()
        logits = self._full_pass(decoding, chunks)
        self._settle(logits, chunks)
        ended = time.perf_counter()
        seconds, self._marked = ended - (self._marked or begun), ended
        if not chunks:
            self.cost.observe(FULL, [sum(map(len, logits.values()))], ended - begun)
            self._account(before, seconds, plain)
        tokens = sum(s.ran.tokens - n for s, n in before.items())
        self.observer.on_step(Step(seconds, len(decoding), sum(chunks.values()), tokens))
        for sequence in running:
            self._deliver(sequence)

    def _chunks(self, prefilling: list[Sequence]) -> dict[Sequence, int]:
        """How many prompt tokens each sequence reads in this step; older ones first."""
        chunks, left = {}, self.options.chunk
        for sequence in prefilling:
            if left > 0:
                chunks[sequence] = min(left, len(sequence.ids) - sequence.verified)
                left -= chunks[sequence]
        return chunks

    def _draft(self, decoding: list[Sequence], planned: int) -> None:
        """Draw drafts, batched per subgraph, where they pay. planned: tokens of the coming full pass without them."""
        by_graph: dict[str, list[Sequence]] = {}
        for sequence in decoding:
            if sequence.ran.mode != Mode.FULL:
                by_graph.setdefault(sequence.ran.class_name, []).append(sequence)
        for graph, sequences in by_graph.items():
            rule = self.speculation.rule(graph, planned, len(decoding))
            rule, limits = self._choose_drafting(rule, {s: s.limits(self.options) for s in sequences})
            if limits:
                plan = DraftPlan([s.sampler() for s in limits], list(limits.values()), rule)
                planned += self._draft_with(graph, plan, list(limits))

    def _choose_drafting(
        self, rule: GainRule, limits: dict[Sequence, DraftLimits]
    ) -> tuple[GainRule, dict[Sequence, DraftLimits]]:
        """The sequences of one graph that shall draw, and the rule they draw by. Where none does, now and then all of
        them probe: several drafts each, because the cost of a lone one would be mostly that of the call."""
        able = {s: limit for s, limit in limits.items() if limit.left() > 0}
        paying = {s: limit for s, limit in able.items() if rule.pays(1.0, len(able), 0, limit.left())}
        if paying or not able or not self.speculation.probes():
            return rule, paying
        probing = {
            s: replace(limit, held=min(PROBE, limit.held), emitted=min(PROBE, limit.emitted))
            for s, limit in able.items()
        }
        return replace(rule, always=True), probing

    def _draft_with(self, graph: str, plan: DraftPlan, sequences: list[Sequence]) -> int:
        """Draw and book the drafts of one graph; how many tokens they add to the full pass."""
        begun = time.perf_counter()
        drafts = self.runner.draft(graph, _batch({s: s.ids[s.verified :] for s in sequences}), plan)
        alive = count_alive(drafts)
        self.cost.observe(graph, alive, time.perf_counter() - begun)
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.book(draft)
        return sum(alive)

    def _full_pass(self, decoding: list[Sequence], chunks: dict[Sequence, int]) -> dict[Sequence, Tensor]:
        """One full-model pass over everything; the rows [n, V] that each text needs to go on, none inside a prompt."""
        tokens = {s: s.ids[s.verified :] + s.held for s in decoding}
        wanted = {s: len(tokens[s]) for s in decoding}
        for sequence, count in chunks.items():
            tokens[sequence] = sequence.ids[sequence.verified : sequence.verified + count]
            whole = sequence.request.prompt_logprobs
            wanted[sequence] = count if whole else int(sequence.verified + count == len(sequence.ids))
        rows: list[int] = []
        end = 0
        for sequence, block in tokens.items():
            end += len(block)
            rows += range(end - wanted[sequence], end)
        logits = self.runner.forward(FULL, _batch(tokens), rows).split(list(wanted.values()))
        return {s: part for s, part in zip(tokens, logits, strict=True) if len(part)}

    def _settle(self, logits: dict[Sequence, Tensor], chunks: dict[Sequence, int]) -> None:
        for sequence, count in chunks.items():
            if sequence.request.prompt_logprobs:
                logits[sequence] = sequence.read_prompt(logits[sequence])
            sequence.verified += count
        for sequence, rows in logits.items():
            if not len(rows):
                continue
            try:
                judged = settle(sequence, rows, self.runner)
            except Exception as error:
                logger.exception("request %s failed", sequence.request.id)
                self._fail([sequence], error)
                continue
            for confidence, share in judged:
                self.speculation.calibrations[sequence.ran.class_name].judge(confidence, share)

    def _account(self, before: dict[Sequence, int], seconds: float, plain: bool) -> None:
        """Book the time of a step that read no prompts, and what the full model would have needed for its tokens.

        A plain step, without drafts, is what the full model needs: no estimate is asked.
        """
        full_step = seconds if plain else self.cost.seconds(FULL, len(before))
        for sequence, tokens in before.items():
            sequence.ran.seconds += seconds
            sequence.ran.full_seconds += (sequence.ran.tokens - tokens) * full_step
        added = sum(s.ran.tokens - n for s, n in before.items())
        self.speculation.paced(added, len(before), seconds)

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

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        failure = StepFailed(f"decoding failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        for sequence in list(sequences):
            if sequence.times.finished is None and not sequence.cancelled:
                self._release(sequence, "error")
                try:
                    sequence.deliver(failure)
                except Exception:
                    logger.exception("request %s: its receiver failed", sequence.request.id)

    def _release(self, sequence: Sequence, outcome: str) -> None:
        """Take a text out of the engine and free its blocks at once."""
        if sequence in self._running:
            self._running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.times.finished = time.monotonic()
        ran = sequence.ran
        if ran.mode != Mode.FULL and not ran.drafts and ran.bypass is None:
            ran.bypass = "drafting did not pay"
        self.observer.on_finish(ran, sequence.times, outcome)


def _batch(tokens: dict[Sequence, list[int]]) -> Batch:
    """One pass over each sequence's next tokens, from its first unverified position on."""
    joined = torch.tensor([token for block in tokens.values() for token in block], dtype=torch.int64)
    tables = torch.stack([s.table for s in tokens if s.table is not None])
    return Batch(joined, [len(block) for block in tokens.values()], [s.verified for s in tokens], tables)
