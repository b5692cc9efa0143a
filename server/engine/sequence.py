"""One text being decoded: its tokens, how far the full model has seen them, its blocks and its accounts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from server.engine.blocks import chain_key
from server.engine.grammar import Constraint
from server.engine.logprobs import TokenLogprob, read_logprobs
from server.engine.options import Options
from server.engine.request import Deliver, Mode, Ran, Refused, Request, Update
from server.engine.risk import Gate
from server.engine.text import Text
from strace.draft import Draft, DraftLimits
from strace.kv import BLOCK
from strace.sampling import Noise, Sampler

_NOTHING = Draft([], [], None)


@dataclass
class Times:
    """When things happened to a request, in seconds of the monotonic clock; `updates` has one entry per delivery."""

    submitted: float
    admitted: float | None = None
    updates: list[float] = field(default_factory=list)
    finished: float | None = None


@dataclass
class Shadow:
    """What the gate would have done in a request that may not be routed. judged: drafts that followed the text as it
    is; divergent: (expected) number of those that would have been emitted and are not the full model's choice."""

    judged: int = 0
    divergent: float = 0.0


@dataclass(eq=False)
class Sequence:
    """A request and its text so far.

    ids: prompt and continuation. verified: positions whose keys and values the full model wrote, for these very tokens.
    Between steps everything but the last token is verified, or the prompt is still being read. draft: what this step
    drew; the first `emitted` of its tokens are already part of the text, the others are held until the full model has
    settled them. blocks: those of the cache that it holds, `table` the same as the runner reads it, another tensor when
    they are others; the first `sealed` of them are filled and known to the pool. opened: whether it has drafted with an
    open gate. constraint: where it is in the grammar that it must follow. sampler: how the next tokens are drawn.
    """

    request: Request
    noise: Noise
    text: Text
    stop_ids: frozenset[int]
    ran: Ran
    deliver: Deliver
    times: Times
    gate: Gate
    table: np.ndarray
    shadow: Shadow | None = None
    constraint: Constraint | None = None
    ids: list[int] = field(init=False)
    sampler: Sampler = field(init=False)
    verified: int = 0
    blocks: list[int] = field(default_factory=list)
    sealed: int = 0
    draft: Draft = _NOTHING
    emitted: int = 0
    opened: bool = False
    finish: str | None = None
    cancelled: bool = False
    _penalised: bool = field(init=False)
    _fresh: list[int] = field(default_factory=list)
    _fresh_drafted: list[bool] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    _prompt_read: int = 1  # tokens of the prompt whose log-probabilities are known; the first has none
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)
        self.sampler, self._penalised = self._make_sampler(), self.request.params.penalises

    @property
    def prefilling(self) -> bool:
        """Whether more than the one token that the next token follows from awaits the full model."""
        return len(self.ids) - self.emitted - self.verified > 1

    @property
    def pending(self) -> list[int]:
        """Tokens that await the full model, the drafts held behind the text among them."""
        return self.ids[self.verified :] + self.draft.tokens[self.emitted :]

    @property
    def reads_rows(self) -> bool:
        """Whether something beside the verdict is read from the full model's rows in this step."""
        return self.request.logprobs is not None or self.reads_prompt

    @property
    def most_tokens(self) -> int:
        """Length of the text when it is as long as it may become."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def reads_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are still to be read."""
        return self.request.prompt_logprobs and self._prompt_read < len(self.request.prompt)

    def keys(self, blocks: int) -> list[bytes]:
        """The keys of the first blocks of the text, full ones all."""
        for start in range(len(self._keys) * BLOCK, blocks * BLOCK, BLOCK):
            before = self._keys[-1] if self._keys else b""
            self._keys.append(chain_key(before, self.ids[start : start + BLOCK]))
        return self._keys[:blocks]

    def hold(self, blocks: list[int]) -> None:
        """Take over blocks for what comes next."""
        if blocks:
            held = len(self.blocks)
            self.blocks += blocks
            self.table = self.table.copy()
            self.table[held : len(self.blocks)] = blocks

    def reach(self, options: Options) -> int:
        """Length of the text with all drafts that the next step may draw."""
        length = len(self.ids)
        if self.ran.mode is Mode.FULL:
            return length
        # The full model itself adds the last token before the limit.
        return length + max(0, min(self.most_tokens - length - 1, self.most_drafts(options)))

    def most_drafts(self, options: Options) -> int:
        """Drafts of a step at most, had the text no end."""
        held = self._cap(options.max_draft, options)
        return held + self._cap(self._most_emitted(options), options) if self.emits else held

    def limits(self, options: Options, shut: bool = False) -> DraftLimits:
        """Where this step's draft ends. shut: all of it is held."""
        # The full model itself adds the last token before the limit.
        room = self.most_tokens - len(self.ids) - 1
        held = self._cap(options.max_draft, options)
        if shut or not self.emits:
            return DraftLimits(held, 0, room, math.inf)
        return DraftLimits(held, self._cap(self._most_emitted(options), options), room, self.threshold)

    def _most_emitted(self, options: Options) -> int:
        """The longest run of tokens that the gate would let through from here on."""
        return int(min(options.run_limit, self.gate.tokens - self.ran.tokens))

    def _cap(self, most: int, options: Options) -> int:
        """`most`, or less where engine or request say so."""
        for limit in (options.draft_length, self.request.max_draft):
            if limit is not None and limit < most:
                most = limit
        return most

    @property
    def threshold(self) -> float:
        """The confidence from which the gate lets the next token be emitted unverified; infinite where none may."""
        return self.gate.threshold if self.ran.tokens < self.gate.tokens else math.inf

    @property
    def emits(self) -> bool:
        """Whether the next token may be emitted unverified."""
        return self.ran.mode is Mode.ROUTED and self.threshold <= 1

    def _make_sampler(self) -> Sampler:
        params, prompt = self.request.params, self.request.prompt
        before = prompt if params.repetition_penalty != 1 else ()
        if self.constraint is not None:
            return Sampler(params, self.noise, len(prompt), [], before, allowed=self.constraint.allowed)
        barred = sorted(self.stop_ids) if self.request.min_tokens else ()
        return Sampler(params, self.noise, len(prompt), [], before, barred, len(prompt) + self.request.min_tokens)

    def book(self, draft: Draft, shut: bool = False) -> None:
        """Take over a step's draft: in `routed` its sure tokens become part of the text at once, up to the first that
        is not sure or would end the text. That one and all after it are held, and everything if the gate is shut."""
        self.draft, self.emitted, threshold = draft, 0, self.threshold
        if shut or not self.emits:
            return
        self.opened = True
        for token, confidence in zip(draft.tokens, draft.confidence, strict=True):
            if confidence < threshold or self._ends(token):
                break
            self.emitted += 1
            self.ran.unverified += 1
            self.append(token, drafted=True)

    def clear_draft(self) -> None:
        """Forget the step's draft, which was settled."""
        self.draft, self.emitted = _NOTHING, 0

    def _ends(self, token: int) -> bool:
        """Whether `token`, were it next, would end the text by itself."""
        return token in self.stop_ids or self.text.completes_stop(token)

    def read_prompt(self, rows: Tensor) -> int:
        """Take the log-probabilities of the prompt's tokens from the rows of a chunk, float32 [n, V], but for those
        known from before the text lost its blocks; how many of the rows, 0 or 1, the next token follows from."""
        end = self.verified + len(rows)
        following = self.request.prompt[self._prompt_read : end + 1]
        unread = rows[self._prompt_read - 1 - self.verified :]
        self._prompt_logprobs += read_logprobs(unread, following, self.request.logprobs or 0)
        self._prompt_read += len(following)
        return int(end == len(self.ids))

    def append(self, token: int, drafted: bool, logprob: TokenLogprob | None = None) -> None:
        """Add a token to the text and see whether it ends it.

        Raises:
            Refused: the text must follow a grammar that allows nothing here.
        """
        ran, ended = self.ran, False
        if self.constraint is not None:
            if not self.constraint.append(token):
                message = f"the grammar allows nothing behind {ran.tokens} tokens of the text"
                raise Refused(message, self.constraint.grammar.param)
            ended = self.constraint.complete
        self.ids.append(token)
        self.sampler.position += 1
        if self._penalised:
            self.sampler.history.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._fresh.append(token)
        self._fresh_drafted.append(drafted)
        ran.tokens += 1
        if token in self.stop_ids or self.text.push(token) or ended:
            self.finish = "stop"
        elif ran.tokens == self.request.max_tokens:
            self.finish = "length"

    def take_update(self) -> Update | None:
        """What is new since the last call, if anything is."""
        if not self._fresh and self.finish is None:
            return None
        ids, drafted, self._fresh, self._fresh_drafted = self._fresh, self._fresh_drafted, [], []
        text = self.text.take(final=self.finish is not None)
        logprobs, self._logprobs = self._logprobs, []
        prompt, self._prompt_logprobs = self._prompt_logprobs, []
        return Update(ids, drafted, text, self.finish, self.ran if self.finish else None, logprobs, prompt)
