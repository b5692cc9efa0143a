"""An engine that plays a script, and a server around it on a real socket: the API's test partner."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import uvicorn
from fastapi import FastAPI

from server.api.served import Served
from server.engine.grammar import Grammars
from server.engine.request import Deliver, Mode, Ran, Request, Update
from server.metrics import Metrics
from tests.tiny import make_tokenizer

PIECES = ("Hel", "lo, ", "wörld")
CONTEXT = 64
CLASSES = ("code", "chat")


class FakeHandle:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Continues every prompt with `pieces`, one update each, or with `updates` as they are.

    refusal: raised by `submit`. failure: delivered after the first piece. endless: repeats the first until cancelled.
    room: requests it takes in all.
    """

    def __init__(
        self,
        pieces: tuple[str, ...] = PIECES,
        refusal: Exception | None = None,
        failure: Exception | None = None,
        endless: bool = False,
        updates: Sequence[Update] | None = None,
        room: int | None = None,
    ) -> None:
        ends = [None] * (len(pieces) - 1) + ["stop"]
        spoken = [Update([i], [i > 0], piece, end) for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))]
        self.updates = spoken if updates is None else updates
        self.refusal, self.failure, self.endless, self.room = refusal, failure, endless, room
        self.running, self.proven = False, True
        self.requests: list[Request] = []
        self.handles: list[FakeHandle] = []
        self.threads: list[threading.Thread] = []

    @property
    def ready(self) -> bool:
        return self.running and self.proven

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False
        for handle in self.handles:
            handle.cancel()
        for thread in self.threads:
            thread.join(10)

    def submit(self, request: Request, deliver: Deliver) -> FakeHandle:
        if self.refusal is not None:
            raise self.refusal
        if len(self.requests) == self.room:
            raise RuntimeError("full")
        handle = FakeHandle()
        self.requests.append(request)
        self.handles.append(handle)
        thread = threading.Thread(target=self._play, args=(request, deliver, handle), daemon=True)
        self.threads.append(thread)
        thread.start()
        return handle

    def _play(self, request: Request, deliver: Deliver, handle: FakeHandle) -> None:
        while self.endless and not handle.cancelled.wait(0.005):
            deliver(self.updates[0])
        if handle.cancelled.is_set():
            return
        for update in self.updates:
            deliver(replace(update, ran=make_ran(request)) if update.finish else update)
            if self.failure is not None:
                deliver(self.failure)
                return


def make_ran(request: Request) -> Ran:
    """The accounts of a scripted text."""
    mode = Mode.EXACT if request.mode == Mode.AUTO else request.mode
    return Ran(
        mode=mode,
        class_name=request.class_name or "pooled",
        prompt_tokens=len(request.prompt),
        tokens=len(PIECES),
        drafts=2,
        drafted=4,
        accepted=3,
        accepted_at=[2, 1],
        fallbacks=1,
        seconds=0.5,
        full_seconds=1.0,
        cached_tokens=2,
    )


def make_served(engine: FakeEngine, chat_template: bool = True) -> Served:
    """A served model named `tiny` whose tokens are bytes."""
    tokenizer = make_tokenizer() if chat_template else make_tokenizer(None)
    grammars = Grammars(tokenizer.backend_tokenizer, 259, [257])
    return Served("tiny", engine, tokenizer, 259, CONTEXT, CLASSES, Metrics(), grammars, max_queue=4)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a socket of this machine; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        listener.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Return once `condition` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
