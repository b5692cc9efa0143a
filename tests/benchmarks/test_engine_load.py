"""Many users over HTTP: what a streamed answer is read as, and what the rows say of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from clients import Answer, load
from engine import PEER, Cell, percentiles, summarise

PIECES = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}]
COUNTED = {"choices": [], "usage": {"completion_tokens": 3}, "strace": {"unverified": 1}}


@contextmanager
def server(*lines: str, status: str = "200 OK") -> Iterator[tuple[str, list[str]]]:
    """Answers everything with these lines as chunks; its address, and the bodies that it was sent."""
    bodies: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        bodies.append((await reader.readexactly(int(head.split("Content-Length: ")[1].split()[0]))).decode())
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for line in lines:
            writer.write(f"{len(line) + 2:x}\r\n{line}\n\n\r\n".encode())
        writer.write(b"0\r\n\r\n")
        writer.close()

    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", bodies
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_answers_are_read() -> None:
    lines = [f"data: {json.dumps(piece)}" for piece in (*PIECES, COUNTED)]
    with server(*lines, ": ping", "data: [DONE]") as (address, bodies):
        answers, seconds = load(address, [{"prompt": str(i)} for i in range(5)], 2)
    assert [json.loads(body)["prompt"] for body in sorted(bodies)] == list("01234")
    assert [(len(answer.events), answer.tokens, answer.ran) for answer in answers] == [(2, 3, {"unverified": 1})] * 5
    assert all(0 < answer.first < seconds and len(answer.gaps) == 1 for answer in answers)


@pytest.mark.parametrize(
    ("lines", "status", "told"),
    [
        ([], "429 Too Many Requests", "answered HTTP/1.1 429"),
        (["data: [DONE]"], "200 OK", "answered HTTP/1.1 200"),
        ([f"data: {json.dumps(piece)}" for piece in PIECES], "200 OK", "ended with"),
    ],
)
def test_a_server_that_fails_is_named(lines: list[str], status: str, told: str) -> None:
    with server(*lines, status=status) as (address, _), pytest.raises(RuntimeError, match=told):
        load(address, [{}], 1)


def test_rows() -> None:
    answers = [Answer(0.0, [0.1, 0.2, 0.4], 10, {"unverified": 5})]
    ours = Cell([10.0, 30.0, 20.0], 2.0, answers, Counter({"full": 4, "code": 8, "runner": 3.0, "engine": 1.0}))
    cells = {(2, "routed"): ours, (2, PEER): Cell([5.0, 10.0, 5.0], 4.0, [Answer(0.0, [0.1, 0.2, 0.4], 10)])}
    row, peer = summarise(cells, {"full": 100, "code": 25}, 1000.0)
    assert (row["tokens_per_s"], row["over_transformers"], row["outside"], row["unverified"]) == (20.0, 3.0, 0.25, 0.5)
    assert row["bandwidth_share"] == (4 * 100 + 8 * 25) / 2 / 1000
    assert peer["bandwidth_share"] == round(10 / 2 * 100 / 4 / 1000, 3)
    assert row["ttft_ms"] == percentiles([0.1, 0.1]) == [100.0] * 3
    assert row["itl_ms"] == percentiles([0.1, 0.2])
    assert "outside" not in peer
