"""The serving regime on whole texts: drafts in blocks over the full model's keys and values.

A subgraph that drafts from position s reads the full model's entries for j < s and its own for s <= j <= i. Here every
text is split into such blocks, and one pass over it gives what the subgraph would have given in each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strace.decoder import Attention, DenseAttend, causal_mask, mix

LONGEST_BLOCK = 8
QUERIES = 128  # positions that attend at once


class RecordAttend(DenseAttend):
    """As `DenseAttend`, keeping every layer's keys (after rope) and values, [S, K, n, D]."""

    def __init__(self, sequences: int, length: int, device: torch.device | str = "cpu") -> None:
        super().__init__(sequences, length, device)
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (t.reshape(*self.shape, *t.shape[1:]).transpose(1, 2) for t in (k, v))
        self.entries[layer] = keys, values
        return super().__call__(layer, attention, q, k, v)


class BlockAttend:
    """A subgraph's attention in draft blocks: `starts` int64 [S, n] is the first position of each position's block, and
    `entries` the full model's keys and values as `RecordAttend` keeps them.

    Queries go some at a time, for no position needs the full model's entries behind it, nor own ones from before its
    block: that spares more than half of the products.
    """

    def __init__(self, starts: Tensor, entries: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._starts, self._entries = starts, entries
        length = starts.shape[1]
        reach = int((torch.arange(length, device=starts.device) - starts).max())
        queries = [slice(first, min(first + QUERIES, length)) for first in range(0, length, QUERIES)]
        self._cuts = [(rows, slice(max(0, rows.start - reach), rows.stop)) for rows in queries]
        self._masks: dict[tuple[int | None, torch.device], list[Tensor]] = {}

    def masks(self, window: int | None, device: torch.device) -> list[Tensor]:
        """Of each cut bool [S, rows, keys]: the full model's entries up to its end, then the subgraph's own."""
        if (window, device) not in self._masks:
            self._masks[window, device] = [self._mask(rows, own, window, device) for rows, own in self._cuts]
        return self._masks[window, device]

    def _mask(self, rows: slice, own: slice, window: int | None, device: torch.device) -> Tensor:
        first = self._starts[:, rows, None].to(device)
        places = torch.arange(rows.stop, device=device)
        near = causal_mask(places[rows], places, window)
        return torch.cat([near & (places < first), near[:, own] & (places[own] >= first)], -1)

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(*self._starts.shape, *t.shape[1:]) for t in (q, k, v))
        past = self._entries[layer]
        if attention.kept is not None:
            past = past[0][:, attention.kept], past[1][:, attention.kept]
        drafted = k.transpose(1, 2), v.transpose(1, 2)
        mixed = []
        for (rows, own), mask in zip(self._cuts, self.masks(attention.window, q.device), strict=True):
            both = zip(past, drafted, strict=True)
            keys, values = (torch.cat([p[:, :, : rows.stop], d[:, :, own]], 2) for p, d in both)
            mixed.append(mix(q[:, rows], keys, values, mask, attention))
        return torch.cat(mixed, 1).flatten(0, 1)


def random_starts(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """int64 [S, n]: every text split into blocks of 1 to 8 positions, lengths uniform."""
    starts = torch.zeros(shape, dtype=torch.int64)
    for row in starts:
        lengths = torch.randint(1, LONGEST_BLOCK + 1, (shape[1],), generator=generator)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        row += torch.repeat_interleave(first[:-1], lengths)[: shape[1]]
    return starts


def even_starts(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """int64 [S, n]: blocks of 8 positions, the first one of each text cut to a random length, so that every depth is
    seen at every place."""
    offsets = torch.randint(LONGEST_BLOCK, (shape[0], 1), generator=generator)
    places = torch.arange(shape[1])
    return ((places + offsets) // LONGEST_BLOCK * LONGEST_BLOCK - offsets).clamp_min(0)
