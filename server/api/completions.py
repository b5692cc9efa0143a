"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from statistics import fmean

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from server.api.chat import STREAM
from server.api.errors import DOCUMENTED, invalid
from server.api.generation import (
    Generation,
    Template,
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
    """The engine's requests: for each prompt in turn, one per candidate."""
    served.route(body.model, body.strace)
    if not body.prompts:
        raise invalid("the prompt is empty", "prompt")
    if len(body.prompts) * body.candidates > served.max_queue:
        name = "n" if body.candidates == body.n else "best_of"
        many = f"{len(body.prompts)} prompts x {name} = {body.candidates}"
        message = f"{many} are more than the queue holds ({served.max_queue})"
        raise invalid(message, "prompt" if len(body.prompts) > served.max_queue else name)
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
    best = _choose_best(body, results)
    rans = [final_ran(results[i]) for i in best]
    choices = [_choose(served, body, index, requests[i].prompt, results[i]) for index, i in enumerate(best)]
    return Completion(
        id=id,
        created=int(time.time()),
        model=body.model,
        choices=choices,
        usage=count_usage([final_ran(whole) for whole in results], body.candidates),
        strace=reports(rans),
        metrics=_metrics(served, body, rans),
    )


def _choose_best(body: CompletionRequest, results: list[engine.Update]) -> list[int]:
    """The texts to answer with: of each prompt's candidates the `n` with the greatest log-probability per token, the
    greatest first; all as they come where there are no more than that."""
    if body.candidates == body.n:
        return list(range(len(results)))

    def score(i: int) -> float:
        return fmean(told.logprob for told in results[i].logprobs) if results[i].logprobs else 0.0

    firsts = range(0, len(results), body.candidates)
    return [
        i for first in firsts for i in sorted(range(first, first + body.candidates), key=score, reverse=True)[: body.n]
    ]


def _choose(
    served: Served,
    body: CompletionRequest,
    index: int,
    prompt: list[int],
    update: engine.Update,
    first: bool = True,
    offset: int = 0,
) -> CompletionChoice:
    """A continuation or the next piece of it, the first behind the prompt where that is asked for. offset: where in the
    choice's text it begins."""
    before = ""
    told: list[TokenLogprob | int] = []
    if body.echo and first:
        before, told = str(served.tokenizer.decode(prompt)), [prompt[0], *update.prompt_logprobs]
    logprobs = None
    if body.logprobs is not None:
        logprobs = tell_completion(served.tokenizer, [*told, *update.logprobs], offset)
    return CompletionChoice(index=index, text=before + update.text, logprobs=logprobs, finish_reason=update.finish)


def _metrics(served: Served, body: CompletionRequest, rans: list[engine.Ran]) -> RequestMetrics | None:
    return request_metrics(rans, served.max_draft) if body.strace.metrics else None


async def _chunks(
    generation: Generation, served: Served, body: CompletionRequest, requests: list[engine.Request], id: str
) -> AsyncIterator[Completion | str]:
    """Text as it comes, each text's finish reason with its last piece; the last chunk says what ran."""
    chunk: Callable[..., Completion] = partial(Completion, id=id, created=int(time.time()), model=body.model)

    def write_piece(index: int, text: str) -> Completion:
        return chunk(choices=[CompletionChoice(index=index, text=text, finish_reason=None)])

    pieces = [Template(partial(write_piece, index)) for index in range(len(requests))]
    finished: dict[int, engine.Ran] = {}
    begun: set[int] = set()
    offsets = [0] * len(requests)
    async for index, update in generation.updates():
        if update.finish is None and body.logprobs is None and index in begun:
            if update.text:
                yield pieces[index].fill(update.text)
            continue
        prompt, first = requests[index].prompt, index not in begun
        choice = _choose(served, body, index, prompt, update, first, offsets[index])
        begun.add(index)
        offsets[index] += sum(map(len, choice.logprobs.tokens)) if choice.logprobs else 0
        if update.finish is not None:
            finished[index] = final_ran(update)
        ended = len(finished) == len(requests)
        rans = [finished[i] for i in sorted(finished)]
        if ended and not body.wants_usage:
            yield chunk(choices=[choice], strace=reports(rans), metrics=_metrics(served, body, rans))
        elif choice.text or update.finish or update.logprobs:
            yield chunk(choices=[choice])
    if body.wants_usage:
        usage = count_usage(rans, body.n)
        yield chunk(choices=[], usage=usage, strace=reports(rans), metrics=_metrics(served, body, rans))
