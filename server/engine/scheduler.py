"""Which texts run, which wait, and which blocks of the cache each holds; it knows no model.

Texts are served in the order in which they came: those that run are older than those that wait. A text takes blocks as
it grows. Where none is left the youngest loses its own and waits again, at the head of the queue, to be read anew: so
the oldest always goes on, and every text becomes the oldest.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from server.engine.blocks import BlockPool, blocks_for
from server.engine.options import Options
from server.engine.request import Overloaded
from server.engine.sequence import Sequence
from strace.kv import BLOCK


@dataclass
class Plan:
    """What one step works on: the texts to decode, and how many tokens each text that is still being read reads."""

    decoding: list[Sequence] = field(default_factory=list)
    chunks: dict[Sequence, int] = field(default_factory=dict)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding, *self.chunks]

    def drop(self, sequence: Sequence) -> None:
        """Go on without a text."""
        self.chunks.pop(sequence, None)
        if sequence in self.decoding:
            self.decoding.remove(sequence)


class Scheduler:
    """The texts and the blocks of one engine. All but `add` is called in the engine's thread, and whatever touches
    `waiting` with the engine's lock held."""

    def __init__(self, pool: BlockPool, options: Options) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._options = options

    def add(self, sequence: Sequence) -> None:
        """Queue a text.

        Raises:
            Overloaded: if the queue is full.
        """
        if len(self.waiting) >= self._options.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already")
        self.waiting.append(sequence)

    def cancelled(self) -> list[Sequence]:
        """The texts that were given up."""
        return [s for s in (*self.running, *self.waiting) if s.cancelled]

    def admit(self) -> None:
        """Let waiting texts in, in order, while there is a place, and memory for what all that run have yet to read."""
        owed = sum(map(_owed, self.running)) if self.waiting else 0
        while self.waiting and len(self.running) < self._options.max_running:
            sequence = self.waiting[0]
            self._reuse(sequence)
            owed += _owed(sequence)
            if owed > self.pool.free:
                self._take_back(sequence)
                return
            self.running.append(self.waiting.popleft())
            if sequence.times.admitted is None:
                sequence.times.admitted = time.monotonic()
                sequence.ran.cached_tokens = sequence.verified

    def plan(self) -> Plan:
        """The next step's work, older texts first, with the blocks for it."""
        plan, left = Plan(), self._options.chunk
        for sequence in self.running:  # which loses its youngest while they make room for older ones
            if not sequence.prefilling:
                if self._grow(sequence, sequence.reach(self._options)):
                    plan.decoding.append(sequence)
            elif left > 0:
                reused = self._reuse(sequence)
                sequence.ran.cached_tokens += 0 if sequence.ran.preemptions else reused
                count = min(left, len(sequence.ids) - sequence.verified)
                if self._grow(sequence, sequence.verified + count):
                    plan.chunks[sequence] = count
                    left -= count
        return plan

    def seal(self, sequence: Sequence) -> None:
        """Make those blocks of a text known that the full model has filled."""
        full = sequence.verified // BLOCK
        if full == sequence.sealed or not self._options.prefix_cache:
            return
        keys = sequence.keys(full)
        for i in range(sequence.sealed, full):
            self.pool.mark(sequence.blocks[i], keys[i])
        sequence.sealed = full

    def remove(self, sequence: Sequence) -> None:
        """Forget a text, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.give_back(sequence.blocks)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a text the blocks for so many tokens, if need be those of the youngest; False if that is itself."""
        missing = blocks_for(tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while (blocks := self.pool.take(missing)) is None:
            youngest = self.running.pop()
            self._take_back(youngest)
            youngest.ran.preemptions += 1
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        sequence.hold(blocks)
        return True

    def _reuse(self, sequence: Sequence) -> int:
        """Let a text that is about to begin a block hold those that are filled already with what comes next; how many
        tokens it need not read. The last one is read in any case, because the next token follows from its row."""
        held = len(sequence.blocks)
        unusable = not self._options.prefix_cache or sequence.request.prompt_logprobs
        if unusable or sequence.verified != held * BLOCK:
            return 0
        keys = sequence.keys((len(sequence.ids) - 1) // BLOCK)
        blocks = self.pool.share(keys[held:])
        sequence.hold(blocks)
        sequence.verified += len(blocks) * BLOCK
        sequence.sealed = len(sequence.blocks)
        return len(blocks) * BLOCK

    def _take_back(self, sequence: Sequence) -> None:
        """Take a text's blocks; what the full model wrote for it has to be written anew."""
        self.pool.give_back(sequence.blocks)
        sequence.verified = sequence.sealed = 0


def _owed(sequence: Sequence) -> int:
    """Blocks that a text lacks for its tokens and the next, if one may follow."""
    return max(0, blocks_for(min(len(sequence.ids) + 1, sequence.most_tokens)) - len(sequence.blocks))
