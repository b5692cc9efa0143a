"""Whether speculation really is faster: realised speedup in paired blocks, per mode, class and batch size.

The rule of expected gain believes a cost table and a calibration; the guard believes the clock. A block pairs steps
that drafted with plain full steps of about the same time, batch and context. Speculation that is surely faster is
interrupted by a plain step now and then; one that is surely slower is off, its texts are served by plain full steps,
and drafts are probed now and then; in between both kinds alternate. "Now and then" is 1 % of the time.

Whether `routed` may emit unverified is judged the same way, per class and batch size: steps whose gate is open beside
steps whose gate is shut, which are those of `exact`. What emits nothing sooner than it verifies is not worth a risk, so
the gate stays open only where it is surely faster.
"""

from __future__ import annotations

import math
import random
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
GATE_STEPS = 32  # of each kind in a block of `routed`, whose gain is small beside the noise of one draft
_GATE_FADE = 0.98
GATE_BLOCKS = 40  # after so many what is not surely faster is shut
_GATE_PROBE = 1 / 32  # of the steps; the wrong kind costs a few per cent of each

Key = tuple[Mode, str]


class Trust(float, Enum):
    """What the blocks so far say of speculation; the value is the one that metrics show."""

    OFF = 0.0
    UNSURE = 0.5
    ON = 1.0


@dataclass
class Share:
    """One step's drafting, as far as it is one key's or one class's. expected: the full model's time for the texts by
    the table, were it to draw one token each. seconds: those of its drafts, and its share of all that is no drafting.
    gain: tokens beyond one per text, over texts. share: of the step's drafted tokens."""

    expected: float
    seconds: float
    gain: float
    share: float


@dataclass
class Sums:
    """Over drafting steps: what the full model should take for their tokens; a key's part of their time; and the plain
    step's time in the other part. Together the last two are what the steps would have taken, had nobody else
    drafted."""

    steps: int = 0
    expected: float = 0.0
    seconds: float = 0.0
    beside: float = 0.0

    def add(self, drafting: Share) -> None:
        self.steps += 1
        self.expected += drafting.expected * (1 + drafting.gain)
        self.seconds += drafting.seconds
        self.beside += drafting.expected * (1 - drafting.share)

    def speedup(self, level: float) -> float:
        """Realised: time the full model takes for the same tokens over time taken. level: seconds of a plain step over
        the table's."""
        return level * self.expected / (self.seconds + level * self.beside)


class Mean:
    """Of the logarithms of blocks' speedups, older ones fading."""

    def __init__(self, fade: float) -> None:
        self.value = self.error = 0.0
        self.blocks = 0
        self._fade = np.array([fade, fade**2, fade, fade])
        self._sums = np.zeros(4)  # of weights, squared weights, values, squared values

    def add(self, speedup: float) -> float:
        """The value that was added."""
        value = float(np.clip(math.log(speedup), -_WILD, _WILD))
        self.blocks += 1
        self._sums = self._sums * self._fade + [1, 1, value, value**2]
        weight, squared, total, squares = self._sums
        n, self.value = weight**2 / squared, total / weight
        self.error = math.sqrt(max(squares / weight - self.value**2, 0.0) / max(n - 1, 1e-9))
        return value

    @property
    def sure(self) -> bool:
        """Whether its sign is."""
        return self.blocks >= _LEAST and abs(self.value) > _SURE * self.error


class Track:
    """The blocks of one mode and class at one batch size."""

    def __init__(self) -> None:
        self.trust = Trust.UNSURE
        self.refused = False
        self.mean = Mean(_FADE)
        self._begin()

    def _begin(self) -> None:
        self._plain_steps, self._plain_expected, self._plain_seconds = 0, 0.0, 0.0
        self._drafting = Sums()

    def wants_plain(self, affordable: bool) -> bool:
        """Whether this key lacks a plain step to compare with."""
        if self.trust is Trust.ON:
            return affordable
        return self.trust is Trust.UNSURE and self._plain_steps <= min(self._drafting.steps, _STEPS - 1)

    def book_plain(self, expected: float, seconds: float) -> None:
        """expected: by the table."""
        self._plain_steps += 1
        self._plain_expected += expected
        self._plain_seconds += seconds
        self._close()

    def book_drafting(self, drafting: Share) -> None:
        self._drafting.add(drafting)
        self._close()

    def _close(self) -> None:
        """End a block that has enough of both kinds, and think again. A last block that contradicts the others is
        enough to doubt them: then both kinds alternate, and certainty comes back soon if it was chance."""
        if min(self._plain_steps, self._drafting.steps) < _STEPS:
            return
        value = self.mean.add(self._drafting.speedup(self._plain_seconds / self._plain_expected))
        self._begin()
        sure = self.mean.sure and self.mean.value * value > 0
        self.trust = Trust.UNSURE if not sure else Trust.ON if self.mean.value > 0 else Trust.OFF


class GateTrack:
    """The blocks of one class's `routed` texts at one batch size: drafting steps with the gate open, and shut."""

    def __init__(self) -> None:
        self.trust = Trust.UNSURE
        self.mean = Mean(_GATE_FADE)
        self._open, self._shut = Sums(), Sums()

    def book(self, drafting: Share, shut: bool, level: float) -> None:
        """level: as in `Sums.speedup`."""
        (self._shut if shut else self._open).add(drafting)
        if min(self._open.steps, self._shut.steps) < GATE_STEPS:
            return
        self.mean.add(self._open.speedup(level) / self._shut.speedup(level))
        self._open, self._shut = Sums(), Sums()
        if self.mean.sure and self.mean.value > 0:
            self.trust = Trust.ON
        elif self.mean.sure or self.mean.blocks >= GATE_BLOCKS:
            self.trust = Trust.OFF
        else:
            self.trust = Trust.UNSURE


@dataclass
class Bucket:
    """What is kept per batch size. Debts, in seconds, are paid back by 1 % of the time; nothing is spent before they
    are. level: seconds of a plain step over the table's; stamp: when it was last seen."""

    tracks: defaultdict[Key, Track] = field(default_factory=lambda: defaultdict(Track))
    gates: defaultdict[str, GateTrack] = field(default_factory=lambda: defaultdict(GateTrack))
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

    def gate_trust(self, name: str) -> Trust:
        """Of the gate of a class, as far as its texts may draft at all."""
        gate = self.gates[name]
        routed, exact = (
            (mode, name) in self.tracks and self.tracks[mode, name].trust is Trust.OFF
            for mode in (Mode.ROUTED, Mode.EXACT)
        )
        return gate.trust if routed == exact else Trust.OFF if routed else Trust.ON


@dataclass
class Turn:
    """What one step may do, and what it did.

    batch: texts it decodes. keys: of those that could draft, but (exact, class) for (routed, class) where the gate is
    shut. shut: by class that has routed texts, whether it is. plain: nobody drafts. probe: all do, even against the
    rule. off: who else does not draft. forced: classes that drew against the rule; what that brings says nothing of the
    rule. drafted: tokens; drafting: seconds by class.
    """

    batch: int
    keys: frozenset[Key] = frozenset()
    shut: dict[str, bool] = field(default_factory=dict)
    plain: bool = False
    probe: bool = False
    off: frozenset[Key] = frozenset()
    forced: set[str] = field(default_factory=set)
    drafted: Counter[Key] = field(default_factory=Counter)
    drafting: dict[str, float] = field(default_factory=dict)

    def runs(self, key: Key) -> Key:
        """What the texts of a mode and class run as: where the gate is shut, as `exact`."""
        mode, name = key
        return (Mode.EXACT, name) if mode is Mode.ROUTED and self.shut.get(name) else key

    def allows(self, key: Key) -> bool:
        """Whether texts of this mode and class may draft."""
        return not self.plain and (self.probe or key not in self.off)


class Guard:
    """The verdicts on all modes, classes and batch sizes."""

    def __init__(self, full_seconds: list[float], active: bool = True) -> None:
        """full_seconds: a full pass over so many tokens; only its shape counts. active: False lets everything draft,
        and measures nothing."""
        self._table = full_seconds
        self._active = active
        self._buckets = defaultdict[int, Bucket](Bucket)
        self._random = random.Random(0)

    def turn(self, keys: Iterable[Key], batch: int, measurable: bool) -> Turn:
        """What the coming step may do. keys: of the texts that could draft. measurable: the step reads no prompt, so
        that `book` will hear of it."""
        turn = Turn(batch, frozenset(keys))
        if not self._active or not turn.keys:
            return turn
        bucket = self._buckets[_size(batch)]
        if routed := {name for mode, name in turn.keys if mode is Mode.ROUTED}:
            turn.shut = {name: self._shuts(bucket.gate_trust(name)) for name in routed}
            turn.keys = frozenset(map(turn.runs, turn.keys))
        tracks = {key: bucket.tracks[key] for key in turn.keys}
        turn.off = frozenset(key for key, track in tracks.items() if track.trust is Trust.OFF)
        if not measurable:
            return turn
        refused = any(track.refused for track in tracks.values())
        turn.probe = bool(turn.off or refused) and bucket.probe_debt == 0
        turn.plain = not turn.probe and any(t.wants_plain(bucket.plain_debt == 0) for t in tracks.values())
        return turn

    def _shuts(self, trust: Trust) -> bool:
        """Whether the gate is shut in this step: by lot, so that neither kind of step follows a pattern of the text."""
        share = {Trust.ON: _GATE_PROBE, Trust.UNSURE: 0.5, Trust.OFF: 1 - _GATE_PROBE}[trust]
        return self._random.random() < share

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
        by_class, gained_by_class = Counter[str](), Counter[str]()
        for key, tokens in turn.drafted.items():
            by_class[key[1]] += tokens
            gained_by_class[key[1]] += gained[key]
        drafted, rest = turn.drafted.total(), seconds - sum(turn.drafting.values())
        for key, tokens in turn.drafted.items():
            if tokens and key[1] not in turn.forced:  # a grammar may leave a short head nothing to draw
                own, share = turn.drafting[key[1]] * tokens / by_class[key[1]], tokens / drafted
                part = Share(expected, own + rest * share, gained[key] / turn.batch, share)
                bucket.tracks[key].book_drafting(part)
        for name, shut in turn.shut.items():
            if by_class[name] and name not in turn.forced:
                share = by_class[name] / drafted
                part = Share(expected, turn.drafting[name] + rest * share, gained_by_class[name] / turn.batch, share)
                bucket.gates[name].book(part, shut, bucket.level or 1.0)

    def forget(self) -> None:
        """Judge anew: the drafts are others now. Between steps."""
        self._buckets = defaultdict(Bucket)

    def full_step(self, batch: int) -> float | None:
        """Seconds of a plain full step as lately measured at about this batch size, if it was."""
        bucket = self._buckets.get(_size(batch))
        return None if bucket is None or bucket.level is None else bucket.level * extrapolate(self._table, batch)

    def why_shut(self, turn: Turn, name: str) -> str | None:
        """Why `routed` texts of a class emit nothing in a step, where it is no mere trial."""
        if not turn.shut.get(name):
            return None
        bucket = self._buckets[_size(turn.batch)]
        if bucket.gate_trust(name) is not Trust.OFF:
            return None
        gate, here = bucket.gates[name], f"for class {name!r}, {turn.batch} at once"
        if gate.trust is not Trust.OFF:
            return f"routed is slower than the full model here, {here}"
        return f"routed is not surely faster than exact here: {math.exp(gate.mean.value):.2f} times {here}"

    def gates(self) -> list[tuple[str, int, Trust, Mean]]:
        """Class and greatest batch of every gate that is judged, whether it is open, and what open over shut brought.
        From any thread."""
        return [
            (name, 1 << size, bucket.gate_trust(name), gate.mean)
            for size, bucket in list(self._buckets.items())
            for name, gate in list(bucket.gates.items())
        ]

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
