"""Notices that an engine's thread is stuck in a step, or gone: it cannot say so itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    """What is asked of an engine."""

    @property
    def busy_seconds(self) -> float:
        """How long the step in progress has taken; 0 while there is none."""

    @property
    def death(self) -> str | None:
        """Why its thread has ended without being told to, if it has."""

    def abandon(self, reason: str) -> None:
        """Give everything up without the engine's thread."""


class Watchdog:
    """Watches from a thread of its own until the engine is lost, which `lost` is told once with the reason, or until
    `stop`. step_timeout: most seconds of a step."""

    def __init__(self, engine: Watched, step_timeout: float, lost: Callable[[str], None]) -> None:
        self._engine, self._timeout, self._lost = engine, step_timeout, lost
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look away: what happens now is meant to."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 4)):
            if (reason := self._find_fault()) is not None:
                self._lost(reason)  # before all else, for what is stuck may hold the engine's lock
                self._engine.abandon(reason)
                return

    def _find_fault(self) -> str | None:
        if (death := self._engine.death) is not None:
            return f"the engine's thread died: {death}"
        if self._engine.busy_seconds > self._timeout:
            return f"the engine is stuck: a step has taken more than {self._timeout:g} seconds"
        return None
