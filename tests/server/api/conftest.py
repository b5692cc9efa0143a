"""Servers around a FakeEngine, started once per test module that asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import openai
import pytest

from server.api.served import Served
from server.app import create_app
from tests.server.api.fake import FakeEngine, make_served, serving


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def served(engine: FakeEngine) -> Served:
    return make_served(engine)


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    with serving(create_app(served, max_body_bytes=20_000)) as url:
        yield url


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def connect() -> Iterator[Callable[..., httpx.Client]]:
    """Starts a server of its own around a given engine and gives a client of it."""
    with ExitStack() as stack:

        def start(engine: FakeEngine, chat_template: bool = True, **options: object) -> httpx.Client:
            app = create_app(make_served(engine, chat_template), **options)  # type: ignore[arg-type]
            url = stack.enter_context(serving(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=20))

        yield start
