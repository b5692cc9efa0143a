"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from server.engine.logprobs import TokenLogprob
from strace.sampling import SamplingParams

if TYPE_CHECKING:
    from server.engine.grammar import Grammar


class Mode(StrEnum):
    """How a request is decoded; `auto` becomes one of the others when it is admitted."""

    AUTO = "auto"
    EXACT = "exact"
    ROUTED = "routed"
    FULL = "full"


class Refused(ValueError):
    """A request the engine will not run; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(RuntimeError):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(Overloaded):
    """The engine takes no requests any more, or had to give one up; another server, or this one later, may run it."""


@dataclass(frozen=True)
class Request:
    """One text to continue. `stop` are strings, cut before; `risk` and `max_draft` None mean the engine's own. `risk`:
    most mean divergence of `routed`; `threshold`: a confidence in its place, which promises nothing. `specials`:
    whether the text shows special tokens. `stop_ids` end it beside the model's own, unless `ignore_eos`; none of either
    is drawn, and no stop string ends it, before `min_tokens`. `max_tokens` 0: the prompt is read, and that is all.
    `logprobs`: alternatives told beside each token's own log-probability, of the prompt's tokens too if
    `prompt_logprobs`. `grammar`: what the text must follow.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    mode: Mode = Mode.AUTO
    class_name: str | None = None
    threshold: float | None = None
    max_draft: int | None = None
    specials: bool = False
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    risk: float | None = None
    grammar: Grammar | None = None


@dataclass
class Ran:
    """What ran for one request: the accounts behind `strace` in the response and behind the metrics.

    drafts: cycles that drafted. drafted, accepted: tokens. accepted_at[i]: accepted at draft position i. fallbacks:
    full passes that low confidence or a rejection caused. unverified: tokens emitted before a full pass saw them;
    divergent: how many of those the full model would not have chosen given the text before (their expected number where
    tokens are drawn without a seed). seconds: time spent decoding, in steps that read no prompt; full_seconds: what the
    full model would have needed for the same tokens, at its measured step cost. cached_tokens: of the prompt, held from
    another text that began alike. preemptions: how often it lost its blocks to an older text and was read anew. risk:
    the mean divergence promised, if one is. bypass: why the mode asked for, or drafting, was done without.
    """

    mode: Mode
    class_name: str
    prompt_tokens: int
    tokens: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    fallbacks: int = 0
    unverified: int = 0
    divergent: float = 0.0
    seconds: float = 0.0
    full_seconds: float = 0.0
    bypass: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    risk: float | None = None

    @property
    def speedup(self) -> float | None:
        """Realised speedup of decoding over the full model; None before anything was decoded."""
        return self.full_seconds / self.seconds if self.full_seconds > 0 else None


@dataclass(slots=True)
class Update:
    """What one engine step added to a text.

    `ids` are the new tokens, `drafted[i]` says that token i came from the subgraph's draft; `text` is what can be shown
    so far (whole characters, nothing that may yet become a stop string). `finish` is `stop` or `length` on the last
    update, which also carries the final accounts. `logprobs`, if asked for, has one entry per token; those of the
    prompt's tokens but the first come with the first update.
    """

    ids: list[int]
    drafted: list[bool]
    text: str
    finish: str | None = None
    ran: Ran | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


Deliver = Callable[[Update | Exception], None]
