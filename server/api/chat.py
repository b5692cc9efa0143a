"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from server.api.errors import DOCUMENTED
from server.api.generation import Generation, count_usage, event_stream, final_ran, report, while_connected
from server.api.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from server.api.served import Served, served_model
from server.engine import request as engine

router = APIRouter()
STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string", "description": "chunks, then [DONE]"}}}


def prepare(served: Served, body: ChatRequest, id: str) -> engine.Request:
    """The engine's request for a conversation."""
    served.route(body.model, body.strace)
    prompt = served.encode_chat(body.messages)
    return served.make_request(body, prompt, body.limit, None, "messages", id)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: {"content": STREAM}, **DOCUMENTED})
async def create_chat_completion(body: ChatRequest, request: Request) -> ChatCompletion | Response:
    """Answer a conversation."""
    served = served_model(request)
    served.require_ready()
    id = f"chatcmpl-{request.state.request_id}"
    generation = Generation(served.engine, [await run_in_threadpool(prepare, served, body, id)])
    if body.stream:
        return event_stream(generation, _chunks(generation, body, id), served.metrics)
    with generation:
        ((text, last),) = await while_connected(request, generation.collect())
    ran = final_ran(last)
    message = AssistantMessage(content=text)
    return ChatCompletion(
        id=id,
        created=int(time.time()),
        model=body.model,
        choices=[ChatChoice(index=0, message=message, finish_reason=last.finish)],
        usage=count_usage([ran]),
        strace=report(ran),
    )


async def _chunks(generation: Generation, body: ChatRequest, id: str) -> AsyncIterator[ChatChunk]:
    """Role, text as it comes, finish reason, usage if asked for; the last one says what ran."""
    chunk: Callable[..., ChatChunk] = partial(ChatChunk, id=id, created=int(time.time()), model=body.model)
    yield chunk(choices=[ChunkChoice(index=0, delta=Delta(role="assistant", content=""))])
    async for _, update in generation.updates():
        if update.text:
            yield chunk(choices=[ChunkChoice(index=0, delta=Delta(content=update.text))])
        if update.finish is None:
            continue
        ran = final_ran(update)
        end = [ChunkChoice(index=0, delta=Delta(), finish_reason=update.finish)]
        if body.wants_usage:
            yield chunk(choices=end)
            yield chunk(choices=[], usage=count_usage([ran]), strace=report(ran))
        else:
            yield chunk(choices=end, strace=report(ran))
