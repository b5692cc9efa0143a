"""The one thread that touches the model, from loading it to the engine's last step.

OpenMP keeps a team of threads for every thread that calls it, and once there are more of them than processors it lets
all wait asleep instead of ready: a model that is loaded in one thread and run in another decodes at a third of its
speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs what it is given, one after the other, always in the same thread, which does not keep the process alive."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """The result to come of `task`, or its exception."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def _work(self) -> None:
        while True:
            future, task = self._tasks.get()
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
