"""GET /health, /health/live, /health/ready, /metrics and /version: what operators and their tools ask."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.api.errors import DOCUMENTED
from server.api.protocol import Health, Version
from server.api.served import served_model

PROMETHEUS: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
router = APIRouter(responses=DOCUMENTED)


@router.get("/health/live")
async def live() -> Health:
    """200 as long as the process answers."""
    return Health()


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Health:
    """200 once the model has really produced a token, while the engine works; else 503."""
    served_model(request).require_ready()
    return Health()


@router.get("/metrics", response_class=Response, responses={200: {"content": PROMETHEUS}})
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(generate_latest(served_model(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def get_version() -> Version:
    """The server's version."""
    return Version(version=version("strace-llm"))
