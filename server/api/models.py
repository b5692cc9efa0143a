"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.api.errors import DOCUMENTED
from server.api.protocol import ModelCard, ModelList, StraceOptions
from server.api.served import Served, served_model

router = APIRouter(responses=DOCUMENTED)


def card(served: Served, name: str) -> ModelCard:
    """One name as OpenAI describes a model."""
    return ModelCard(id=name, created=served.created, max_model_len=served.context)


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """The served name, alone and with every mode and class."""
    served = served_model(request)
    return ModelList(data=[card(served, name) for name in served.names])


@router.get("/v1/models/{id:path}")
async def get_model(id: str, request: Request) -> ModelCard:
    """One of the names."""
    served = served_model(request)
    served.route(id, StraceOptions())
    return card(served, id)
