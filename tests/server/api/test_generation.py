"""A stream that nobody reads any more leaves nothing in the engine, whenever its reader went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Send

from server.api import generation as module
from server.api.generation import Generation, Mailbox, Template, event_stream
from server.api.protocol import ChatChunk, ChunkChoice, Delta, Health, Reply
from server.engine.request import Request
from server.metrics import Metrics
from strace.sampling import SamplingParams
from tests.server.api.fake import FakeEngine


@given(st.text())
def test_a_template_writes_what_the_chunk_itself_does(text: str) -> None:
    def make(content: str) -> ChatChunk:
        return ChatChunk(id="x", created=1, model='a "b"', choices=[ChunkChoice(index=0, delta=Delta(content=content))])

    assert Template(make).fill(text) == make(text).model_dump_json()


async def stream(engine: FakeEngine, receive: Receive, send: Send) -> None:
    """Send one event per update of an endless text."""
    generation = Generation(engine, [Request("x", [1], SamplingParams(), 8)])

    async def chunks() -> AsyncIterator[Reply]:
        async for _ in generation.updates():
            yield Health()

    await event_stream(generation, chunks(), Metrics())({"type": "http", "method": "POST"}, receive, send)


async def stay() -> Message:
    await asyncio.sleep(60)
    raise AssertionError("the stream outlived its reader")


async def leave() -> Message:
    return {"type": "http.disconnect"}


async def fail(message: Message) -> None:
    if message.get("body"):
        raise ConnectionResetError("the line is cut")


async def block(message: Message) -> None:
    await asyncio.sleep(60)


def test_line_cut_while_sending() -> None:
    engine = FakeEngine(endless=True)
    with pytest.raises(ConnectionResetError):
        asyncio.run(stream(engine, stay, fail))
    assert engine.handles[0].cancelled.is_set()
    engine.stop()


def test_reader_gone_before_the_first_event() -> None:
    engine = FakeEngine(endless=True)
    asyncio.run(stream(engine, leave, block))
    assert engine.handles[0].cancelled.is_set()
    engine.stop()


def test_a_long_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a long prompt is read. Comments are no events, so clients see none of them."""
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.05)
    sent: list[bytes] = []

    async def note(message: Message) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 4:
            raise ConnectionResetError

    engine = FakeEngine(updates=[])
    with pytest.raises(ConnectionResetError):
        asyncio.run(stream(engine, stay, note))
    assert len(sent) == 4
    assert all(line.startswith(b": ") and line.endswith(b"\n\n") for line in sent[1:])
    assert engine.handles[0].cancelled.is_set()


def test_what_comes_together_wakes_the_loop_once() -> None:
    class Loop:
        def __init__(self) -> None:
            self.called: list[Callable[[], None]] = []

        def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
            self.called.append(callback)

    loop, got = Loop(), list[int]()
    mailbox = Mailbox(loop)
    for round in range(2):
        for number in range(3):
            mailbox.put(partial(got.append, 3 * round + number))
        assert len(loop.called) == round + 1
        loop.called[-1]()
    assert got == list(range(6))


def test_failed_submission_cancels_the_earlier_ones() -> None:
    async def submit(engine: FakeEngine) -> None:
        Generation(engine, [Request(str(i), [1], SamplingParams(), 8) for i in range(2)])

    engine = FakeEngine(endless=True, room=1)
    with pytest.raises(RuntimeError, match="full"):
        asyncio.run(submit(engine))
    assert engine.handles[0].cancelled.is_set()
    engine.stop()
