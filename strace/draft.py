"""A draft as data: how each sequence's tokens are drawn, where its draft ends, and the rule for drawing another.

Every runner runs the same `DraftPlan`: the torch runner with `Drafting` below, the native one in native/draft.cpp.
Whether another token is drawn may depend on all drawn before; whether one counts as emitted or held reads its
confidence, known before the draw, and whether it ends the text. A drawn token is never withdrawn. (What is made anew in
each step is mostly not frozen: that would take three times as long.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from strace.sampling import Noise, Sampler, SamplingParams, draw_draft


@dataclass(slots=True)
class DraftLimits:
    """Where one sequence's draft ends: the most tokens held, the most emitted while none is held, the most of both.

    threshold: a token of at least this confidence is emitted while none is held; above 1 none ever is.
    """

    held: int
    emitted: int
    room: int
    threshold: float

    def left(self, held: int = 0, emitted: int = 0) -> int:
        """How many more tokens may be drawn after so many."""
        emitting = held == 0 and self.threshold <= 1
        return min(self.emitted - emitted if emitting else self.held - held, self.room - held - emitted)


@dataclass(slots=True)
class GainRule:
    """Whether another token pays: its expected tokens against what its time would bring at the rate now achieved.

    full_seconds, draft_seconds: one pass over so many tokens. tokens_per_second: now achieved. planned: tokens of the
    coming full pass without drafts. acceptance [bins + 1]: share of drafts that stand by the draft's confidence, the
    last over all. stop_ids: tokens that end the text. always: draw up to the limits, whatever it brings. (Lists, for a
    rule is made in every step and few entries are read: arrays take longer.)
    """

    full_seconds: list[float]
    draft_seconds: list[float]
    tokens_per_second: float
    planned: int
    acceptance: list[float]
    stop_ids: list[int]
    always: bool = False

    def pays(self, survival: float, alive: int, drawn: int, most: int) -> bool:
        """Whether a sequence shall draw another token.

        survival: probability that all it holds stands. alive: sequences that share the draft step. drawn: tokens drawn
        so far by all. most: tokens it may still draw. Looks ahead over all of these, because a kernel's jump from one
        token to two must not hide that eight would pay.
        """
        if self.always:
            return True
        step = extrapolate(self.draft_seconds, alive) / alive
        planned = self.planned + drawn
        verified = extrapolate(self.full_seconds, planned)
        gain, acceptance = 0.0, self.acceptance[-1]
        hope = survival * acceptance / (1 - acceptance) if acceptance < 1 else math.inf  # the gain of an endless draft
        for n in range(1, most + 1):
            survival *= acceptance
            gain += survival
            extra = extrapolate(self.full_seconds, planned + n) - verified
            price = self.tokens_per_second * (n * step + extra)
            if gain >= price or price > hope:  # and prices never fall
                return gain >= price
        return False

    def stands(self, confidence: float) -> float:
        """The share of drafts of this confidence that stand."""
        return self.acceptance[find_bin(confidence, len(self.acceptance) - 1)]


def extrapolate(table: Sequence[float], n: int) -> float:
    """Entry n, beyond the last one by the last slope."""
    if n < len(table):
        return table[n]
    beyond = n - len(table) + 1
    return table[-1] + beyond * (table[-1] - table[-2])


def find_bin(confidence: float, bins: int) -> int:
    """Which of equal parts of 0..1 a confidence lies in."""
    return min(int(confidence * bins), bins - 1)


@dataclass(slots=True)
class DraftPlan:
    """What a runner needs to draft on its own, per sequence of a batch, and for all."""

    samplers: list[Sampler]
    limits: list[DraftLimits]
    rule: GainRule


TIMING = Sampler(SamplingParams(temperature=1.0), Noise(0, shared=False), 0)  # of what is drawn for its time alone


def plan_steps(sequences: int, steps: int) -> DraftPlan:
    """So many tokens for each sequence, drawn at temperature 1: for timing."""
    nothing = [0.0, 0.0]
    rule = GainRule(nothing, nothing, 0.0, 0, nothing, [], always=True)
    return DraftPlan([TIMING] * sequences, [DraftLimits(steps, 0, steps, math.inf)] * sequences, rule)


@dataclass(frozen=True)
class Draft:
    """What was drawn for one sequence, oldest first.

    confidence: before each draw, the draft's top-1 probability at temperature 1, corrected for a short head. q: float32
    [n, V], the processed rows that the tokens were drawn from; None where the temperature is 0.
    """

    tokens: list[int]
    confidence: list[float]
    q: Tensor | None


@dataclass(slots=True)
class Held:
    """Drafts of one text that await the full model's verdict.

    row: of its logits, the one before the first draft; one more for each draft follows. q: as in `Draft`. sampler: of
    the first draft. emitted: so many of them are text already, and stand whatever the verdict. audited: of so many, the
    emitted ones among them, the divergence is told. (Not frozen, nor are others that are made for each text in each
    step: that would take three times as long.)
    """

    row: int
    tokens: Sequence[int]
    q: Tensor | None
    sampler: Sampler
    emitted: int = 0
    audited: int = 0


class Verdict(NamedTuple):
    """What the full model makes of a text's drafts. tokens: those that stand, and one of its own. divergences: of the
    drafts that are audited, up to the first that falls, 0 to 1."""

    tokens: list[int]
    divergences: list[float]


def count_alive(drafts: Sequence[Draft]) -> list[int]:
    """How many sequences shared each step."""
    lengths = [len(draft.tokens) for draft in drafts]
    return [sum(length > step for length in lengths) for step in range(max(lengths))]


@dataclass
class Drafting:
    """One sequence's draft while the torch runner draws it."""

    sampler: Sampler
    limits: DraftLimits
    rule: GainRule
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    emitted: int = 0
    survival: float = 1.0
    stuck: bool = False

    def draw(self, row: Tensor, coverage: float) -> bool:
        """Draw a token from float32 logits [V]; False where the sampler allows none that this graph has. coverage: the
        share of the full model's probability on what it has."""
        row, left = self.sampler.restrict(row, self.tokens)
        if not left:
            self.stuck = True
            return False
        confidence = float(row.softmax(-1).amax()) * coverage
        (q,) = replace(self.sampler, allowed=None).after(self.tokens).process(row[None])
        token = draw_draft(q, self.sampler.noise, self.sampler.position + len(self.tokens))
        sure = self.emitted == len(self.tokens) and confidence >= self.limits.threshold
        self.tokens.append(token)
        self.confidence.append(confidence)
        self.rows.append(q)
        if sure and token not in self.rule.stop_ids:
            self.emitted += 1
        else:
            self.survival *= self.rule.stands(confidence)
        return True

    def goes_on(self, alive: int, drawn: int) -> bool:
        """Whether to draw another; alive, drawn: as in `GainRule.pays`."""
        if self.stuck:
            return False
        most = self.limits.left(len(self.tokens) - self.emitted, self.emitted)
        ended = self.tokens[-1] in self.rule.stop_ids
        return not ended and most > 0 and self.rule.pays(self.survival, alive, drawn, most)

    @property
    def draft(self) -> Draft:
        greedy = self.sampler.greedy or not self.rows
        return Draft(self.tokens, self.confidence, None if greedy else torch.stack(self.rows))
