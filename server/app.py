"""The ASGI application: one served model, its routes, and the engine's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response

from server.api import chat, completions, health, models
from server.api.errors import install_errors
from server.api.gate import Gate
from server.api.generation import ClientGone
from server.api.served import Served

CLIENT_CLOSED_REQUEST = 499


def create_app(served: Served, api_key: str | None = None, max_body_bytes: int = 4 * 2**20) -> FastAPI:
    """The application that serves `served`; its engine runs from startup to shutdown."""

    @asynccontextmanager
    async def run_engine(app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        try:
            yield
        finally:
            served.engine.stop()

    # Without the interactive pages: they load scripts from elsewhere.
    app = FastAPI(title="strace-llm", version=version("strace-llm"), lifespan=run_engine, docs_url=None, redoc_url=None)
    app.state.served = served
    for part in (chat, completions, models, health):
        app.include_router(part.router)
    install_errors(app, served.metrics)
    app.add_exception_handler(ClientGone, _nobody_reads)
    app.add_middleware(Gate, metrics=served.metrics, api_key=api_key, max_body_bytes=max_body_bytes)
    return app


async def _nobody_reads(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
