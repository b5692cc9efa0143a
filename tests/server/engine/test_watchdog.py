"""An engine that is stuck or gone is noticed, and nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from server.engine.engine import Engine
from server.engine.request import Unavailable
from server.engine.watchdog import Watchdog
from tests.server.engine.harness import Got, make_engine, make_request


class Lost:
    """Takes the reason for which an engine was given up."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.told.set()


def wait_for_end(engine: Engine) -> tuple[Callable[..., None], threading.Event]:
    done, got = threading.Event(), Got()
    got.handle = None

    def receive(update: object) -> None:
        got.errors.append(update) if isinstance(update, Exception) else None
        done.set() if got.errors else None

    engine.submit(make_request(max_tokens=200), receive)
    return got, done


def test_a_stuck_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, lost, go_on = make_engine(), Lost(), threading.Event()
    passes, full_pass = [], engine.cycle.full_pass

    def stick(plan: object) -> object:
        passes.append(1)
        if len(passes) == 3:
            go_on.wait(60)
        return full_pass(plan)

    monkeypatch.setattr(engine.cycle, "full_pass", stick)
    engine.start()
    watchdog = Watchdog(engine, 0.4, lost)
    got, done = wait_for_end(engine)
    assert lost.told.wait(30)
    assert done.wait(30)
    assert lost.reasons == ["the engine is stuck: a step has taken more than 0.4 seconds"]
    assert isinstance(got.errors[0], Unavailable)
    assert "stuck" in str(got.errors[0])
    assert not engine.ready
    with pytest.raises(Unavailable):
        engine.submit(make_request(), print)
    engine.stop()  # does not wait for a thread that may never end
    go_on.set()
    engine._loop_done.exception(30)
    assert len(got.errors) == 1
    watchdog.stop()


def test_a_thread_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, lost = make_engine(), Lost()

    def die() -> None:
        raise SystemExit("gone")

    monkeypatch.setattr(engine, "step", die)
    engine.start()
    Watchdog(engine, 60, lost)
    _, done = wait_for_end(engine)
    assert lost.told.wait(30)
    assert done.wait(30)
    assert lost.reasons == ["the engine's thread died: SystemExit: gone"]


def test_an_idle_engine_is_left_alone() -> None:
    engine, lost = make_engine(), Lost()
    engine.start()
    watchdog = Watchdog(engine, 0.2, lost)
    assert not lost.told.wait(0.6)
    watchdog.stop()
    engine.stop()
    assert engine.death is None
    assert lost.reasons == []
