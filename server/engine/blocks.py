"""Who holds which blocks of the KV cache, and what is in those that can be shared; its memory is fixed when the engine
starts.

A block that the full model has filled bears a key, which stands for its tokens and all before them. Texts that begin
alike hold such blocks together: nobody writes into them. One that no text holds any more stays until its place is
needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from strace.kv import BLOCK


class BlockPool:
    """The blocks of a cache of `total`: free, held by one text or more, or idle: held by none, but with a key."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))
        self._holders = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # in the order in which they are taken: unused for longest first

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that texts hold."""
        return self.total - self.free

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` could be held by an empty cache."""
        return blocks_for(tokens) <= self.total

    def take(self, count: int) -> list[int] | None:
        """So many blocks to write into, or None while too few are free."""
        if count > self.free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that bear these keys, up to the first that no block bears: to read, not to write into."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._idle.pop(block, None)
            self._holders[block] += 1
            blocks.append(block)
        return blocks

    def mark(self, block: int, key: bytes) -> None:
        """Say what the full model has filled a held block with. Of blocks with equal content one is known."""
        if key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key

    def give_back(self, blocks: list[int]) -> None:
        """End one text's hold on its blocks; the list is emptied, so that none is given back twice."""
        # The last first: a block is of use only with all before it, so it is the first to be lost.
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        blocks.clear()

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block], self._block_of[self._key_of.pop(block)]
        return block


def blocks_for(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def chain_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block. before: that of the block before it, empty for the first.

    SHA-256, because two texts with one key would read each other's entries, and texts come from strangers.
    """
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
