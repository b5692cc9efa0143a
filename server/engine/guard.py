"""Whether speculation really is faster: realised speedup in paired blocks, per mode, class and batch size.

The rule of expected gain believes a cost table and a calibration; the guard believes the clock. A block pairs steps
that drafted with plain full steps of about the same time, batch and context. Speculation that is surely faster is
interrupted by a plain step now and then; one that is surely slower is off, its texts are served by plain full steps,
and drafts are probed now and then; in between both kinds alternate. "Now and then" is 1 % of the time.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from server.engine.request import Mode
from strace.draft import extrapolate

PROBE_SHARE = 0.01  # of the time, for what is believed to be slower
_STEPS = 4  # of each kind in a block
_LEAST = 5  # blocks before anything is sure
_SURE = 2.13  # Student's t at 95 %, one-sided, for so many
_FADE = 0.95  # of older blocks, per block
_LEVEL = 0.1  # weight of one plain step in the baseline shown
_WILD = 1.0  # how far the logarithm of one block's speedup is believed: a hiccup is no trend

Key = tuple[Mode, str]


class Trust(float, Enum):
    """What the blocks so far say of speculation; the value is the one that metrics show."""

    OFF = 0.0
    UNSURE = 0.5
    ON = 1.0


@dataclass
class Block:
    """Sums over the steps of one block.

    Plain steps: what they should have taken by the table, and took. Drafting ones: what the full model should take for
    their tokens; this key's part of their time; and the plain step's time in the other part. Together the last two are
    what the steps would have taken, had no other key drafted.
    """

    plain_steps: int = 0
    plain_expected: float = 0.0
    plain_seconds: float = 0.0
    steps: int = 0
    expected: float = 0.0
    seconds: float = 0.0
    beside: float = 0.0

    @property
    def speedup(self) -> float:
        """Realised: time the full model takes for the same tokens over time taken."""
        level = self.plain_seconds / self.plain_expected
        return level * self.expected / (self.seconds + level * self.beside)


class Track:
    """The blocks of one mode and class at one batch size."""

    def __init__(self) -> None:
        self.block = Block()
        self.trust = Trust.UNSURE
        self.refused = False
        self.mean = 0.0
        self._blocks = 0
        self._sums = np.zeros(4)  # of weights, squared weights, values, squared values

    def wants_plain(self, affordable: bool) -> bool:
        """Whether this key lacks a plain step to compare with."""
        block = self.block
        if self.trust is Trust.ON:
            return affordable
        return self.trust is Trust.UNSURE and block.plain_steps <= min(block.steps, _STEPS - 1)

    def book_plain(self, expected: float, seconds: float) -> None:
        self.block.plain_steps += 1
        self.block.plain_expected += expected
        self.block.plain_seconds += seconds
        self._close()

    def book_drafting(self, expected: float, seconds: float, gain: float, share: float) -> None:
        """seconds: those of this key's drafts, and its share of all that is no drafting. gain: tokens beyond one per
        text, over texts. share: of the step's drafted tokens that was this key's."""
        self.block.steps += 1
        self.block.expected += expected * (1 + gain)
        self.block.seconds += seconds
        self.block.beside += expected * (1 - share)
        self._close()

    def _close(self) -> None:
        """End a block that has enough of both kinds, and think again. A last block that contradicts the others is
        enough to doubt them: then both kinds alternate, and certainty comes back soon if it was chance."""
        if min(self.block.plain_steps, self.block.steps) < _STEPS:
            return
        value = float(np.clip(math.log(self.block.speedup), -_WILD, _WILD))
        self.block = Block()
        self._blocks += 1
        self._sums = self._sums * [_FADE, _FADE**2, _FADE, _FADE] + [1, 1, value, value**2]
        weight, squared, total, squares = self._sums
        n, self.mean = weight**2 / squared, total / weight
        error = math.sqrt(max(squares / weight - self.mean**2, 0.0) / max(n - 1, 1e-9))
        sure = self._blocks >= _LEAST and abs(self.mean) > _SURE * error and self.mean * value > 0
        self.trust = Trust.UNSURE if not sure else Trust.ON if self.mean > 0 else Trust.OFF


@dataclass
class Bucket:
    """What is kept per batch size. Debts, in seconds, are paid back by 1 % of the time; nothing is spent before they
    are. level: seconds of a plain step over the table's; stamp: when it was last seen."""

    tracks: defaultdict[Key, Track] = field(default_factory=lambda: defaultdict(Track))
    plain_debt: float = 0.0
    probe_debt: float = 0.0
    level: float | None = None
    stamp: float = 0.0

    def pay(self, turn: Turn, seconds: float) -> None:
        paid = PROBE_SHARE * seconds
        self.plain_debt = max(0.0, self.plain_debt - paid) + seconds * turn.plain
        self.probe_debt = max(0.0, self.probe_debt - paid) + seconds * (turn.probe and bool(turn.drafting))

    def book_plain(self, keys: Iterable[Key], expected: float, seconds: float) -> None:
        """A plain full step of texts that could have drafted."""
        level = seconds / expected
        self.level = level if self.level is None else self.level + _LEVEL * (level - self.level)
        self.stamp = time.monotonic()
        for key in keys:
            self.tracks[key].book_plain(expected, seconds)


@dataclass
class Turn:
    """What one step may do, and what it did.

    batch: texts it decodes. plain: nobody drafts. probe: all do, even against the rule. off: who else does not draft.
    forced: classes that drew against the rule; what that brings says nothing of the rule. drafted: tokens; drafting:
    seconds by class.
    """

    batch: int
    keys: frozenset[Key] = frozenset()
    plain: bool = False
    probe: bool = False
    off: frozenset[Key] = frozenset()
    forced: set[str] = field(default_factory=set)
    drafted: Counter[Key] = field(default_factory=Counter)
    drafting: dict[str, float] = field(default_factory=dict)

    def allows(self, key: Key) -> bool:
        """Whether texts of this mode and class may draft."""
        return not self.plain and (self.probe or key not in self.off)


class Guard:
    """The verdicts on all modes, classes and batch sizes."""

    def __init__(self, full_seconds: np.ndarray, active: bool = True) -> None:
        """full_seconds: float64, a full pass over so many tokens; only its shape counts. active: False lets everything
        draft, and measures nothing."""
        self._table = full_seconds.copy()
        self._active = active
        self._buckets = defaultdict[int, Bucket](Bucket)

    def turn(self, keys: Iterable[Key], batch: int, measurable: bool) -> Turn:
        """What the coming step may do. keys: of the texts that could draft. measurable: the step reads no prompt, so
        that `book` will hear of it."""
        turn = Turn(batch, frozenset(keys))
        if not self._active or not turn.keys:
            return turn
        bucket = self._buckets[_size(batch)]
        tracks = {key: bucket.tracks[key] for key in turn.keys}
        turn.off = frozenset(key for key, track in tracks.items() if track.trust is Trust.OFF)
        if not measurable:
            return turn
        refused = any(track.refused for track in tracks.values())
        turn.probe = bool(turn.off or refused) and bucket.probe_debt == 0
        turn.plain = not turn.probe and any(t.wants_plain(bucket.plain_debt == 0) for t in tracks.values())
        return turn

    def book(self, turn: Turn, seconds: float, gained: Counter[Key]) -> None:
        """Learn from a step that read no prompt. gained: tokens beyond one per text."""
        if not self._active or not turn.keys:
            return
        bucket = self._buckets[_size(turn.batch)]
        bucket.pay(turn, seconds)
        for key in turn.keys:
            bucket.tracks[key].refused = key[1] in turn.forced or (turn.allows(key) and not turn.drafted[key])
        expected = extrapolate(self._table, turn.batch)
        if turn.drafting:
            self._book_drafting(bucket, turn, seconds, expected, gained)
        else:
            bucket.book_plain(turn.keys, expected, seconds)

    def _book_drafting(self, bucket: Bucket, turn: Turn, seconds: float, expected: float, gained: Counter[Key]) -> None:
        """Each key gets its class's drafting time and, by its drafted tokens, of the rest of the step."""
        by_class = Counter[str]()
        for (_, name), tokens in turn.drafted.items():
            by_class[name] += tokens
        rest = seconds - sum(turn.drafting.values())
        for key, tokens in turn.drafted.items():
            if tokens and key[1] not in turn.forced:  # a grammar may leave a short head nothing to draw
                share = tokens / turn.drafted.total()
                own = turn.drafting[key[1]] * tokens / by_class[key[1]]
                bucket.tracks[key].book_drafting(expected, own + rest * share, gained[key] / turn.batch, share)

    def forget(self) -> None:
        """Judge anew: the drafts are others now. Between steps."""
        self._buckets = defaultdict(Bucket)

    def full_step(self, batch: int) -> float | None:
        """Seconds of a plain full step as lately measured at about this batch size, if it was."""
        bucket = self._buckets.get(_size(batch))
        return None if bucket is None or bucket.level is None else bucket.level * extrapolate(self._table, batch)

    def states(self) -> list[tuple[Mode, str, int, Track]]:
        """Mode, class and greatest batch of every track. From any thread."""
        return [
            (*key, 1 << size, track)
            for size, bucket in list(self._buckets.items())
            for key, track in list(bucket.tracks.items())
        ]

    def ages(self) -> dict[int, float]:
        """Seconds since the last plain full step, by greatest batch. From any thread."""
        now = time.monotonic()
        return {1 << size: now - b.stamp for size, b in list(self._buckets.items()) if b.level is not None}


def _size(batch: int) -> int:
    """Batches of 1, 2, 3-4, 5-8, 9-16, ... are judged together."""
    return (batch - 1).bit_length()
