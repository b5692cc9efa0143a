"""Generation on the terminal, with the engine in this process: whose token is which, and what it was worth."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from tokenizers.decoders import DecodeStream

from server.api import chat, completions
from server.api.errors import ApiError
from server.api.protocol import ChatRequest, CompletionRequest, Message
from server.api.served import Served
from server.engine.request import Ran, Request, Update

STYLES = {True: "green", False: "yellow"}
"""The colour of a token by whether the subgraph drafted it."""
_CONTEXT = 8  # prompt tokens that tell the decoder whether a leading space belongs to the text
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@contextmanager
def running(served: Served) -> Iterator[Served]:
    """The model with its engine at work."""
    served.engine.start()
    try:
        yield served
    finally:
        served.engine.stop()


def updates(served: Served, request: Request) -> Iterator[Update]:
    """Run one request; leaving the loop early cancels it. Raises what the engine delivers."""
    news: queue.SimpleQueue[Update | Exception] = queue.SimpleQueue()
    handle = served.engine.submit(request, news.put)
    try:
        finish = None
        while finish is None:
            update = news.get()
            if isinstance(update, Exception):
                raise update
            finish = update.finish
            yield update
    finally:
        handle.cancel()


def show(served: Served, request: Request, out: Console) -> tuple[str, Ran | None]:
    """Print a continuation as it comes, each token in its origin's colour; gives its text and its accounts.

    Ctrl-C ends it early, without accounts.
    """
    stream = DecodeStream(ids=request.prompt[-_CONTEXT:], skip_special_tokens=True)
    text, ran = "", None
    try:
        for update in updates(served, request):
            for token, drafted in zip(update.ids, update.drafted, strict=True):
                piece = stream.step(served.tokenizer.backend_tokenizer, token) or ""
                # A model may write escape sequences; a terminal would obey them.
                shown = piece.translate(_CONTROLS) if out.is_terminal else piece
                out.out(shown, style=STYLES[drafted], highlight=False, end="")
            text, ran = text + update.text, update.ran
    except KeyboardInterrupt:
        ran = None
    out.out("")
    return text, ran


def legend(out: Console) -> None:
    """Say which colour is whose, where there are colours."""
    if out.is_terminal:
        out.print(f"[{STYLES[True]}]subgraph's tokens[/], [{STYLES[False]}]full model's tokens[/]")


def summarise(ran: Ran) -> str:
    """One line about what ran."""
    parts = [f"{ran.tokens} tokens", f"mode {ran.mode.value}", f"class {ran.class_name}"]
    if ran.drafted:
        parts.append(f"acceptance {ran.accepted / ran.drafted:.0%} ({ran.accepted} of {ran.drafted} drafted)")
    if ran.unverified:
        parts.append(f"{ran.unverified} emitted unverified, {ran.divergent:.3g} divergent")
    if ran.bypass is not None:
        parts.append(ran.bypass if ran.drafted else f"nothing drafted: {ran.bypass}")
    if ran.speedup is not None:
        parts.append(f"realised speedup {ran.speedup:.2f}")
    return "; ".join(parts)


def generate(served: Served, body: CompletionRequest, out: Console, notes: Console) -> None:
    """Continue one prompt and say what it took. Raises ApiError for a request that cannot be run."""
    (request,) = completions.prepare(served, body, "generate")
    legend(out)
    _, ran = show(served, request, out)
    if ran is not None:
        notes.out(summarise(ran), highlight=False)


def converse(served: Served, ask: Callable[[list[Message]], ChatRequest], out: Console, notes: Console) -> None:
    """Turns of a conversation, one line of input each, until the input ends.

    ask: makes the request for the conversation so far, which ends in the user's turn.
    """
    messages: list[Message] = []
    legend(out)
    while (line := _read_line(out)) is not None:
        if not line.strip():
            continue
        messages.append(Message(role="user", content=line))
        try:
            (request,), _ = chat.prepare(served, ask(messages), f"chat-{len(messages)}")
        except ApiError as error:
            notes.out(f"error: {error}", highlight=False)
            messages.pop()
            continue
        text, ran = show(served, request, out)
        messages.append(Message(role="assistant", content=text))
        if ran is not None:
            notes.out(summarise(ran), highlight=False)


def _read_line(out: Console) -> str | None:
    """The user's next line; None at the end of input or at Ctrl-C."""
    try:
        return out.input("> " if out.is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        return None
