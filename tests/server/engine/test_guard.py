"""The guard: simulated with noisy times, and in an engine whose cost table lies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from torch import Tensor

from server.engine.engine import Drafts, Engine
from server.engine.guard import GATE_BLOCKS, GATE_STEPS, GateTrack, Guard, Key, Share, Trust
from server.engine.options import Options
from server.engine.request import Mode
from strace.draft import Draft, DraftPlan
from strace.kv import Batch
from strace.runner import FULL, Runner
from tests.server.engine.harness import FixedCost, decode, decode_full, make_engine, make_request, make_runner

CODE: Key = (Mode.EXACT, "code")
CHAT: Key = (Mode.ROUTED, "chat")
SHAPE = np.linspace(1.0, 3.0, 33)


@dataclass
class World:
    """Steps of a batch in which each key's drafts multiply the tokens and lengthen the step, by noisy factors.

    drafts: per key the factor of tokens and of the plain step's time. refused: keys whose rule will not draw. verified:
    the factors of the `routed` key where its gate is shut. opened: steps by class and whether the gate was open.
    """

    guard: Guard
    random: np.random.Generator
    batch: int = 32
    noise: float = 0.1
    seconds: float = 0.0
    needed: float = 0.0
    probing: float = 0.0
    kinds: list[str] = field(default_factory=list)
    verified: tuple[float, float] = (1.6, 1.2)
    opened: Counter[tuple[str, bool]] = field(default_factory=Counter)

    def step(self, drafts: dict[Key, tuple[float, float]], refused: frozenset[Key] = frozenset()) -> None:
        turn = self.guard.turn(drafts, self.batch, measurable=True)
        self.opened.update((name, not shut) for name, shut in turn.shut.items())
        drafts = {turn.runs(key): self.verified if turn.runs(key) != key else value for key, value in drafts.items()}
        drawing = {key for key in drafts if turn.allows(key) and (turn.probe or key not in refused)}
        turn.forced.update(name for mode, name in drawing & refused)
        plain = float(np.interp(self.batch, np.arange(33), SHAPE)) * 0.01 * 2**0.5
        texts = self.batch // len(drafts)
        seconds, gains, tokens = plain, Counter[Key](), 0
        for key, (more, longer) in drafts.items():
            gained = self.random.poisson((more - 1) * texts) if key in drawing else 0
            if key in drawing:
                turn.drafted[key], gains[key] = 4 * texts, int(gained)
                turn.drafting[key[1]] = plain * (longer - 1) * 0.8
                seconds += plain * (longer - 1)
            tokens += texts + int(gained)
        slow = self.random.lognormal(0, self.noise) * (1 + 9 * (self.random.random() < 0.002))
        seconds, turn.drafting = seconds * slow, {name: took * slow for name, took in turn.drafting.items()}
        self.guard.book(turn, seconds, gains)
        self.seconds += seconds
        self.needed += plain * tokens / self.batch
        self.probing += seconds * turn.probe
        self.kinds.append("plain" if not drawing else "probe" if turn.probe else "draft")

    def run(self, steps: int, drafts: dict[Key, tuple[float, float]], refused: frozenset[Key] = frozenset()) -> float:
        """Realised speedup of so many steps."""
        self.seconds = self.needed = self.probing = 0.0
        self.kinds.clear()
        self.opened.clear()
        for _ in range(steps):
            self.step(drafts, refused)
        return self.needed / self.seconds


def make_world(seed: int = 0, **settings: float) -> World:
    return World(Guard(SHAPE), np.random.default_rng(seed), **settings)  # type: ignore[arg-type]


def lower_bound(speedups: list[float]) -> float:
    """95 %, one-sided."""
    logs = np.log(speedups)
    return float(np.exp(logs.mean() - 1.73 * logs.std(ddof=1) / len(logs) ** 0.5))


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("drafts", [(1.0, 4.0), (1.3, 2.0), (1.5, 1.8), (1.7, 1.8), (1.9, 2.0)])
def test_useless_drafts_cost_little(drafts: tuple[float, float], batch: int) -> None:
    """Blocks of 1,000 steps, the one in which the guard learns among them, against plain steps throughout."""
    world = make_world(batch=batch)
    plain = make_world(1, batch=batch)
    blocks, probing, seconds = [], 0.0, 0.0
    for _ in range(20):
        blocks.append(world.run(1000, {CODE: drafts}) / plain.run(1000, {CODE: (1.0, 1.0)}))
        probing, seconds = probing + world.probing, seconds + world.seconds
    assert lower_bound(blocks) > 0.95
    assert probing < 0.012 * seconds


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("drafts", [(2.0, 1.2), (3.0, 2.0), (1.5, 1.2)])
def test_good_drafts_are_let_through(drafts: tuple[float, float], batch: int) -> None:
    world, worth = make_world(batch=batch), drafts[0] / drafts[1]
    world.run(300, {CODE: drafts})
    assert world.run(4000, {CODE: drafts}) > 0.95 * worth
    assert world.kinds.count("plain") < 0.05 * len(world.kinds)


def test_a_shift_is_caught_and_forgiven() -> None:
    """Good drafts that turn bad are off within 1,000 steps, and back within 3,000 once they are good again."""
    world = make_world()
    good, bad = {CODE: (2.0, 1.2)}, {CODE: (1.2, 2.0)}
    world.run(2000, good)
    world.run(1000, bad)
    assert world.run(1000, bad) > 0.95
    world.run(3000, good)
    assert world.run(1000, good) > 1.5


def test_what_the_rule_refuses_is_probed_for_one_percent() -> None:
    world = make_world()
    speedup = world.run(10_000, {CODE: (1.0, 4.0)}, frozenset([CODE]))
    assert 0.001 < world.probing / world.seconds < 0.012
    assert speedup > 0.95
    assert world.guard.states()[0][3].trust is Trust.UNSURE


def test_in_one_batch_each_class_is_judged_for_itself() -> None:
    world = make_world(verified=(1.0, 2.0))
    world.run(3000, {CODE: (2.0, 1.1), CHAT: (1.0, 2.0)})
    trust = {(mode, name): track.trust for mode, name, _, track in world.guard.states()}
    assert trust == {CODE: Trust.ON, CHAT: Trust.OFF, (Mode.EXACT, "chat"): Trust.OFF}
    assert world.run(2000, {CODE: (2.0, 1.1), CHAT: (1.0, 2.0)}) > 1.3


def gate(guard: Guard, name: str, batch: int) -> Trust:
    """Whether the only gate that was judged, which is this one, is open."""
    ((found, size, trust, _),) = guard.gates()
    assert (found, size) == (name, batch)
    return trust


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize(("gain", "trust"), [(1.15, Trust.ON), (0.9, Trust.OFF)])
def test_the_gate_is_open_only_where_that_is_faster(batch: int, gain: float, trust: Trust) -> None:
    """`exact` yields 1.6 tokens a step for 1.2 of the time; with the gate open both are more. Wrong steps are rare and
    cost little, those in which the guard learns among them. (Noise alone costs 4 % of the speedup.)"""
    world = make_world(batch=batch, noise=0.2, verified=(1.6, 1.2))
    drafts = {CHAT: (1.9, 1.9 / 1.6 * 1.2 / gain)}
    better = max(gain, 1) * 1.6 / 1.2
    assert world.run(12_000, drafts) > 0.92 * better
    assert gate(world.guard, "chat", world.batch) is trust
    assert world.run(10_000, drafts) > 0.94 * better
    assert world.opened["chat", trust is Trust.OFF] < 0.05 * world.opened.total()


def test_a_gate_that_brings_nothing_is_shut() -> None:
    """In 19 of 20 worlds, for most of the time: the risk must buy something."""
    opened = Counter[bool]()
    for seed in range(20):
        world = make_world(seed, batch=8, verified=(1.6, 1.2))
        world.run(4000, {CHAT: (1.6, 1.2)})
        opened[gate(world.guard, "chat", world.batch) is Trust.ON] += 1
    assert opened[True] <= 2


def test_a_gate_of_no_effect_is_shut_after_so_many_blocks() -> None:
    """Now a little faster open, now a little slower: never sure, and not left open for ever."""
    track, verdicts = GateTrack(), list[Trust]()
    for block in range(GATE_BLOCKS):
        for shut, seconds in ((True, 1.2), (False, 1.1 if block % 2 else 1.3)):
            for _ in range(GATE_STEPS):
                track.book(Share(expected=1.0, seconds=seconds, gain=0.6, share=1.0), shut, level=1.0)
        verdicts.append(track.trust)
    assert set(verdicts[:-1]) == {Trust.UNSURE}
    assert verdicts[-1] is Trust.OFF


def test_a_gate_is_opened_again() -> None:
    world = make_world(batch=8, verified=(1.6, 1.2))
    world.run(4000, {CHAT: (1.6, 1.4)})
    assert gate(world.guard, "chat", world.batch) is Trust.OFF
    world.run(60_000, {CHAT: (2.2, 1.3)})
    assert gate(world.guard, "chat", world.batch) is Trust.ON


def test_a_gate_is_judged_by_its_class_alone() -> None:
    """Beside the drafts of another class, and beside `exact` texts of its own."""
    world = make_world(verified=(1.6, 1.2))
    world.run(6000, {CHAT: (2.2, 1.2), (Mode.EXACT, "chat"): (1.6, 1.2), CODE: (1.5, 1.1)})
    assert gate(world.guard, "chat", world.batch) is Trust.ON


def test_where_only_one_kind_of_draft_pays_the_other_is_not_waited_for() -> None:
    """Against plain steps drafts pay with the gate shut alone: no open step can be booked but probes."""
    world = make_world(verified=(1.6, 1.2))
    world.run(1000, {CHAT: (1.0, 3.0)})
    assert world.run(4000, {CHAT: (1.0, 3.0)}) > 0.9 * 1.6 / 1.2
    assert world.opened["chat", True] < 0.05 * world.opened.total()


def test_batch_sizes_are_judged_for_themselves() -> None:
    world = make_world()
    for _ in range(200):
        world.batch = 1
        world.run(4, {CODE: (2.0, 1.1)})
        world.batch = 32
        world.run(4, {CODE: (1.0, 2.0)})
    assert {size: track.trust for _, _, size, track in world.guard.states()} == {1: Trust.ON, 32: Trust.OFF}


def test_the_baseline_is_the_plain_step() -> None:
    world = make_world(noise=0.01)
    assert world.guard.full_step(32) is None
    world.run(100, {CODE: (2.0, 1.2)})
    assert world.guard.full_step(32) == pytest.approx(3 * 0.01 * 2**0.5, rel=0.1)


class Clock(Runner):
    """Time that passes by the passes alone. lie: what a draft step really costs. long: what each token of a full pass
    beyond five costs."""

    def __init__(self, lie: float) -> None:
        self.now, self.drafting, self.lie, self.long = 0.0, 0.0, lie, 0.0
        self.inner = make_runner()
        self.graphs, self.cache = self.inner.graphs, self.inner.cache
        self.verify = self.inner.verify

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        self.now += 1.0 + self.long * max(0, len(rows) - 5)
        return self.inner.forward(graph, batch, rows)

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        drafts = self.inner.draft(graph, batch, plan)
        took = self.lie * max(len(draft.tokens) for draft in drafts)
        self.now += took
        self.drafting += took
        return drafts


def tick(monkeypatch: pytest.MonkeyPatch, lie: float, options: Options | None = None) -> tuple[Clock, Engine]:
    """An engine that believes drafts to be cheap, and time that knows better."""
    clock = Clock(lie)
    monkeypatch.setattr("server.engine.engine.time", clock)
    monkeypatch.setattr("server.engine.cycle.time", clock)
    options = options or Options(run_limit=6, seed=0)
    engine = make_engine(options, runner=clock, guard=Guard(FixedCost().table(FULL)))  # type: ignore[arg-type]
    return clock, engine


@pytest.mark.parametrize(
    ("long", "trust", "why"),
    [
        (0.05, Trust.ON, None),
        (0.7, Trust.OFF, "routed is not surely faster than exact here: 0."),
        (4.0, Trust.OFF, "routed is slower than the full model here"),
    ],
)
def test_routed_texts_are_verified_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, long: float, trust: Trust, why: str | None
) -> None:
    """A draft that emits runs of sixteen, held tokens being four at most: what a full pass over many tokens costs
    decides, and the response tells."""
    clock, engine = tick(monkeypatch, 0.02, Options(max_draft=4, run_limit=16, seed=0))
    clock.long = long
    request = make_request(mode=Mode.ROUTED, class_name="lame", max_tokens=240, threshold=0.0, temperature=1.0)
    for _ in range(20):
        got = decode(engine, request)[0]
        if gate(engine.guard, "lame", 1) is not Trust.UNSURE:
            break
    got = decode(engine, request)[0]
    assert gate(engine.guard, "lame", 1) is trust
    assert got.ran.mode == Mode.ROUTED
    if why is None:
        assert got.ran.unverified > 0.5 * got.ran.tokens
        assert got.ran.bypass is None
    else:
        assert got.ran.unverified < 0.2 * got.ran.tokens
        assert str(got.ran.bypass).startswith(why)


@pytest.mark.parametrize("mode", [Mode.EXACT, Mode.ROUTED])
def test_drafts_that_cost_too_much_are_off(monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    request = make_request(mode=mode, max_tokens=240, threshold=0.0)
    expected = decode_full(request)[0].ids
    clock, engine = tick(monkeypatch, lie=1.2)
    for _ in range(2):
        decode(engine, request)
    assert {track.trust for *_, track in engine.guard.states()} == {Trust.OFF}
    before = clock.now, clock.drafting
    got = [decode(engine, request)[0] for _ in range(3)][-1]
    assert clock.drafting - before[1] < 0.04 * (clock.now - before[0])
    if mode == Mode.EXACT:
        assert got.ids == expected


def test_drafts_that_pay_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = tick(monkeypatch, lie=0.05)
    request = make_request(max_tokens=240)
    decode(engine, request)
    got = decode(engine, request)[0]
    assert [track.trust for *_, track in engine.guard.states()] == [Trust.ON]
    assert got.ran.speedup is not None
    assert got.ran.speedup > 2


def test_other_drafts_are_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, engine = tick(monkeypatch, lie=1.2)
    decode(engine, make_request(mode=Mode.ROUTED, max_tokens=60, threshold=0.0))
    assert engine.guard.states()
    assert engine.guard.gates()
    engine.swap(Drafts(clock, engine.classes, FixedCost(), None, {}))  # type: ignore[arg-type]
    engine.step()
    assert not engine.guard.states()
    assert not engine.guard.gates()
