"""POST /v1/responses, the stateless core: one answer to the conversation in the request."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse
from fastapi.concurrency import run_in_threadpool

from server.api import chat
from server.api.errors import DOCUMENTED, ApiError, as_api_error, count, invalid
from server.api.generation import Generation, event_stream, final_ran, report, request_metrics, while_connected
from server.api.output import Answer, Call, Part, Reader, Thought
from server.api.response_types import (
    Event,
    Incomplete,
    InputDetails,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponsesRequest,
    ResponseUsage,
    Status,
)
from server.api.served import Served, served_model
from server.engine.request import Refused, Update
from server.engine.request import Request as EngineRequest

router = APIRouter()
STREAM: dict[str, Any] = {"text/event-stream": {}}
OWN_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
}


def prepare(served: Served, body: ResponsesRequest, id: str) -> tuple[list[EngineRequest], list[Reader]]:
    """The engine's request for the conversation, and what reads its answer."""
    if not body.messages:
        raise invalid("`input` has nothing to answer", "input")
    try:
        return chat.prepare(served, body.as_chat(), id)
    except (ApiError, Refused) as raised:
        error = as_api_error(raised)
        detail = error.detail
        raise ApiError(
            error.status,
            detail.message,
            detail.type,
            OWN_NAMES.get(detail.param or "", detail.param),
            detail.code,
            error.headers,
        ) from raised


@router.post("/v1/responses", response_model=Response, responses={200: {"content": STREAM}, **DOCUMENTED})
async def create_response(body: ResponsesRequest, request: Request) -> Response | HttpResponse:
    """Answer a conversation."""
    served = served_model(request)
    served.require_running()
    id = f"resp_{request.state.request_id}"
    requests, (reader,) = await run_in_threadpool(prepare, served, body, id)
    generation = Generation(served.engine, requests, served.timeout)
    writer = Writer(served, body, id)
    if body.stream:
        return event_stream(generation, _events(generation, reader, writer), served.metrics, named=True)
    with generation:
        (last,) = await while_connected(request, generation.collect())
    for part in reader.feed(last.text, final=True):
        writer.write(part)
    writer.close(_status(last))
    return writer.response(last)


def _status(last: Update) -> Status:
    return "incomplete" if last.finish == "length" else "completed"


async def _events(generation: Generation, reader: Reader, writer: Writer) -> AsyncIterator[Event]:
    """The response as it comes to be; a failure is its last event."""
    try:
        for stage in ("response.created", "response.in_progress"):
            yield writer.event(stage, response=writer.response())
        async for _, update in generation.updates():
            for part in reader.feed(update.text, final=update.finish is not None):
                for event in writer.write(part):
                    yield event
            if update.finish is not None:
                for event in writer.close(_status(update)):
                    yield event
                yield writer.event(f"response.{_status(update)}", response=writer.response(update))
    except Exception as error:
        told = count(error, writer.served.metrics).detail
        yield writer.event("error", code=told.code, message=told.message, param=told.param)


class Writer:
    """Puts parts into output items, and tells of each step in events."""

    def __init__(self, served: Served, body: ResponsesRequest, id: str) -> None:
        self.served, self._body, self._id = served, body, id
        self._created, self._numbers = int(time.time()), 0
        self._items: list[OutputItem] = []

    def event(self, type: str, **fields: Any) -> Event:
        """The next event."""
        self._numbers += 1
        return Event(type=type, sequence_number=self._numbers - 1, **fields)

    def write(self, part: Part) -> list[Event]:
        """Take a part in."""
        events: list[Event] = []
        if not self._continues(part):
            events = [*self.close("completed"), *self._open(part)]
        item, place = self._items[-1], self._place()
        match part, item:
            case Answer(text), OutputMessage():
                item.content[0].text += text
                kind = "response.output_text.delta"
                events.append(self.event(kind, **place, content_index=0, delta=text, logprobs=[]))
            case Thought(text), OutputReasoning():
                item.content[0].text += text
                events.append(self.event("response.reasoning_text.delta", **place, content_index=0, delta=text))
            case Call(arguments=text), OutputCall() if text:
                item.arguments += text
                events.append(self.event("response.function_call_arguments.delta", **place, delta=text))
        return events

    def _continues(self, part: Part) -> bool:
        """Whether a part belongs to the item that is open."""
        item = self._items[-1] if self._items else None
        if item is None or item.status != "in_progress":
            return False
        match part:
            case Answer():
                return isinstance(item, OutputMessage)
            case Thought():
                return isinstance(item, OutputReasoning)
            case Call(name=name):
                return name is None

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1].id, "output_index": len(self._items) - 1}

    def _open(self, part: Part) -> list[Event]:
        """Begin the item that `part` begins."""
        unique = uuid.uuid4().hex
        item: OutputItem
        match part:
            case Answer():
                item = OutputMessage(id=f"msg_{unique}")
            case Thought():
                item = OutputReasoning(id=f"rs_{unique}")
            case Call(id=id, name=name):
                item = OutputCall(id=f"fc_{unique}", call_id=id or unique, name=name or "")
        self._items.append(item)
        events = [self.event("response.output_item.added", output_index=len(self._items) - 1, item=item.model_copy())]
        if isinstance(item, OutputCall):
            return events
        content: OutputText | ReasoningText
        if isinstance(item, OutputMessage):
            item.content = [content := OutputText()]
        else:
            item.content = [content := ReasoningText()]
        return [
            *events,
            self.event("response.content_part.added", **self._place(), content_index=0, part=content.model_copy()),
        ]

    def close(self, status: Status) -> list[Event]:
        """End the item that is open, if one is."""
        if not self._items or self._items[-1].status != "in_progress":
            return []
        item, place = self._items[-1], self._place()
        item.status = status
        if isinstance(item, OutputCall):
            kind = "response.function_call_arguments.done"
            events = [self.event(kind, **place, name=item.name, arguments=item.arguments)]
        else:
            (content,) = item.content
            kind = "response.output_text.done" if isinstance(item, OutputMessage) else "response.reasoning_text.done"
            more: dict[str, Any] = {"logprobs": []} if isinstance(item, OutputMessage) else {}
            events = [
                self.event(kind, **place, content_index=0, text=content.text, **more),
                self.event("response.content_part.done", **place, content_index=0, part=content),
            ]
        return [*events, self.event("response.output_item.done", output_index=place["output_index"], item=item)]

    def _count_thoughts(self) -> int:
        """Tokens of the thoughts among the items."""
        thoughts = [item.content[0].text for item in self._items if isinstance(item, OutputReasoning)]
        return sum(map(self.served.count_tokens, thoughts))

    def response(self, last: Update | None = None) -> Response:
        """The response so far, or with the last update the whole."""
        body, ran = self._body, None if last is None else final_ran(last)
        status: Status = "in_progress" if last is None else _status(last)
        usage = None
        if ran is not None:
            usage = ResponseUsage(
                input_tokens=ran.prompt_tokens,
                input_tokens_details=InputDetails(cached_tokens=ran.cached_tokens),
                output_tokens=ran.tokens,
                output_tokens_details=OutputDetails(reasoning_tokens=self._count_thoughts()),
                total_tokens=ran.prompt_tokens + ran.tokens,
            )
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            model=body.model,
            output=list(self._items),
            incomplete_details=Incomplete() if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            parallel_tool_calls=body.parallel_tool_calls,
            temperature=body.temperature,
            text=body.text,
            tool_choice=body.tool_choice,
            tools=body.tools,
            top_p=body.top_p,
            usage=usage,
            strace=None if ran is None else report(ran),
            metrics=request_metrics([ran], self.served.max_draft) if ran is not None and body.strace.metrics else None,
        )
