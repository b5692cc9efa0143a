"""The loop: admission, chunked prefill, cancelling, failing, blocks, and what lies past `verified`."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine import guard
from server.engine.engine import Drafts, Engine, StepFailed
from server.engine.observer import Step
from server.engine.options import Options
from server.engine.request import Mode, Overloaded, Ran, Refused, Request, Unavailable, Update
from server.engine.sequence import Times
from strace.classifier import LATE, fit_classifier
from strace.draft import Draft, DraftPlan
from strace.graphs import make_runner as run_graphs
from strace.kv import BLOCK, Batch
from strace.native import NativeError
from strace.runner import FULL, Runner
from tests.server.engine.harness import (
    VOCABULARY,
    FixedCost,
    Got,
    decode,
    drain,
    graphs,
    make_engine,
    make_request,
    make_runner,
    submit,
)
from tests.strace.test_classifier import draw

SEEDED = {"temperature": 1.0, "seed": 3}


def poison(engine: Engine) -> None:
    """Overwrite everything that no running text may rely on."""
    cache = engine.runner.cache
    for sequence in engine.scheduler.running:
        for position in range(sequence.verified, len(sequence.blocks) * BLOCK):
            for entries in (*cache.keys, *cache.values):
                entries[sequence.blocks[position // BLOCK], :, position % BLOCK] = 1e4


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.EXACT, Mode.ROUTED])
def test_nothing_past_verified_is_read(mode: Mode) -> None:
    requests = [
        make_request(list(range(n)), mode, 30, class_name=c, threshold=0.05, **SEEDED)
        for n, c in ((3, "pooled"), (1, "lame"), (70, "stranger"))
    ]
    options = Options(draft_length=4, chunk=16)
    clean = decode(make_engine(options), *requests)
    engine = make_engine(options)
    poisoned = [submit(engine, request) for request in requests]
    while engine.stats().running or engine.stats().waiting:
        poison(engine)
        with torch.inference_mode():
            engine.step()
    assert [g.outcome for g in poisoned] == [g.outcome for g in clean]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompts_are_read_in_chunks_beside_decoding(chunk: int) -> None:
    long, short = make_request(list(range(100)), max_tokens=8, **SEEDED), make_request([4], max_tokens=40, **SEEDED)
    expected = [decode(make_engine(Options(chunk=512)), request)[0].outcome for request in (short, long)]
    seen = Watcher()
    engine = make_engine(Options(chunk=chunk), observer=seen)
    got = [submit(engine, short)]
    engine.step()
    engine.step()
    got += [submit(engine, long) for _ in range(2)]
    drain(engine)
    assert [g.outcome for g in got] == [*expected, expected[1]]
    assert max(step.prompt_tokens for step in seen.steps) <= chunk
    assert any(step.prompt_tokens and step.decoding for step in seen.steps)


class Watcher:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.finished: list[tuple[Ran, Times, str]] = []

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_finish(self, ran: Ran, times: Times, outcome: str) -> None:
        self.finished.append((ran, times, outcome))


def test_the_observer_sees_everything() -> None:
    seen = Watcher()
    got = decode(make_engine(observer=seen), make_request(max_tokens=20), make_request([9] * 40, Mode.FULL, 20))
    assert sum(step.tokens for step in seen.steps) == 40
    assert sum(step.prompt_tokens for step in seen.steps) == 43
    assert {step.passes["full"] for step in seen.steps} == {1}
    assert sum(step.passes.get("pooled", 0) for step in seen.steps) == got[0].ran.drafted
    assert all(0 < step.runner_seconds <= step.seconds for step in seen.steps[1:])
    assert [outcome for _, _, outcome in seen.finished] == ["length", "length"]
    for _, times, _ in seen.finished:
        assert times.submitted <= times.admitted <= times.updates[0] <= times.updates[-1] <= times.finished
    assert {len(times.updates) for _, times, _ in seen.finished} == {len(g.updates) for g in got}


def test_realised_speedup_of_full_at_its_own_cost() -> None:
    """A step without drafts is what the full model needs, whatever the cost model believes: the ratio is 1."""
    seen = Watcher()
    got = decode(make_engine(observer=seen), make_request(mode=Mode.FULL, max_tokens=20))[0]
    assert got.ran.seconds == pytest.approx(sum(step.seconds for step in seen.steps[1:]))
    assert got.ran.speedup == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 256}, "prompt"),
        ({"prompt": [1] * 200, "max_tokens": 57}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_draft": -1}, "max_draft"),
        ({"class_name": "poetry"}, "class"),
        ({"mode": Mode.ROUTED, "risk": 0.0}, "risk"),
        ({"mode": Mode.ROUTED, "risk": 1.0}, "risk"),
        ({"mode": Mode.ROUTED, "risk": 0.1, "threshold": 0.9}, "risk"),
        ({"mode": Mode.EXACT, "risk": 0.1}, "risk"),
        ({"mode": Mode.FULL, "risk": 0.1}, "risk"),
        ({"stop": ("a", "")}, "stop"),
    ],
)
def test_refused(change: dict[str, object], param: str) -> None:
    engine = make_engine()
    with pytest.raises(Refused) as refused:
        engine.submit(replace(make_request(), **change), print)
    assert refused.value.param == param
    assert engine.stats().waiting == 0


def test_refused_classes_are_named() -> None:
    with pytest.raises(Refused, match="'poetry'; known are pooled, lame, stranger"):
        make_engine().submit(make_request(class_name="poetry"), print)


def test_a_class_that_does_not_pay_is_served_by_pooled_and_told_why() -> None:
    engine = make_engine()
    engine.unpaying = {"verse": "no subgraph: predicted 1.02"}
    asked, full, none = decode(
        engine,
        make_request(class_name="verse"),
        make_request(mode=Mode.FULL, class_name="verse"),
        make_request(class_name="verse", max_draft=0),
    )
    assert (asked.ran.class_name, asked.ran.mode) == ("pooled", Mode.EXACT)
    assert asked.ran.bypass == full.ran.bypass == "class verse: no subgraph: predicted 1.02; pooled drafts"
    assert asked.ran.drafted > 0
    assert none.ran.bypass == "max_draft is 0"
    assert decode(engine, make_request())[0].ran.bypass is None
    with pytest.raises(Refused, match="'poetry'; known are pooled, lame, stranger, verse"):
        engine.submit(make_request(class_name="poetry"), print)


def test_too_large_for_the_cache() -> None:
    with pytest.raises(Refused, match="KV cache of 2 blocks"):
        make_engine(blocks=2).submit(make_request(max_tokens=70), print)


def test_modes_without_a_draft() -> None:
    engine = make_engine(drafts=())
    for mode in (Mode.EXACT, Mode.ROUTED):
        with pytest.raises(Refused, match="needs a draft"):
            engine.submit(make_request(mode=mode, class_name=None), print)
    got = decode(engine, make_request(mode=Mode.AUTO, class_name=None))[0]
    assert (got.ran.mode, got.ran.bypass) == (Mode.FULL, "no draft is loaded")


def test_what_auto_means() -> None:
    request = make_request(mode=Mode.AUTO)
    assert decode(make_engine(), request)[0].ran.mode == Mode.EXACT
    routed = replace(request, threshold=0.9)
    assert decode(make_engine(Options(auto=Mode.ROUTED)), routed)[0].ran.mode == Mode.ROUTED


def test_the_chooser_picks_the_class() -> None:
    class Chooser:
        def choose(self, ids: list[int]) -> str:
            return {1: "lame", 2: "unheard of"}[ids[0]]

    engine = make_engine()
    engine._chooser = Chooser()
    requests = [make_request([1], class_name=None), make_request([2], class_name=None), make_request([1])]
    assert [g.ran.class_name for g in decode(engine, *requests)] == ["lame", "pooled", "pooled"]


def test_each_turn_of_a_conversation_is_classified() -> None:
    rng = np.random.default_rng(0)
    known = {name: draw(rng, low, 40) for name, low in (("lame", 40), ("stranger", 80))}
    engine = make_engine(chooser=fit_classifier(known, known, VOCABULARY))
    (_, first), (_, second) = draw(rng, 40, 1, length=120)[0], draw(rng, 80, 1, length=LATE)[0]
    turns = [[*first], [*first, *second]]
    got = [decode(engine, make_request(turn, max_tokens=4, class_name=None))[0] for turn in turns]
    assert [g.ran.class_name for g in got] == ["lame", "stranger"]


def test_max_draft() -> None:
    none, two = decode(make_engine(Options(draft_length=5)), make_request(max_draft=0), make_request(max_draft=2))
    assert (none.ran.drafted, none.ran.bypass) == (0, "max_draft is 0")
    assert 0 < two.ran.drafted <= 2 * two.ran.drafts
    assert none.ids == two.ids


def test_the_youngest_make_room() -> None:
    """Four texts grow to two blocks each over a cache of five."""
    engine = make_engine(blocks=5)
    got = [submit(engine, make_request(max_tokens=60, **SEEDED)) for _ in range(4)]
    engine.step()
    assert (engine.stats().running, engine.stats().blocks_used) == (4, 4)
    drain(engine)
    assert engine.stats().blocks_used == 0
    assert [g.ran.preemptions > 0 for g in got] == [False, False, True, True]
    expected = decode(make_engine(), make_request(max_tokens=60, **SEEDED))[0]
    assert all(g.outcome == expected.outcome for g in got)


def test_overloaded() -> None:
    engine = make_engine(Options(max_waiting=2, max_running=1))
    for _ in range(2):
        submit(engine, make_request())
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        submit(engine, make_request())
    engine.step()
    submit(engine, make_request())
    drain(engine)


def test_cancel_running_and_waiting() -> None:
    seen = Watcher()
    engine = make_engine(Options(max_running=2, draft_length=2), observer=seen)
    first, second, third = (submit(engine, make_request(max_tokens=30)) for _ in range(3))
    engine.step()
    engine.step()
    before = len(first.ids)
    first.handle.cancel()
    third.handle.cancel()
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    assert engine.stats().blocks_used == 1
    drain(engine)
    assert (len(first.ids), len(second.ids), len(third.ids)) == (before, 30, 0)
    assert engine.stats().blocks_used == 0
    assert sorted(outcome for _, _, outcome in seen.finished) == ["cancelled", "cancelled", "length"]


def test_a_receiver_that_fails_gives_up_only_its_own() -> None:
    def receive(update: Update | Exception) -> None:
        raise OSError("gone")

    engine = make_engine()
    engine.submit(make_request(max_tokens=30), receive)
    other = submit(engine, make_request(max_tokens=30))
    drain(engine)
    assert len(other.ids) == 30
    assert engine.stats().blocks_used == 0


class Failing(Runner):
    """A runner whose full pass, or draft, number `when` fails."""

    def __init__(self, when: int, error: Exception | None = None, drafting: bool = False) -> None:
        self.inner, self.left, self.drafting = make_runner(), when, drafting
        self.error = error or ValueError("no sense")
        self.cache = self.inner.cache
        self.verify = self.inner.verify

    def count(self, drafting: bool) -> None:
        self.left -= drafting == self.drafting
        if self.left == 0:
            self.left = -1
            raise self.error

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        self.count(drafting=False)
        return self.inner.forward(graph, batch, rows)

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        self.count(drafting=True)
        return self.inner.draft(graph, batch, plan)


@pytest.mark.parametrize("when", [1, 3])
def test_a_failing_step_ends_its_requests_and_no_other(when: int) -> None:
    engine = make_engine(Options(max_running=2), runner=Failing(when))
    got = [submit(engine, make_request(max_tokens=40, class_name="stranger", **SEEDED)) for _ in range(3)]
    drain(engine)
    for failed in got[:2]:
        assert isinstance(failed.errors[0], StepFailed)
        assert str(failed.errors[0]) == "decoding failed: ValueError: no sense"
        assert failed.finish is None
        assert len(failed.errors) == 1
    assert got[2].outcome == decode(make_engine(), make_request(max_tokens=40, **SEEDED))[0].outcome
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory"),
        NativeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("drafting", [False, True])
def test_out_of_memory_gives_up_the_younger_half(error: Exception, drafting: bool) -> None:
    requests = [make_request([i], max_tokens=40, class_name="stranger", **SEEDED) for i in range(4)]
    requests[0] = replace(requests[0], mode=Mode.ROUTED, threshold=0.0)
    engine = make_engine(Options(draft_length=2), runner=Failing(3, error, drafting))
    got = [submit(engine, request) for request in requests]
    drain(engine)
    assert [bool(g.errors) for g in got] == [False, False, True, True]
    assert all(isinstance(g.errors[0], Unavailable) and len(g.errors) == 1 for g in got[2:])
    assert got[1].outcome == decode(make_engine(), requests[1])[0].outcome
    assert (len(got[0].ids), got[0].complaints) == (40, [])
    assert engine.stats().blocks_used == 0


def test_the_texts_that_were_given_up_leave_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    run = engine.runner.forward

    def forward(graph: str, batch: Batch, rows: list[int]) -> Tensor:
        if len(batch.counts) > 2:  # for which there is no memory, however often it is tried
            raise MemoryError
        return run(graph, batch, rows)

    monkeypatch.setattr(engine.runner, "forward", forward)
    got = [submit(engine, make_request([i], mode=Mode.FULL)) for i in range(4)]
    drain(engine)
    assert [bool(g.errors) for g in got] == [False, False, True, True]


def test_a_lone_text_without_memory_is_given_up_and_the_next_one_runs() -> None:
    engine = make_engine(Options(max_running=1), runner=Failing(2, MemoryError()))
    first, second = submit(engine, make_request()), submit(engine, make_request())
    drain(engine)
    assert isinstance(first.errors[0], Unavailable)
    assert len(second.ids) == 16


def test_one_text_that_cannot_be_settled_does_not_take_the_others() -> None:
    engine = make_engine()
    bad, good = submit(engine, make_request(max_tokens=20)), submit(engine, make_request(max_tokens=20))
    engine.step()
    bad.handle._sequence.text = None
    drain(engine)
    assert isinstance(bad.errors[0], StepFailed)
    assert len(good.ids) == 20
    assert engine.stats().blocks_used == 0


def test_threaded() -> None:
    engine = make_engine()
    done = threading.Semaphore(0)
    texts: dict[int, list[Update | Exception]] = {i: [] for i in range(5)}

    def receiver(i: int, update: Update | Exception) -> None:
        texts[i].append(update)
        if isinstance(update, Exception) or update.finish:
            done.release()

    assert not engine.running
    engine.start()
    assert engine.running
    for i in texts:
        engine.submit(make_request(**SEEDED), lambda update, i=i: receiver(i, update))
    for _ in texts:
        assert done.acquire(timeout=60)
    engine.stop()
    assert not engine.running
    expected = decode(make_engine(), make_request(**SEEDED))[0].ids
    assert all([token for u in updates for token in u.ids] == expected for updates in texts.values())


def test_stopping_fails_what_is_left() -> None:
    engine = make_engine(Options(max_running=1))
    got = [submit(engine, make_request()) for _ in range(2)]
    engine.step()
    engine.stop()
    assert all(str(g.errors[0]).endswith("the engine was stopped") for g in got)
    assert engine.stats().blocks_used == 0
    with pytest.raises(Overloaded, match="stopping"):
        submit(engine, make_request())


@pytest.mark.parametrize(("c", "v8", "drafts"), [(1.1, 1.0, False), (0.05, 1.2, True), (0.05, 9.0, False)])
def test_drafts_only_where_they_pay(c: float, v8: float, drafts: bool) -> None:
    got = decode(make_engine(cost=FixedCost(c, v8)), make_request(max_tokens=20))[0]
    assert bool(got.ran.drafted) == drafts
    assert got.ran.bypass == (None if drafts else "drafting did not pay")


def test_a_pessimistic_table_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PROBE_SHARE", 0.5)
    engine = make_engine(guard=guard.Guard(FixedCost().table(FULL)))
    for _ in range(1000):
        engine.speculation.calibrations["pooled"].judge(0.05, 0.0)
    got = decode(engine, make_request(max_tokens=200))[0]
    assert got.ran.drafted > 10
    assert engine.speculation.calibrations["pooled"].acceptance[-1] > 0.1


def test_a_thread_that_dies_leaves_nobody_waiting() -> None:
    class Breaking(Watcher):
        def on_finish(self, ran: Ran, times: Times, outcome: str) -> None:
            self.finished.append((ran, times, outcome))
            if outcome == "cancelled":
                raise SystemExit

    engine = make_engine(Options(max_running=1), observer=Breaking())
    first, second = submit(engine, make_request()), submit(engine, make_request())
    first.handle.cancel()
    engine.start()
    assert engine._loop_done is not None
    wait([engine._loop_done], 60)
    assert not engine.running
    assert str(second.errors[0]).endswith("the engine was stopped")


def test_draining_takes_no_more_and_finishes_what_there_is() -> None:
    engine = make_engine(Options(max_running=1))
    got = [submit(engine, make_request()) for _ in range(2)]
    engine.step()
    engine.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        submit(engine, make_request())
    assert not engine.idle
    drain(engine)
    assert engine.idle
    assert [len(g.ids) for g in got] == [16, 16]


def test_an_engine_that_drains_says_that_it_takes_nothing() -> None:
    engine = make_engine()
    engine.start()
    assert engine.running
    engine.drain()
    assert not engine.running
    engine.stop()


def test_other_drafts_between_steps() -> None:
    """A text whose class stays goes on with it, one whose class is gone with `pooled`, and neither's words change."""
    requests = [make_request([i], max_tokens=60, class_name=c, **SEEDED) for i, c in enumerate(("lame", "stranger"))]
    engine = make_engine(Options(draft_length=3, max_running=1))
    got = [submit(engine, request) for request in requests]
    for _ in range(4):
        engine.step()
    others = {name: graphs()[name] for name in (FULL, "pooled", "lame")}
    done = engine.swap(
        Drafts(run_graphs(others, engine.runner.cache, "torch"), ("pooled", "lame"), FixedCost(), None, {})
    )
    assert not done.done()
    drain(engine)
    assert done.done()
    assert engine.classes == ("pooled", "lame")
    assert [g.ran.class_name for g in got] == ["lame", "pooled"]
    expected = decode(make_engine(), *requests)
    assert [g.outcome for g in got] == [g.outcome for g in expected]
    with pytest.raises(Refused, match="unknown class 'stranger'"):
        submit(engine, requests[1])


def test_no_drafts_at_all_between_steps() -> None:
    engine = make_engine(Options(draft_length=3))
    got = submit(engine, make_request(max_tokens=60, **SEEDED))
    engine.step()
    engine.swap(Drafts(run_graphs({FULL: graphs()[FULL]}, engine.runner.cache, "torch"), (), FixedCost(), None, {}))
    drain(engine)
    assert got.outcome == decode(make_engine(), make_request(max_tokens=60, **SEEDED))[0].outcome


def test_multi_byte_text_comes_in_whole_characters() -> None:
    engine = make_engine()
    request: Request = make_request(list("größe: 日本".encode()), temperature=1.0, seed=11, max_tokens=80)
    got: Got = decode(engine, request)[0]
    assert "".join(u.text for u in got.updates) == engine._tokenizer.decode(got.ids).rstrip("�")


@pytest.mark.parametrize("count", [1, 64])
def test_a_prompt_that_is_only_read(count: int) -> None:
    """Also where it fills the cache, and beside others."""
    request = replace(make_request([7] * count, Mode.AUTO, max_tokens=0), logprobs=1, prompt_logprobs=True)
    (alone,) = decode(make_engine(blocks=2), request)
    longer, beside = decode(make_engine(), replace(request, max_tokens=1, mode=Mode.FULL), request)
    for got in (alone, beside):
        assert got.outcome == ([], "", "length")
        assert [u.prompt_logprobs for u in got.updates] == [longer.updates[0].prompt_logprobs]
        assert (got.ran.mode, got.ran.tokens, got.ran.speedup) == (Mode.FULL, 0, None)
        assert got.ran.bypass == "nothing is to be generated"


@pytest.mark.parametrize("mode", [Mode.FULL, Mode.EXACT, Mode.ROUTED])
def test_no_stop_string_before_min_tokens(mode: Mode) -> None:
    engine = make_engine(Options(draft_length=4, seed=0))
    text = decode(engine, make_request(mode=mode, max_tokens=60, threshold=0.0))[0].text
    request = make_request(mode=mode, max_tokens=60, threshold=0.0, stop=tuple({*text[:20]})[:4])
    early, late = decode(engine, request, replace(request, min_tokens=30))
    assert (early.finish, late.finish) == ("stop", "stop")
    assert len(early.ids) < 30 < len(late.ids)
    assert late.text.startswith(early.text)


def test_all_tokens_barred_is_refused() -> None:
    request = replace(make_request(), stop_ids=tuple(range(VOCABULARY)), min_tokens=2)
    with pytest.raises(Refused, match="every token"):
        submit(make_engine(), request)
