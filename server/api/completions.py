"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from server.api.chat import STREAM
from server.api.errors import DOCUMENTED, invalid
from server.api.generation import Generation, count_usage, event_stream, final_ran, report, while_connected
from server.api.protocol import Completion, CompletionChoice, CompletionRequest, StraceReport
from server.api.served import Served, served_model
from server.engine import request as engine

router = APIRouter()


def prepare(served: Served, body: CompletionRequest, id: str) -> list[engine.Request]:
    """The engine's requests, one per prompt."""
    served.route(body.model, body.strace)
    if not body.prompts:
        raise invalid("the prompt is empty", "prompt")
    if len(body.prompts) > served.max_queue:
        raise invalid(f"{len(body.prompts)} prompts are more than the queue holds ({served.max_queue})", "prompt")
    return [
        served.make_request(
            body, served.encode_prompt(prompt), body.max_tokens, body.DEFAULT_LIMIT, "prompt", f"{id}-{index}"
        )
        for index, prompt in enumerate(body.prompts)
    ]


@router.post("/v1/completions", response_model=Completion, responses={200: {"content": STREAM}, **DOCUMENTED})
async def create_completion(body: CompletionRequest, request: Request) -> Completion | Response:
    """Continue one text, or several."""
    served = served_model(request)
    served.require_ready()
    id = f"cmpl-{request.state.request_id}"
    requests = await run_in_threadpool(prepare, served, body, id)
    generation = Generation(served.engine, requests)
    if body.stream:
        return event_stream(generation, _chunks(generation, body, id), served.metrics)
    with generation:
        results = await while_connected(request, generation.collect())
    rans = [final_ran(last) for _, last in results]
    choices = [
        CompletionChoice(index=index, text=text, finish_reason=last.finish)
        for index, (text, last) in enumerate(results)
    ]
    return Completion(
        id=id,
        created=int(time.time()),
        model=body.model,
        choices=choices,
        usage=count_usage(rans),
        strace=reports(rans),
    )


def reports(rans: Sequence[engine.Ran]) -> StraceReport | list[StraceReport]:
    """One report for one prompt, else one per prompt."""
    return report(rans[0]) if len(rans) == 1 else [report(ran) for ran in rans]


async def _chunks(generation: Generation, body: CompletionRequest, id: str) -> AsyncIterator[Completion]:
    """Text as it comes, each prompt's finish reason with its last piece; the last chunk says what ran."""
    chunk: Callable[..., Completion] = partial(Completion, id=id, created=int(time.time()), model=body.model)
    rans: dict[int, engine.Ran] = {}
    async for index, update in generation.updates():
        choice = CompletionChoice(index=index, text=update.text, finish_reason=update.finish)
        if update.finish is not None:
            rans[index] = final_ran(update)
        ended = len(rans) == len(body.prompts)
        if ended and not body.wants_usage:
            yield chunk(choices=[choice], strace=reports([rans[i] for i in sorted(rans)]))
        elif update.text or update.finish:
            yield chunk(choices=[choice])
    if body.wants_usage:
        ordered = [rans[i] for i in sorted(rans)]
        yield chunk(choices=[], usage=count_usage(ordered), strace=reports(ordered))
