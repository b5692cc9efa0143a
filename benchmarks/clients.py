"""Clients that stream completions over HTTP, so many at a time, each asking again as soon as it is answered.

They share the machine with the server, so they do little: a line that begins with `data: ` is an event, and only the
last one is parsed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """One streamed answer: when it was asked for, when each event with text came, tokens, what the server says ran."""

    asked: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    ran: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.events[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in pairwise(self.events)]


def load(address: str, bodies: Iterable[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """All bodies asked by so many clients side by side: the answers, and the seconds that it took."""
    return asyncio.run(_load(address, iter(bodies), clients))


async def _load(address: str, bodies: Iterator[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    answers: list[Answer] = []

    async def work() -> None:
        for body in bodies:
            answers.append(await ask(address, body))

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return answers, time.perf_counter() - begun


async def ask(address: str, body: dict[str, Any]) -> Answer:
    """Stream one completion.

    Raises:
        RuntimeError: with what the server says, if it does not answer or does not count its tokens.
    """
    place, content = urlsplit(address), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    answer = Answer(time.perf_counter())
    writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    status, last = await reader.readline(), b""
    while line := await reader.readline():
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            answer.events.append(time.perf_counter())
            last = line
    writer.close()
    if b" 200 " not in status or not last:
        raise RuntimeError(f"{address} answered {status.decode().strip() or 'nothing'}")
    told = json.loads(last.removeprefix(b"data: "))
    if not told.get("usage"):
        raise RuntimeError(f"{address} ended with {last[:200].decode()}")
    if len(answer.events) > 1:  # an empty text has no other
        answer.events.pop()  # which has the counts and no text
    answer.tokens, answer.ran = told["usage"]["completion_tokens"], told.get("strace") or {}
    return answer
