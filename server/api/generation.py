"""From the engine's thread to the event loop: the texts of one HTTP request until they end or the client leaves."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import anyio
from fastapi import Request as HttpRequest
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask

from server.api.errors import ApiError, count
from server.api.protocol import (
    CompletionDetails,
    ErrorBody,
    PromptDetails,
    Reply,
    RequestMetrics,
    SpeculativeDecoding,
    StraceReport,
    Usage,
)
from server.api.served import Engine
from server.engine.request import Ran, Request, Update
from server.metrics import Metrics

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 15  # between comments in a stream that has no news; proxies cut a silent line after some 30
_MARK = uuid.uuid4().hex  # no chunk has it by chance
SEND_SECONDS = 5  # for what was generated before the server stopped to reach its readers


class Mailbox:
    """Brings what the engine's thread delivers to an event loop, which is woken once for all that comes together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # which the mailbox must not outlive: see _mailboxes
        self._mail: deque[Callable[[], None]] = deque()
        self._woken = False

    def put(self, deliver: Callable[[], None]) -> None:
        """Have `deliver` called in the loop. From any thread."""
        self._mail.append(deliver)
        if not self._woken:
            self._woken = True
            # The loop may be closed when the process is on its way out; then nobody waits for news.
            with suppress(RuntimeError):
                if loop := self._loop():
                    loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False  # first: what comes from here on wakes the loop again
        while self._mail:
            self._mail.popleft()()


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


class Generation:
    """One or more requests in the engine; leaving the `with` block, or `cancel`, ends those still running.

    timeout: seconds until what is not finished is given up.

    Raises (when made): Refused, Overloaded, with nothing left in the engine.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], timeout: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._mailbox = _mailboxes.setdefault(loop, Mailbox(loop))
        self._timeout, self._deadline = timeout, None if timeout is None else loop.time() + timeout
        self._news: asyncio.Queue[tuple[int, Update | Exception]] = asyncio.Queue()
        self._handles = []
        self._open = len(requests)
        try:
            for index, request in enumerate(requests):
                self._handles.append(engine.submit(request, partial(self._deliver, index)))
        except Exception:
            self.cancel()
            raise

    def _deliver(self, index: int, news: Update | Exception) -> None:
        """Called in the engine's thread."""
        self._mailbox.put(partial(self._news.put_nowait, (index, news)))

    def cancel(self) -> None:
        """End whatever still runs."""
        for handle in self._handles:
            handle.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Each update with the number of its request, until all have finished; raises what the engine delivers, and
        ApiError 408 when time is up.
        """
        while self._open:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, news = await self._news.get()
            except TimeoutError:
                message = f"the request was not finished within {self._timeout:g} seconds"
                raise ApiError(408, message, "timeout_error", code="timeout") from None
            if isinstance(news, Exception):
                raise news
            self._open -= news.finish is not None
            yield index, news

    async def collect(self) -> list[Update]:
        """Per request one update that holds the whole."""
        updates: list[list[Update]] = [[] for _ in self._handles]
        async for index, update in self.updates():
            updates[index].append(update)
        return [_whole(parts) for parts in updates]


def _whole(parts: list[Update]) -> Update:
    """Updates of one text as one."""
    return Update(
        ids=[token for part in parts for token in part.ids],
        drafted=[flag for part in parts for flag in part.drafted],
        text="".join(part.text for part in parts),
        finish=parts[-1].finish,
        ran=parts[-1].ran,
        logprobs=[told for part in parts for told in part.logprobs],
        prompt_logprobs=[told for part in parts for told in part.prompt_logprobs],
    )


async def while_connected(request: HttpRequest, work: Awaitable[T]) -> T:
    """`work`'s result; if the client hangs up first, `work` is cancelled and ClientGone raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: HttpRequest) -> None:
    """Return when the client hangs up (the body has been read, so nothing else can arrive)."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encode(data: str, name: str | None = None) -> bytes:
    """One server-sent event; data: of one line, as JSON is."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode()


class Template:
    """Chunks as JSON that differ in one text only: all else is written once."""

    def __init__(self, make: Callable[[str], Reply]) -> None:
        """make: the chunk with a text."""
        self._before, self._after = make(_MARK).model_dump_json().split(_MARK)

    def fill(self, text: str) -> str:
        """What the chunk's `model_dump_json` gives."""
        return self._before + to_json(text)[1:-1].decode() + self._after


def event_stream(
    generation: Generation, chunks: AsyncIterator[Reply | str], metrics: Metrics, named: bool = False
) -> EventSourceResponse:
    """`chunks` as server-sent events, those that are JSON already as they are; a stream that breaks ends with an error
    event.

    named: events bear their `type` as name, as those of /v1/responses do; the others end with `[DONE]`.
    """

    async def events() -> AsyncIterator[bytes]:
        with generation:
            try:
                async for chunk in chunks:
                    name = getattr(chunk, "type", None) if named else None
                    yield _encode(chunk if isinstance(chunk, str) else chunk.model_dump_json(), name)
            except Exception as error:
                yield _encode(ErrorBody(error=count(error, metrics).detail).model_dump_json())
            if not named:
                yield _encode("[DONE]")

    return EventSourceResponse(
        events(),
        sep="\n",
        ping=KEEP_ALIVE_SECONDS,
        # A client that leaves before the first event never enters the generator's `with`.
        background=BackgroundTask(generation.cancel),
        # Streams may end on their own when the server is told to stop.
        shutdown_event=anyio.Event(),
        shutdown_grace_period=SEND_SECONDS,
    )


def count_usage(rans: Sequence[Ran], n: int = 1, reasoning: int = 0) -> Usage:
    """Token counts over all texts of a response; the `n` answers to a prompt, one behind the other, share it.
    reasoning: tokens of all thoughts."""
    prompt, completion = sum(ran.prompt_tokens for ran in rans[::n]), sum(ran.tokens for ran in rans)
    cached = PromptDetails(cached_tokens=sum(ran.cached_tokens for ran in rans[::n]))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=cached,
        completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning),
    )


def reports(rans: Sequence[Ran]) -> StraceReport | list[StraceReport]:
    """One report for one text, else one per text."""
    return report(rans[0]) if len(rans) == 1 else [report(ran) for ran in rans]


def request_metrics(rans: Sequence[Ran], most: int) -> RequestMetrics | None:
    """Acceptance as vLLM reports it, which has no place for several texts. most: drafts of a step."""
    if len(rans) != 1:
        return None
    (ran,) = rans
    if not ran.drafts:
        return RequestMetrics(speculative_decoding=None)
    reached = [ran.drafts, *ran.accepted_at, 0]
    histogram = [here - further for here, further in pairwise(reached)]
    return RequestMetrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1 + ran.accepted / ran.drafts,
            draft_acceptance_rate=ran.accepted / ran.drafted,
            acceptance_histogram=histogram + [0] * (most + 1 - len(histogram)),
            num_spec_steps=ran.drafts,
            num_accepted_draft_tokens=ran.accepted,
            num_draft_tokens=ran.drafted,
            num_spec_tokens=most,
        )
    )


def report(ran: Ran) -> StraceReport:
    """What ran, for the response."""
    return StraceReport(
        mode=ran.mode.value,
        class_name=ran.class_name,
        drafts=ran.drafts,
        drafted=ran.drafted,
        accepted=ran.accepted,
        fallbacks=ran.fallbacks,
        unverified=ran.unverified,
        divergent=ran.divergent,
        realised_speedup=ran.speedup,
        risk=ran.risk,
        bypass=ran.bypass,
    )


def final_ran(update: Update) -> Ran:
    """The accounts that every last update carries."""
    assert update.ran is not None, "the engine's last update lacks its accounts"
    return update.ran
