"""The ASGI application: one served model, its routes, and the engine's life."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from server.api import chat, completions, health, models, responses, tokenization
from server.api.errors import install_errors
from server.api.gate import Gate
from server.api.generation import ClientGone
from server.api.served import Served

CLIENT_CLOSED_REQUEST = 499


def create_app(
    served: Served, api_keys: Sequence[str] = (), max_body_bytes: int = 4 * 2**20, cors_origins: Sequence[str] = ()
) -> FastAPI:
    """The application that serves `served`; its engine runs from startup to shutdown.

    api_keys: those accepted, none to let everyone in. cors_origins: whose web pages may ask (`*`: anyone's).
    """

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
    for part in (chat, completions, responses, models, tokenization, health):
        app.include_router(part.router)
    install_errors(app, served.metrics)
    app.add_exception_handler(ClientGone, _nobody_reads)
    app.add_middleware(Gate, metrics=served.metrics, api_keys=api_keys, max_body_bytes=max_body_bytes)
    if cors_origins:
        # Outermost, since browsers ask without a key whether they may.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


async def _nobody_reads(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
