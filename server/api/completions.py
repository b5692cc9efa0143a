"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from server.api.chat import STREAM
from server.api.errors import DOCUMENTED, invalid
from server.api.generation import (
    Generation,
    count_usage,
    event_stream,
    final_ran,
    reports,
    request_metrics,
    while_connected,
)
from server.api.logprobs import tell_completion
from server.api.protocol import Completion, CompletionChoice, CompletionRequest, RequestMetrics
from server.api.served import Served, served_model
from server.engine import request as engine
from server.engine.logprobs import TokenLogprob

router = APIRouter()


def prepare(served: Served, body: CompletionRequest, id: str) -> list[engine.Request]:
    """The engine's requests: for each prompt in turn, one per answer."""
    served.route(body.model, body.strace)
    if not body.prompts:
        raise invalid("the prompt is empty", "prompt")
    count = len(body.prompts) * body.n
    if count > served.max_queue:
        message = f"{len(body.prompts)} prompts x n = {body.n} are more than the queue holds ({served.max_queue})"
        raise invalid(message, "prompt" if len(body.prompts) > served.max_queue else "n")
    grammar = served.completion_grammar(body)
    return [
        request
        for index, prompt in enumerate(body.prompts)
        for request in served.make_requests(
            body, served.encode_prompt(prompt), body.max_tokens, body.DEFAULT_LIMIT, "prompt", f"{id}-{index}", grammar
        )
    ]


@router.post("/v1/completions", response_model=Completion, responses={200: {"content": STREAM}, **DOCUMENTED})
async def create_completion(body: CompletionRequest, request: Request) -> Completion | Response:
    """Continue one text, or several."""
    served = served_model(request)
    served.require_running()
    id = f"cmpl-{request.state.request_id}"
    requests = await run_in_threadpool(prepare, served, body, id)
    generation = Generation(served.engine, requests, served.timeout)
    if body.stream:
        return event_stream(generation, _chunks(generation, served, body, requests, id), served.metrics)
    with generation:
        results = await while_connected(request, generation.collect())
    rans = [final_ran(whole) for whole in results]
    choices = [
        _choose(served, body, index, asked.prompt, whole)
        for index, (asked, whole) in enumerate(zip(requests, results, strict=True))
    ]
    return Completion(
        id=id,
        created=int(time.time()),
        model=body.model,
        choices=choices,
        usage=count_usage(rans, body.n),
        strace=reports(rans),
        metrics=_metrics(served, body, rans),
    )


def _choose(
    served: Served, body: CompletionRequest, index: int, prompt: list[int], whole: engine.Update
) -> CompletionChoice:
    """One whole continuation, behind its prompt where that is asked for."""
    before = str(served.tokenizer.decode(prompt)) if body.echo else ""
    logprobs = None
    if body.logprobs is not None:
        told: list[TokenLogprob | int] = [prompt[0], *whole.prompt_logprobs] if body.echo else []
        logprobs = tell_completion(served.tokenizer, [*told, *whole.logprobs])
    return CompletionChoice(index=index, text=before + whole.text, logprobs=logprobs, finish_reason=whole.finish)


def _metrics(served: Served, body: CompletionRequest, rans: list[engine.Ran]) -> RequestMetrics | None:
    return request_metrics(rans, served.max_draft) if body.strace.metrics else None


async def _chunks(
    generation: Generation, served: Served, body: CompletionRequest, requests: list[engine.Request], id: str
) -> AsyncIterator[Completion]:
    """Text as it comes, each text's finish reason with its last piece; the last chunk says what ran."""
    chunk: Callable[..., Completion] = partial(Completion, id=id, created=int(time.time()), model=body.model)
    finished: dict[int, engine.Ran] = {}
    prompts = [asked.prompt for asked in requests]
    for index, prompt in enumerate(prompts if body.echo else []):
        text = str(served.tokenizer.decode(prompt))
        yield chunk(choices=[CompletionChoice(index=index, text=text, finish_reason=None)])
    offsets = [0] * len(prompts)
    async for index, update in generation.updates():
        logprobs = None
        if body.logprobs is not None:
            logprobs = tell_completion(served.tokenizer, update.logprobs, offsets[index])
            offsets[index] += sum(map(len, logprobs.tokens))
        choice = CompletionChoice(index=index, text=update.text, logprobs=logprobs, finish_reason=update.finish)
        if update.finish is not None:
            finished[index] = final_ran(update)
        ended = len(finished) == len(body.prompts) * body.n
        rans = [finished[i] for i in sorted(finished)]
        if ended and not body.wants_usage:
            yield chunk(choices=[choice], strace=reports(rans), metrics=_metrics(served, body, rans))
        elif update.text or update.finish or update.logprobs:
            yield chunk(choices=[choice])
    if body.wants_usage:
        usage = count_usage(rans, body.n)
        yield chunk(choices=[], usage=usage, strace=reports(rans), metrics=_metrics(served, body, rans))
