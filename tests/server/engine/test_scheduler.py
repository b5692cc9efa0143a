"""Engine and scheduler under any load: a model that is nothing but the cache it reads, and faults at every boundary.

The fake model's next token follows from every entry that the block table leads to. A block that was lost, shared
wrongly or written over gives another text than the model alone would write.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from server.engine.check import Limits
from server.engine.cost import CostModel
from server.engine.engine import Engine, StepFailed
from server.engine.options import Options
from server.engine.request import Mode, Overloaded, Request, Unavailable, Update
from strace.draft import Draft, DraftPlan, Held, Verdict
from strace.kv import BLOCK, Batch
from strace.runner import FULL, TorchRunner
from strace.sampling import Noise, Sampler, SamplingParams, verify
from tests.server.engine.harness import FixedCost
from tests.tiny import make_tokenizer

VOCABULARY, BLOCKS, STOP = 24, 7, 5
GRAPHS = ("pooled", "stranger")
BEGINNINGS = [[(7 * i + 3 * i * i + b) % 23 for i in range(100)] for b in range(3)]
LAWS = torch.randn(1009, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


class Injected(RuntimeError):
    """A fault that the test asked for."""


def predict(graph: str, text: tuple[int, ...]) -> Tensor:
    """Logits [V] after a text; the drafts' are often the full model's."""
    number = hash(text)
    return LAWS[(number + (graph != FULL and number % 4 == 0)) % len(LAWS)]


def write_alone(request: Request) -> list[int]:
    """The text that the full model writes, without an engine."""
    ids, params = list(request.prompt), request.params
    for _ in range(request.max_tokens):
        sampler = Sampler(params, Noise(params.seed or 0, shared=True), len(ids))
        row = sampler.process(predict(FULL, tuple(ids))[None])
        ids += verify(row, None, [], sampler.noise, sampler.position)
        if ids[-1] == STOP:
            break
    return ids[len(request.prompt) :]


class Memory(TorchRunner):
    """A runner whose cache holds tokens: a draft's are told apart, since no full pass may ever read them."""

    def __init__(self) -> None:
        self.cache = SimpleNamespace(blocks=BLOCKS)
        self.graphs = {name: SimpleNamespace(coverage=1.0) for name in (FULL, *GRAPHS)}
        self.entries: dict[tuple[int, int], int] = {}
        self.fault: tuple[str, Exception] | None = None
        self.struck = 0

    def reach(self, place: str) -> None:
        """Fail here if that was asked for."""
        if self.fault is not None and self.fault[0] == place:
            (_, error), self.fault = self.fault, None
            self.struck += 1
            raise error

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        logits, number = [], 0
        tokens = iter(batch.tokens)
        for count, start, table in zip(batch.counts, batch.starts, batch.tables.tolist(), strict=True):
            for position in range(start, start + count):
                token = next(tokens)
                self.entries[table[position // BLOCK], position % BLOCK] = token if graph == FULL else -1 - token
                if number in rows:
                    text = [self.entries[table[p // BLOCK], p % BLOCK] for p in range(position + 1)]
                    logits.append(predict(graph, tuple(t if graph == FULL else max(t, -1 - t) for t in text)))
                number += 1
        self.reach("full pass" if graph == FULL else "draft step")
        return torch.stack(logits) if logits else torch.empty(0, VOCABULARY)

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        self.reach("draft")
        return super().draft(graph, batch, plan)

    def verify(self, logits: Tensor, held: list[Held]) -> list[Verdict]:
        self.reach("verify")
        return super().verify(logits, held)


class Reader:
    """One request's receiver, and what it was given."""

    def __init__(self, request: Request, runner: Memory) -> None:
        self.request, self.runner = request, runner
        self.ids: list[int] = []
        self.prompt_logprobs, self.ends = 0, 0
        self.error: Exception | None = None
        self.gone = False

    def receive(self, news: Update | Exception) -> None:
        if isinstance(news, Exception):
            self.ends, self.error = self.ends + 1, news
            return
        self.ids += news.ids
        self.prompt_logprobs += len(news.prompt_logprobs)
        self.ends += news.finish is not None
        try:
            self.runner.reach("deliver")
        except Injected:
            self.gone = True
            raise


class Load(RuleBasedStateMachine):
    """Requests come and go, and anything fails."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = Memory()
        self.engine = Engine(
            self.runner,
            make_tokenizer().backend_tokenizer,
            [STOP],
            drafts=GRAPHS,
            limits=Limits(BLOCKS * BLOCK, VOCABULARY),
            cost=self.cost(),
            options=Options(seed=0, chunk=48, max_running=4, max_waiting=6),
        )
        self.readers: list[Reader] = []
        self.lacked = False

    @staticmethod
    def cost() -> CostModel:
        return FixedCost()

    @rule(
        beginning=st.sampled_from(BEGINNINGS),
        shared=st.integers(0, 100),
        own=st.lists(st.integers(0, 23), max_size=20),
        max_tokens=st.integers(1, 90),
        mode=st.sampled_from([Mode.EXACT, Mode.EXACT, Mode.FULL, Mode.ROUTED]),
        graph=st.sampled_from(GRAPHS),
        seed=st.sampled_from([None, 1, 2]),
        prompt_logprobs=st.booleans(),
    )
    def submit(
        self,
        beginning: list[int],
        shared: int,
        own: list[int],
        max_tokens: int,
        mode: Mode,
        graph: str,
        seed: int | None,
        prompt_logprobs: bool,
    ) -> None:
        prompt = [*beginning[:shared], *own] or [1]
        params = SamplingParams(temperature=0.0 if seed is None else 1.0, seed=seed)
        request = Request(str(len(self.readers)), prompt, params, max_tokens, mode=mode, class_name=graph)
        logprobs = 0 if prompt_logprobs else None  # with which nothing is routed
        request = replace(request, logprobs=logprobs, prompt_logprobs=prompt_logprobs, threshold=0.2)
        reader = Reader(request, self.runner)
        try:
            reader.handle = self.engine.submit(request, reader.receive)
        except Overloaded:
            assert len(self.engine.scheduler.waiting) == 6
        else:
            self.readers.append(reader)

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.readers:
            reader = self.readers[which % len(self.readers)]
            reader.handle.cancel()
            reader.gone = True

    @rule(
        place=st.sampled_from(["draft", "draft step", "full pass", "verify", "deliver"]),
        lacks_memory=st.booleans(),
    )
    def break_down(self, place: str, lacks_memory: bool) -> None:
        lacks_memory = lacks_memory and place in ("draft", "draft step", "full pass")
        self.runner.fault = (place, MemoryError("no room") if lacks_memory else Injected(place))
        self.lacked |= lacks_memory

    @rule(steps=st.integers(1, 12))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """One step; the oldest text that nobody gave up must come nearer to its end, unless a fault struck."""
        scheduler, struck = self.engine.scheduler, self.runner.struck
        alive = [s for s in (*scheduler.running, *scheduler.waiting) if not s.cancelled]
        before = (len(alive[0].ids), alive[0].verified) if alive else (0, 0)
        self.engine.step()
        if alive and self.runner.struck == struck:
            oldest = alive[0]
            assert oldest.times.finished is not None or (len(oldest.ids), oldest.verified) > before

    @invariant()
    def blocks_are_whole(self) -> None:
        scheduler = self.engine.scheduler
        held = Counter(block for s in scheduler.running for block in s.blocks)
        assert scheduler.pool.used == len(held)
        assert not any(s.blocks or s.verified for s in scheduler.waiting)
        for s in scheduler.running:
            assert all(held[block] == 1 for block in s.blocks[s.sealed :])
            assert s.sealed * BLOCK <= s.verified <= len(s.blocks) * BLOCK
            entries = [self.runner.entries[s.blocks[p // BLOCK], p % BLOCK] for p in range(s.verified)]
            assert entries == s.ids[: s.verified]

    @invariant()
    def the_order_is_kept(self) -> None:
        scheduler = self.engine.scheduler
        order = [int(s.request.id) for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)

    def teardown(self) -> None:
        self.runner.fault = None
        for _ in range(3000):
            if not self.engine.stats().running and not self.engine.stats().waiting:
                break
            self.step()
        assert self.engine.stats().blocks_used == 0
        for reader in self.readers:
            self.check(reader)

    def check(self, reader: Reader) -> None:
        request = reader.request
        assert reader.ends <= 1
        assert reader.ends or reader.gone
        if request.mode != Mode.ROUTED:
            text = write_alone(request)
            assert reader.ids == (text if reader.ends and not reader.error else text[: len(reader.ids)])
        if reader.ids:
            assert reader.prompt_logprobs == (len(request.prompt) - 1 if request.prompt_logprobs else 0)
        match reader.error:
            case StepFailed():
                assert isinstance(reader.error.__cause__, Injected)
            case Unavailable():
                assert self.lacked
            case _:
                assert reader.error is None


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=100, stateful_step_count=30, derandomize=True, deadline=None)
