"""A crowd before a real engine: who comes too late is told so at once, and who leaves frees its place within a step."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.engine.engine import Engine
from server.engine.options import Options
from tests.server.api.fake import serving, wait_for
from tests.server.api.real import Brake, make_real
from tests.server.api.test_bad_input import check_error
from tests.server.engine.harness import make_engine, make_request

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "go"}]},
    COMPLETIONS: {"model": "tiny", "prompt": "go"},
    RESPONSES: {"model": "tiny", "input": "go"},
}
WAITING = 12


@contextmanager
def standing() -> Iterator[tuple[str, Engine, Brake]]:
    """A server whose engine makes a step only when it is let."""
    brake = Brake()
    engine = make_engine(Options(max_running=4, max_waiting=WAITING, seed=0, prefix_cache=False), observer=brake)
    with serving(create_app(make_real(engine, TEMPLATE))) as url:
        try:
            yield url, engine, brake
        finally:
            brake.release()


def test_a_thousand_too_many() -> None:
    """The engine stands still while all of them are answered, so none has waited for it; what waited then finishes."""

    async def crowd(url: str, engine: Engine, brake: Brake) -> tuple[list[httpx.Response], list[httpx.Response]]:
        body = BODIES[COMPLETIONS] | {"max_tokens": 8, "seed": 3, "ignore_eos": True}
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            early = [asyncio.create_task(http.post(COMPLETIONS, json=body))]
            while brake.steps < 1:
                await asyncio.sleep(0.01)
            early += [asyncio.create_task(http.post(COMPLETIONS, json=body)) for _ in range(WAITING)]
            while engine.stats().waiting < WAITING:
                await asyncio.sleep(0.01)
            paths = [[CHAT, COMPLETIONS, RESPONSES][i % 3] for i in range(1000)]
            bodies = [BODIES[path] | {"stream": i % 2 == 0} for i, path in enumerate(paths)]
            late = await asyncio.gather(*(http.post(p, json=b) for p, b in zip(paths, bodies, strict=True)))
            assert brake.steps == 1
            brake.release()
            return await asyncio.gather(*early), late

    with standing() as (url, engine, brake):
        early, late = asyncio.run(crowd(url, engine, brake))
        for response in late:
            check_error(response, 429, None, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        assert [response.status_code for response in early] == [200] * (WAITING + 1)
        assert len({response.json()["choices"][0]["text"] for response in early}) == 1
        assert {response.json()["usage"]["completion_tokens"] for response in early} == {8}
        wait_for(lambda: engine.idle)
        assert engine.stats().blocks_used == 0


def ask_raw(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A request sent on a line of its own."""
    host, port = url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    line.sendall(head.encode() + content)
    return line


def step(brake: Brake) -> None:
    """One step, to its end."""
    before = brake.steps
    brake.let()
    wait_for(lambda: brake.steps == before + 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_who_leaves_frees_its_place_within_a_step(path: str, stream: bool) -> None:
    """The engine stands while the client leaves; in the next step it makes that text has no part, and no block."""
    with standing() as (url, engine, brake):
        engine.submit(make_request(max_tokens=200), lambda update: None)
        wait_for(lambda: brake.steps == 1)
        line = ask_raw(url, path, BODIES[path] | {"stream": stream})
        wait_for(lambda: engine.stats().waiting == 1)
        for _ in range(3):
            step(brake)
        staying, leaving = engine.scheduler.running
        assert engine.stats().blocks_used == len(staying.blocks) + len(leaving.blocks)
        assert not leaving.cancelled
        line.close()
        wait_for(lambda: leaving.cancelled)
        step(brake)
        assert engine.scheduler.running == [staying]
        assert engine.stats().blocks_used == len(staying.blocks)
