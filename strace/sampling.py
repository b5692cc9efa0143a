"""From logits to tokens: one pure pipeline for draft, verify and plain decoding, and the speculative acceptance rule.

Randomness is counter-based: a number depends only on (seed, position, purpose), never on what else ran. With a seed in
the request every path takes `argmax(log p + Gumbel(seed, position))` (arXiv:2408.07978), so speculation cannot change
the text. Without one, a token is where the cumulative sum reaches one uniform number; drafts are accepted with
probability min(1, p/q) and a rejected one is replaced from the residual, so the law of the text is the full model's
(arXiv:2211.17192). `strace/native/sampling.cpp` is the same in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How a distribution is shaped before a token is drawn, with OpenAI's and vLLM's meanings; temperature 0 is greedy.

    min_p: least probability, as a share of the greatest. repetition_penalty: divides the positive logits of tokens that
    the prompt or the text has, and multiplies the negative ones. logit_bias: (id, what is added), ids ascending.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether the text so far matters."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


class Noise:
    """The random numbers of one request: its own seed, or one drawn for it.

    `shared` says that draft and full model use the same noise for a position (a seed was asked for).
    """

    def __init__(self, seed: int, shared: bool) -> None:
        self.key = seed % 2**64
        self.shared = shared

    def uniform(self, position: int, purpose: Purpose, count: int = 1) -> np.ndarray:
        """float64 [count] in [0, 1) of a token position (Philox, counter (0, 0, purpose, position))."""
        generator = np.random.Philox(key=self.key, counter=[0, 0, int(purpose), position])
        return np.random.Generator(generator).random(count)

    def gumbel(self, position: int, purpose: Purpose, count: int) -> Tensor:
        """float64 [count] standard Gumbel numbers."""
        u = torch.from_numpy(self.uniform(position, purpose, count))
        return -(-u.clamp_min(1e-300).log()).log()


@dataclass(slots=True, eq=False)
class Sampler:
    """How the next tokens of one sequence are drawn. Two are the same if they are one object: it goes with its text,
    and only `position` and `history` change.

    position: of the next one. history: the tokens generated before it, if penalties count them; prompt: those before
    the text, if the repetition penalty does. barred: ids that no token before position `barred_until` may be. allowed:
    the only tokens that may follow given drafts, as bits uint32 [ceil(V / 32)], the lowest first; a row that would be
    left without any is not restricted.
    """

    params: SamplingParams
    noise: Noise
    position: int
    history: list[int] = field(default_factory=list)
    prompt: Sequence[int] = ()
    barred: Sequence[int] = ()
    barred_until: int = 0
    allowed: Callable[[Sequence[int]], np.ndarray] | None = None

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0

    def process(self, logits: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """float32 [R, V]: `process` of the rows before each of `drafts` and after the last, or of as many as there are
        logits."""
        if self.barred and self.position < self.barred_until:
            logits = logits.clone()
            logits[: self.barred_until - self.position, list(self.barred)] = -torch.inf
        if self.allowed is not None:
            logits = torch.stack([self.restrict(row, drafts[:i])[0] for i, row in enumerate(logits)])
        histories = [[*self.history, *drafts[:i]] for i in range(len(logits))]
        return process(logits, histories, self.params, self.prompt)

    def restrict(self, row: Tensor, drafts: Sequence[int] = ()) -> tuple[Tensor, bool]:
        """A row [V] with -inf for what may not follow `drafts`, and whether anything is left; if not, as it was."""
        if self.allowed is None:
            return row, True
        bits = np.unpackbits(self.allowed(drafts).view(np.uint8), count=len(row), bitorder="little")
        restricted = row.masked_fill(torch.from_numpy(bits == 0), -torch.inf)
        left = not bool(restricted.isneginf().all())
        return (restricted if left else row), left

    def after(self, tokens: Sequence[int]) -> Sampler:
        """The sampler behind `tokens`."""
        allowed = self.allowed
        behind = None if allowed is None else lambda drafts: allowed([*tokens, *drafts])
        return replace(self, position=self.position + len(tokens), history=[*self.history, *tokens], allowed=behind)

    def before(self, count: int) -> Sampler:
        """The sampler in front of the last `count` tokens."""
        history = self.history[: max(0, len(self.history) - count)]
        return replace(self, position=self.position - count, history=history)


def process(
    rows: Tensor, histories: Sequence[Sequence[int]], params: SamplingParams, prompt: Sequence[int] = ()
) -> Tensor:
    """The distributions that tokens are drawn from: float32 logits [R, V] -> float32 probabilities [R, V].

    histories: per row, the tokens generated before it (drafts included), which the penalties count; the repetition
    penalty counts those of `prompt` too. Order as in vLLM: logit_bias, penalties, temperature, min_p, top_k, top_p.
    Equal logits go to the lowest id.
    """
    if params.logit_bias or params.penalises:
        rows = rows.clone()
    for id, bias in params.logit_bias:
        rows[:, id] += bias
    if params.penalises:
        for row, history in zip(rows, histories, strict=True):
            _penalise(row, history, prompt, params)
    if params.temperature == 0:
        return torch.zeros_like(rows).scatter_(1, rows.argmax(1, keepdim=True), 1.0)
    # From the top down, so that no temperature above 0, however small, makes an infinity.
    rows = (rows - rows.amax(1, keepdim=True)) / params.temperature
    if params.min_p > 0:
        rows = rows.masked_fill(rows.exp() < params.min_p, -torch.inf)
    if 0 < params.top_k < rows.shape[1] or params.top_p < 1:
        rows = _truncate(rows, params)
    return rows.softmax(1)


def _penalise(row: Tensor, history: Sequence[int], prompt: Sequence[int], params: SamplingParams) -> None:
    """Lower, in place, the logits [V] of tokens that were there before."""
    ids, counts = np.unique(np.asarray(history, dtype=np.int64), return_counts=True)
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.union1d(ids, np.asarray(prompt, dtype=np.int64)))
        known = row[seen]
        row[seen] = torch.where(known > 0, known / params.repetition_penalty, known * params.repetition_penalty)
    row[torch.from_numpy(ids)] -= params.presence_penalty + params.frequency_penalty * torch.from_numpy(counts).float()


def _truncate(rows: Tensor, params: SamplingParams) -> Tensor:
    """-inf outside the top_k ids and outside the smallest set of them that holds top_p of the probability."""
    values, ids = rows.sort(dim=1, descending=True, stable=True)
    if params.top_k > 0:
        values[:, params.top_k :] = -torch.inf
    if params.top_p < 1:
        share = values.softmax(1)
        # The id that reaches top_p stays in: what lies *before* an id decides. The first stays whatever top_p is.
        values[:, 1:][share.cumsum(1)[:, :-1] >= params.top_p] = -torch.inf
    return torch.full_like(rows, -torch.inf).scatter_(1, ids, values)


def draw(p: Tensor, noise: Noise, position: int, purpose: Purpose) -> int:
    """One token from a distribution float32 [V]: argmax of log p + Gumbel where the noise is shared, else the token at
    which the cumulative sum reaches a uniform share of the whole."""
    if int(torch.count_nonzero(p)) == 1:
        return int(p.argmax())
    if noise.shared:
        return int((p.double().log() + noise.gumbel(position, purpose, len(p))).argmax())
    reached = p.double().cumsum(0)
    if not reached[-1] > 0:
        return 0  # a row of no number, as in C++: it must not harm its neighbours
    # 1 - u lies in (0, 1]: it is always reached, and by a token that is possible.
    return int(torch.searchsorted(reached, (1 - noise.uniform(position, purpose)[0]) * reached[-1]))


def draw_draft(q: Tensor, noise: Noise, position: int) -> int:
    """A draft token; with a shared seed by the very noise the full model will use."""
    return draw(q, noise, position, Purpose.TOKEN if noise.shared else Purpose.DRAFT)


def draw_token(p: Tensor, noise: Noise, position: int) -> int:
    """A token straight from the full model."""
    return draw(p, noise, position, Purpose.TOKEN)


def acceptance(p: Tensor, q: Tensor, token: int) -> float:
    """The probability min(1, p/q) that a draft `token`, drawn from q, stands as a draw from p (both float32 [V])."""
    drafted, wanted = float(q[token]), float(p[token])
    return 1.0 if drafted <= wanted else wanted / drafted


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The law float32 [V] of what replaces a rejected draft: max(p - q, 0), normalised; p where they do not differ."""
    excess = (p - q).clamp_min(0)
    total = excess.sum()
    return excess / total if total > 0 else p


def accepts(p: Tensor, q: Tensor | None, token: int, noise: Noise, position: int) -> bool:
    """Whether a draft `token`, drawn from q (None: greedily), stands as a draw from p (both float32 [V])."""
    if noise.shared or q is None:
        return draw_token(p, noise, position) == token
    return float(noise.uniform(position, Purpose.ACCEPT)[0]) < acceptance(p, q, token)


def draw_residual(p: Tensor, q: Tensor | None, noise: Noise, position: int) -> int:
    """The token that replaces a rejected draft; greedily or with a shared seed, the full model's own."""
    if noise.shared or q is None:
        return draw_token(p, noise, position)
    return draw(residual(p, q), noise, position, Purpose.RESIDUAL)


def verify(
    p: Tensor, q: Tensor | None, drafts: Sequence[int], noise: Noise, position: int, emitted: int = 0
) -> list[int]:
    """Settle a block of drafts: the accepted ones and one more token, the full model's.

    p: float32 [n + 1, V], the full model's processed rows before each draft and after the last. q: float32 [n, V], the
    processed rows the drafts were drawn from, or None where the temperature is 0. position: of the first draft. The
    first `emitted` stand whatever p is.
    """
    for i, token in enumerate(drafts):
        row = None if q is None else q[i]
        if i >= emitted and not accepts(p[i], row, token, noise, position + i):
            return [*drafts[:i], draw_residual(p[i], row, noise, position + i)]
    return [*drafts, draw_token(p[len(drafts)], noise, position + len(drafts))]


def audit(p: Tensor, q: Tensor | None, drafts: Sequence[int], noise: Noise, position: int) -> list[float]:
    """The divergence of each draft: is it other than the full model's choice after the same text? Arguments as in
    `verify`.

    Without a seed a draw has no counterpart to compare with; its expected divergence, the total variation, stands for
    it.
    """
    if noise.shared or q is None:
        return [float(draw_token(p[i], noise, position + i) != token) for i, token in enumerate(drafts)]
    divergences: list[float] = total_variation(p[: len(drafts)], q[: len(drafts)]).tolist()
    return divergences


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """0.5 * sum |p - q| over the last dimension."""
    return 0.5 * (p - q).abs().sum(-1)
