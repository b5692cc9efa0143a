"""What the engine tells whoever counts; it knows nothing of metrics itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from server.engine.request import Ran
from server.engine.sequence import Times


@dataclass(frozen=True)
class Step:
    """One turn of the engine: how long it took, the sequences it decoded, the prompt tokens it read, the tokens it
    emitted; the part of its time that was the runner's, and the passes of each graph.
    """

    seconds: float
    decoding: int
    prompt_tokens: int
    tokens: int
    runner_seconds: float
    passes: Mapping[str, int]


class Observer(Protocol):
    """Called in the engine's thread; must be quick and must not raise."""

    def on_step(self, step: Step) -> None: ...

    def on_finish(self, ran: Ran, times: Times, outcome: str) -> None:
        """outcome: `stop`, `length`, `cancelled` or `error`."""


class Nobody:
    """The observer that only looks away."""

    def on_step(self, step: Step) -> None: ...

    def on_finish(self, ran: Ran, times: Times, outcome: str) -> None: ...
