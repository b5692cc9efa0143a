"""The life of a server's process: told to stop it drains, without its engine it ends, on SIGHUP it reads its subgraphs
again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn

from server.api.generation import SEND_SECONDS
from server.engine.watchdog import Watchdog, Watched

logger = logging.getLogger(__name__)


class Engine(Watched, Protocol):
    """What the process asks of an engine."""

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""

    def drain(self) -> None:
        """Take no more requests."""

    def stop(self) -> None:
        """End the work; requests still in it get an exception."""


class Server(uvicorn.Server):
    """uvicorn's server around an engine.

    drain_timeout: seconds that requests get to finish once the process was told to stop. step_timeout: most seconds of
    a step of the engine. reload: reads the subgraphs again and says what there is now; it raises if that cannot be
    done, and then nothing has changed.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        drain_timeout: float,
        step_timeout: float,
        reload: Callable[[], str],
    ) -> None:
        super().__init__(config)
        self._engine, self._drain_timeout, self._step_timeout = engine, drain_timeout, step_timeout
        self._reload, self._reloading = reload, threading.Lock()
        self._leaving = self._lost = False

    def live(self, sockets: list[socket.socket]) -> None:
        """Run until told to stop. Ends the process with status 1 if the engine is lost."""
        # uvicorn raises a signal again once it has shut down; by then there is nothing left to interrupt.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: self._aside(self._read_again))
        watchdog = Watchdog(self._engine, self._step_timeout, self._lose)
        self.run(sockets=sockets)
        watchdog.stop()
        if self._lost:
            self._exit()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends it."""
        if self._leaving:
            super().handle_exit(sig, frame)
        else:
            self._leaving = True
            self._aside(self._drain)

    def _aside(self, task: Callable[[], None]) -> None:
        """In a thread: a signal may arrive while this one holds the engine's lock."""
        threading.Thread(target=task, daemon=True).start()

    def _drain(self) -> None:
        self._engine.drain()
        deadline = time.monotonic() + self._drain_timeout
        while not (self._engine.idle or self.should_exit) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._engine.idle:
            self._engine.stop()
        self.should_exit = True

    def _lose(self, reason: str) -> None:
        logger.critical("%s; the process ends", reason)
        self._lost = self.should_exit = True
        # Whatever hangs on the way out.
        timer = threading.Timer(2 * SEND_SECONDS, self._exit)
        timer.daemon = True
        timer.start()

    def _exit(self) -> None:
        """Without any cleaning up, which would wait for the thread that is stuck."""
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)

    def _read_again(self) -> None:
        with self._reloading:  # one after the other: what is read now may have changed since it was begun
            try:
                print(self._reload(), flush=True)
            except Exception as error:
                logger.error("the subgraphs could not be read again, those from before stay: %s", error)
