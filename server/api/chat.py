"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

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
from server.api.logprobs import tell_chat
from server.api.output import Answer, Call, Part, Reader, Thought, put_together
from server.api.protocol import (
    AssistantMessage,
    CallDelta,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionDelta,
    NamedTool,
    RequestMetrics,
    ToolCall,
)
from server.api.served import Served, served_model
from server.engine import request as engine
from server.engine.logprobs import TokenLogprob

router = APIRouter()
STREAM: dict[str, Any] = {"text/event-stream": {}}


def prepare(served: Served, body: ChatRequest, id: str) -> tuple[list[engine.Request], list[Reader]]:
    """The engine's requests for a conversation, one per answer, and what reads each answer."""
    served.route(body.model, body.strace)
    if body.n > served.max_queue:
        raise invalid(f"{body.n} answers are more than the queue holds ({served.max_queue})", "n")
    prompt = served.write_request(body)
    ids, grammar = served.encode_chat(prompt), served.chat_grammar(body, prompt)
    requests = served.make_requests(body, ids, body.limit, None, "messages", id, grammar)
    return requests, [served.reader(body, prompt) for _ in requests]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: {"content": STREAM}, **DOCUMENTED})
async def create_chat_completion(body: ChatRequest, request: Request) -> ChatCompletion | Response:
    """Answer a conversation."""
    served = served_model(request)
    served.require_running()
    id = f"chatcmpl-{request.state.request_id}"
    requests, readers = await run_in_threadpool(prepare, served, body, id)
    generation = Generation(served.engine, requests, served.timeout)
    if body.stream:
        return event_stream(generation, _chunks(generation, readers, served, body, id), served.metrics)
    with generation:
        results = await while_connected(request, generation.collect())
    rans = [final_ran(whole) for whole in results]
    choices = [
        choose(served, body, index, reader, whole)
        for index, (reader, whole) in enumerate(zip(readers, results, strict=True))
    ]
    reasoning = sum(served.count_tokens(choice.message.reasoning_content or "") for choice in choices)
    return ChatCompletion(
        id=id,
        created=int(time.time()),
        model=body.model,
        choices=choices,
        usage=count_usage(rans, body.n, reasoning),
        strace=reports(rans),
        metrics=_metrics(served, body, rans),
    )


def choose(served: Served, body: ChatRequest, index: int, reader: Reader, whole: engine.Update) -> ChatChoice:
    """One whole answer."""
    told = put_together(reader.feed(whole.text, final=True))
    calls = [
        ToolCall(id=id, function=CalledFunction(name=name, arguments=arguments)) for id, name, arguments in told.calls
    ]
    message = AssistantMessage(
        content=told.answer if told.answer or not calls else None,
        reasoning_content=told.thoughts or None,
        tool_calls=calls or None,
    )
    return ChatChoice(
        index=index,
        message=message,
        logprobs=tell_chat(served.tokenizer, whole.logprobs) if body.logprobs else None,
        finish_reason=finish_reason(body, whole.finish, bool(calls)),
    )


def finish_reason(body: ChatRequest, finish: str | None, called: bool) -> FinishReason:
    """Why an answer ended, as OpenAI says it: a call that was asked for by name is a plain end."""
    if finish == "stop":
        return "tool_calls" if called and not isinstance(body.tool_choice, NamedTool) else "stop"
    return "length"


def _metrics(served: Served, body: ChatRequest, rans: list[engine.Ran]) -> RequestMetrics | None:
    return request_metrics(rans, served.max_draft) if body.strace.metrics else None


def _delta(part: Part) -> Delta:
    """A part as a chunk carries it."""
    match part:
        case Thought(text):
            return Delta(reasoning_content=text)
        case Answer(text):
            return Delta(content=text)
        case Call(index, arguments, id, name):
            kind = None if id is None else "function"
            return Delta(
                tool_calls=[
                    CallDelta(index=index, id=id, type=kind, function=FunctionDelta(name=name, arguments=arguments))
                ]
            )


async def _chunks(
    generation: Generation, readers: list[Reader], served: Served, body: ChatRequest, id: str
) -> AsyncIterator[ChatChunk | str]:
    """Roles, text as it comes, each answer's finish reason, usage if asked for; the last chunk says what ran."""
    chunk: Callable[..., ChatChunk] = partial(ChatChunk, id=id, created=int(time.time()), model=body.model)
    for index in range(len(readers)):
        yield chunk(choices=[ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])

    def write_answer(index: int, text: str) -> ChatChunk:
        return chunk(choices=[ChunkChoice(index=index, delta=Delta(content=text))])

    answers = [Template(partial(write_answer, index)) for index in range(len(readers))]
    called: set[int] = set()
    thoughts = [""] * len(readers)
    finished: dict[int, engine.Ran] = {}
    # Text may be held back behind its tokens; their log-probabilities go with the next chunk.
    waiting: list[list[TokenLogprob]] = [[] for _ in readers]

    def logprobs(index: int) -> ChatLogprobs | None:
        told, waiting[index] = waiting[index], []
        return tell_chat(served.tokenizer, told) if told else None

    async for index, update in generation.updates():
        waiting[index] += update.logprobs
        for part in readers[index].feed(update.text, final=update.finish is not None):
            if isinstance(part, Call):
                called.add(index)
            elif isinstance(part, Thought):
                thoughts[index] += part.text
            if isinstance(part, Answer) and not waiting[index]:
                yield answers[index].fill(part.text)
            else:
                yield chunk(choices=[ChunkChoice(index=index, delta=_delta(part), logprobs=logprobs(index))])
        if update.finish is None:
            continue
        finished[index] = final_ran(update)
        reason = finish_reason(body, update.finish, index in called)
        end = [ChunkChoice(index=index, delta=Delta(), logprobs=logprobs(index), finish_reason=reason)]
        rans = [finished[i] for i in sorted(finished)]
        if len(rans) < len(readers) or body.wants_usage:
            yield chunk(choices=end)
        else:
            yield chunk(choices=end, strace=reports(rans), metrics=_metrics(served, body, rans))
    if body.wants_usage:
        usage = count_usage(rans, body.n, sum(map(served.count_tokens, thoughts)))
        yield chunk(choices=[], usage=usage, strace=reports(rans), metrics=_metrics(served, body, rans))
