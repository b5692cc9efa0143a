"""One text being decoded: its tokens, how far the full model has seen them, its blocks and its accounts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from server.engine.request import Deliver, Mode, Ran, Request, Update
from server.engine.text import Text
from strace.sampling import Noise


@dataclass
class Draft:
    """What one step drew for a sequence, oldest first: tokens, the float32 rows [V] they were drawn from, confidences.

    The first `emitted` of them are already part of the text; the others are held until the full model has settled them.
    `survival` is the estimated probability that all held ones will stand.
    """

    tokens: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    emitted: int = 0
    survival: float = 1.0

    @property
    def held(self) -> list[int]:
        return self.tokens[self.emitted :]


@dataclass
class Times:
    """When things happened to a request, in seconds of the monotonic clock; `updates` has one entry per delivery."""

    submitted: float
    admitted: float | None = None
    updates: list[float] = field(default_factory=list)
    finished: float | None = None


@dataclass(eq=False)
class Sequence:
    """A request and its text so far.

    ids: prompt and continuation. verified: positions whose keys and values the full model wrote, for these very tokens.
    Between steps everything but the last token is verified, or the prompt is still being read.
    """

    request: Request
    noise: Noise
    text: Text
    stop_ids: frozenset[int]
    ran: Ran
    deliver: Deliver
    times: Times
    threshold: float
    ids: list[int] = field(init=False)
    verified: int = 0
    blocks: list[int] = field(default_factory=list)
    table: Tensor | None = None
    draft: Draft = field(default_factory=Draft)
    finish: str | None = None
    cancelled: bool = False
    _fresh: list[int] = field(default_factory=list)
    _fresh_drafted: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def prefilling(self) -> bool:
        """Whether more than the one token that the next token follows from awaits the full model."""
        return len(self.ids) - self.draft.emitted - self.verified > 1

    @property
    def length(self) -> int:
        """Tokens of the text with the held drafts: the position of the next token to be drawn."""
        return len(self.ids) + len(self.draft.tokens) - self.draft.emitted

    @property
    def most_tokens(self) -> int:
        """Length of the text when it is as long as it may become."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def room(self) -> int:
        """How many more drafts are of use: the full model itself adds the last token before the limit."""
        return self.most_tokens - self.length - 1

    @property
    def emitting(self) -> bool:
        """Whether the next draft may be emitted unverified: in `routed`, while none is held."""
        return self.ran.mode == Mode.ROUTED and self.draft.emitted == len(self.draft.tokens)

    def histories(self, drafts: range) -> list[list[int]]:
        """Per number of the step's drafts, the continuation with so many of them; empty if no penalty reads it."""
        params = self.request.params
        if not (params.presence_penalty or params.frequency_penalty):
            return []
        before = self.ids[len(self.request.prompt) : len(self.ids) - self.draft.emitted]
        return [before + self.draft.tokens[:n] for n in drafts]

    def ends(self, token: int) -> bool:
        """Whether `token`, were it next, would end the text by itself."""
        return token in self.stop_ids or self.text.completes_stop(token)

    def may_emit(self, token: int, confidence: float) -> bool:
        """Whether a draft may be emitted unverified: a sure one, none held before it, that does not end the text."""
        return self.emitting and confidence >= self.threshold and not self.ends(token)

    def hold(self, token: int, row: Tensor, confidence: float, survival: float) -> None:
        """Record a draft that awaits the full model; `survival` is the estimated probability that it will stand."""
        self._record(token, row, confidence)
        self.draft.survival *= survival

    def emit(self, token: int, row: Tensor, confidence: float) -> None:
        """Record a draft and make it part of the text at once."""
        self._record(token, row, confidence)
        self.draft.emitted += 1
        self.ran.unverified += 1
        self.append(token, drafted=True)

    def _record(self, token: int, row: Tensor, confidence: float) -> None:
        self.draft.tokens.append(token)
        self.draft.rows.append(row)
        self.draft.confidence.append(confidence)

    def append(self, token: int, drafted: bool) -> None:
        """Add a token to the text and see whether it ends it."""
        self.ids.append(token)
        self._fresh.append(token)
        self._fresh_drafted.append(drafted)
        self.ran.tokens += 1
        if token in self.stop_ids or self.text.push(token):
            self.finish = "stop"
        elif self.ran.tokens == self.request.max_tokens:
            self.finish = "length"

    def take_update(self) -> Update | None:
        """What is new since the last call, if anything is."""
        if not self._fresh:
            return None
        ids, drafted, self._fresh, self._fresh_drafted = self._fresh, self._fresh_drafted, [], []
        text = self.text.take(final=self.finish is not None)
        return Update(ids, drafted, text, self.finish, self.ran if self.finish else None)
