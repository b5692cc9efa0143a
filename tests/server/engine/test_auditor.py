"""The auditor: false alarms and delays over simulated streams, and an engine whose draft goes bad and recovers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from server.engine.auditor import ALPHA, Auditor, Evidence, judge_breach, judge_recovery
from server.engine.engine import Engine
from server.engine.guard import Guard
from server.engine.options import Options
from server.engine.request import Mode, Request
from strace.graphs import make_runner
from strace.runner import FULL
from strace.sampling import SamplingParams
from tests.server.engine.harness import FixedCost, decode, decode_full, graphs, make_engine, make_request
from tests.server.engine.test_risk import FirstToken
from tests.strace.test_certificate import make_certificate

RISK = 0.02
Losses = Callable[[np.random.Generator, float, tuple[int, ...]], np.ndarray]
LOSSES: dict[str, Losses] = {
    "all or nothing": lambda random, mean, shape: (random.random(shape) < mean).astype(float),
    "one of 64 tokens": lambda random, mean, shape: random.binomial(64, mean, shape) / 64,
    "a few bad requests": lambda random, mean, shape: random.beta(mean, 1 - mean, shape),
}


def decided_at(losses: np.ndarray, judge: Callable[..., None], threshold: float) -> np.ndarray:
    """int [streams]: after how many requests each stream's evidence first reaches the threshold; 0: it never does.
    losses: float64 [requests, streams]."""
    evidence, first = Evidence(), np.zeros(losses.shape[1], dtype=int)
    with np.errstate(over="ignore", invalid="ignore"):
        for number, loss in enumerate(losses, start=1):
            judge(evidence, loss, RISK)
            first[(first == 0) & (evidence.value >= threshold)] = number
    return first


def most(rate: float, streams: int) -> float:
    """The share that a rate gives by chance, at three standard deviations."""
    return rate + 3 * (rate * (1 - rate) / streams) ** 0.5


@pytest.mark.parametrize("kind", LOSSES)
def test_false_alarms_at_the_boundary(kind: str) -> None:
    """10,000 classes whose mean loss is exactly what was promised, the worst that keeps it, over 600 requests each."""
    losses = LOSSES[kind](np.random.default_rng(1), RISK, (600, 10_000))
    assert 0 < (decided_at(losses, judge_breach, 1 / ALPHA) > 0).mean() <= most(ALPHA, 10_000)


def test_false_alarms_where_the_past_decides() -> None:
    """The claim is about the mean given the past; how large a loss is, and so how likely, may depend on all of it."""
    random = np.random.default_rng(2)
    evidence, alarmed = Evidence(), np.zeros(10_000, dtype=bool)
    for _ in range(600):
        size = np.where(evidence.value > 1, 1.0, 0.05)
        judge_breach(evidence, size * (random.random(10_000) < RISK / size), RISK)
        alarmed |= evidence.value >= 1 / ALPHA
    assert alarmed.mean() <= most(ALPHA, 10_000)


@pytest.mark.parametrize(
    ("kind", "mean", "limit"),
    [
        ("one of 64 tokens", 0.06, 40),
        ("one of 64 tokens", 0.2, 12),
        ("a few bad requests", 0.06, 450),
        ("a few bad requests", 0.2, 50),
        ("all or nothing", 0.06, 1100),
        ("all or nothing", 0.2, 120),
    ],
)
def test_a_shift_is_caught(kind: str, mean: float, limit: int) -> None:
    """After 1,000 good requests, in 95 % of streams within so many; losses of 0 and 1 alone say the least."""
    random, make = np.random.default_rng(3), LOSSES[kind]
    losses = np.concatenate([make(random, RISK / 4, (1000, 500)), make(random, mean, (limit, 500))])
    assert (decided_at(losses, judge_breach, 1 / ALPHA) > 1000).mean() > 0.95


def test_old_good_requests_hide_little() -> None:
    """A hundred times the good past costs less than three times the delay."""

    def delay(past: int) -> int:
        losses = np.concatenate([np.zeros((past, 1)), np.full((300, 1), 0.06)])
        return int(decided_at(losses, judge_breach, 1 / ALPHA)[0]) - past

    assert 0 < delay(10_000) < 3 * delay(100)


@pytest.mark.parametrize("kind", LOSSES)
def test_false_recoveries_at_the_boundary(kind: str) -> None:
    losses = LOSSES[kind](np.random.default_rng(4), RISK, (600, 10_000))
    assert (decided_at(losses, judge_recovery, 2 / ALPHA) > 0).mean() <= most(ALPHA / 2, 10_000)


def test_a_class_without_divergence_recovers() -> None:
    """About 150 requests without loss are the least that could tell 2 % at 95 %."""
    (soon,) = decided_at(np.zeros((400, 1)), judge_recovery, 2 / ALPHA)
    (late,) = decided_at(np.concatenate([np.full((500, 1), 0.1), np.zeros((1000, 1))]), judge_recovery, 2 / ALPHA)
    assert 150 < soon < 350
    assert 500 < late < 1500


def feed(auditor: Auditor, loss: float, requests: int) -> int:
    """How many requests it takes until the class's state changes, at most so many."""
    before = auditor.tripped("code") is None
    for number in range(1, requests + 1):
        (auditor.observe if before else auditor.observe_shadow)("code", loss, RISK)
        if before != (auditor.tripped("code") is None):
            return number
    raise AssertionError("nothing changed")


def test_each_recovery_asks_for_more(caplog: pytest.LogCaptureFixture) -> None:
    auditor = Auditor()
    needed = []
    for _ in range(3):
        feed(auditor, 0.3, 50)
        assert "class 'code' diverged by more than the promised 2.0%" in (auditor.tripped("code") or "")
        auditor.observe("code", 0.0, RISK)  # routed before it tripped
        needed.append(feed(auditor, 0.0, 500))
    assert needed[0] < needed[1] < needed[2]
    assert len(caplog.records) == 6
    assert auditor.tripped("facts") is None
    assert auditor.states()["code"] == (False, pytest.approx(ALPHA))


def start(tokens: int = 24) -> tuple[Engine, Request]:
    """An engine that emits everything, promises that 20 % of it at most diverges, and has a draft that keeps this."""
    runner = make_runner(dict(graphs()), 200, "torch")
    certificates = {name: make_certificate(name, {0.2: 0.0}, (0.0, 1.0), tokens=tokens) for name in ("pooled", "lame")}
    options = Options(risk=0.2, draft_length=4, seed=1)
    engine = make_engine(options, runner=runner, certificates=certificates, chooser=FirstToken())
    return engine, make_request(mode=Mode.ROUTED, max_tokens=tokens, temperature=1.0)


def swap(engine: Engine, name: str) -> None:
    """From now on another model drafts for `pooled`."""
    engine.runner.graphs["pooled"] = graphs()[name]


def test_a_draft_that_goes_bad_and_recovers() -> None:
    engine, request = start()
    good = decode(engine, *[request] * 16)
    assert all(got.ran.mode == Mode.ROUTED and got.ran.unverified for got in good)
    swap(engine, "stranger")
    decode(engine, *[request] * 16)
    greedy = replace(request, params=SamplingParams(0.0))
    tripped = decode(engine, greedy, replace(greedy, class_name="lame", prompt=[9]))
    assert [got.ran.mode for got in tripped] == [Mode.EXACT, Mode.ROUTED]
    assert "the auditor tripped: class 'pooled'" in str(tripped[0].ran.bypass)
    assert tripped[0].ran.risk is None
    assert tripped[0].ids == decode_full(greedy)[0].ids
    decode(engine, *[request] * 16)
    assert engine.auditor.tripped("pooled") is not None
    swap(engine, "pooled")
    shadowed = [got for _ in range(2) for got in decode(engine, *[request] * 60)]
    assert all(got.ran.unverified == got.ran.divergent == 0 for got in shadowed)
    assert engine.auditor.tripped("pooled") is None
    assert decode(engine, request)[0].ran.mode == Mode.ROUTED


class Spy(Auditor):
    """Says for every class whether it is tripped, and writes down what it is told."""

    def __init__(self, reason: str | None) -> None:
        super().__init__()
        self.reason, self.losses = reason, list[float]()

    def tripped(self, name: str) -> str | None:
        return self.reason

    def observe(self, name: str, loss: float, risk: float) -> None:
        self.losses.append(loss)

    observe_shadow = observe


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
def test_the_shadow_sees_what_routed_would_have_done(params: dict[str, float]) -> None:
    """Texts of two tokens, the first of which can be drafted: emitted or in shadow, it is judged alike."""
    engine, _ = start(2)
    swap(engine, "lame")
    requests = [make_request([token], Mode.ROUTED, 2, **params) for token in range(30)]

    def audit(reason: str | None) -> list[float]:
        engine.auditor = spy = Spy(reason)
        decode(engine, *requests)
        return spy.losses

    routed, shadow = audit(None), audit("tripped")
    assert 0 < sum(shadow) < 30
    assert sorted(2 * loss for loss in routed) == pytest.approx(sorted(shadow), abs=1e-5)


def test_what_was_not_promised_is_not_audited() -> None:
    engine, request = start()
    engine.auditor = spy = Spy(None)
    decode(engine, replace(request, threshold=0.5), replace(request, mode=Mode.EXACT), replace(request, mode=Mode.FULL))
    assert not spy.losses


@pytest.mark.parametrize("shut", [True, False])
def test_a_text_whose_gate_was_never_open_says_nothing(monkeypatch: pytest.MonkeyPatch, shut: bool) -> None:
    """The guard shuts it for the time it costs; texts without loss must not hide what others lose."""
    engine, request = start()
    guard = Guard(FixedCost().table(FULL))
    monkeypatch.setattr(guard, "_shuts", lambda trust: shut)
    engine.guard = engine.cycle.guard = guard
    engine.auditor = spy = Spy(None)
    (got,) = decode(engine, request)
    assert got.ran.drafted
    assert bool(spy.losses) != shut
