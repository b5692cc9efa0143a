"""Who holds which blocks of the KV cache; its memory is fixed when the engine starts."""

from __future__ import annotations

from strace.kv import BLOCK


class BlockPool:
    """The free list over a cache of `total` blocks."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` could be held by an empty cache."""
        return blocks_for(tokens) <= self.total

    def take(self, tokens: int) -> list[int] | None:
        """Blocks for a sequence that grows up to `tokens`, or None while too few are free."""
        count = blocks_for(tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Free what `take` gave; the list is emptied, so that nothing is ever freed twice."""
        self._free.extend(reversed(blocks))
        blocks.clear()


def blocks_for(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)
