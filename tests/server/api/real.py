"""A served model with a real engine of a tiny random model behind it, and an engine that stands still on demand."""

from __future__ import annotations

import threading

from server.api.output import CallFormat
from server.api.served import Served
from server.engine.engine import Engine
from server.engine.grammar import Grammars
from server.engine.observer import Nobody, Step
from server.metrics import Metrics
from strace import native
from tests.server.engine.harness import CONTEXT, VOCABULARY
from tests.tiny import make_tokenizer

EOS = 257
KIND = "native" if native.available() else "torch"


def make_real(
    engine: Engine, template: str, calls: CallFormat | None = None, thinks: bool = False, context: int = CONTEXT
) -> Served:
    """The tiny model, named `tiny`, of an engine that ends texts at `EOS`."""
    tokenizer = make_tokenizer(template)
    return Served(
        "tiny",
        engine,
        tokenizer,
        VOCABULARY,
        context,
        engine.classes,
        Metrics(),
        Grammars(tokenizer.backend_tokenizer, VOCABULARY, [EOS]),
        max_queue=engine.options.max_waiting,
        calls=calls,
        thinks=thinks,
    )


class Brake(Nobody):
    """An observer that holds the engine's thread at the end of each step until it is let on."""

    def __init__(self) -> None:
        self.steps = 0
        self._permits = threading.Semaphore(0)
        self._off = False

    def on_step(self, step: Step) -> None:
        self.steps += 1
        if not self._off:
            self._permits.acquire()

    def let(self) -> None:
        """One more step."""
        self._permits.release()

    def release(self) -> None:
        """From now on the engine runs freely."""
        self._off = True
        self._permits.release()
