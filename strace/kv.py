"""The paged KV cache: blocks of 32 tokens, keys after rope, one cache for the full model and all its subgraphs.

Per sequence everything before `verified` was written by the full model. Past it lie a subgraph's provisional entries, which
only that subgraph reads, during one draft, and which the next full pass overwrites in every layer. Nothing past `verified` is
ever shared or kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strace.decoder import Attention, causal_mask, mix
from strace.families import Spec

BLOCK = 32


@dataclass
class KVCache:
    """Keys and values of all layers, each [blocks, kv_heads, 32, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def blocks(self) -> int:
        return self.keys[0].shape[0]


def block_bytes(spec: Spec, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    return 2 * spec.layers * spec.kv_heads * BLOCK * spec.head_dim * dtype.itemsize


def make_cache(spec: Spec, blocks: int, dtype: torch.dtype, devices: list[torch.device] | None = None) -> KVCache:
    """An empty cache; a layer's entries lie on the device of the layer."""
    shape = (blocks, spec.kv_heads, BLOCK, spec.head_dim)
    places = devices or [torch.device("cpu")] * spec.layers
    return KVCache(
        [torch.zeros(shape, dtype=dtype, device=d) for d in places],
        [torch.zeros(shape, dtype=dtype, device=d) for d in places],
    )


@dataclass(frozen=True)
class Batch:
    """The tokens of one pass: ragged, concatenated, no padding.

    tokens: int64 [N]. counts: tokens of each of the S sequences. starts: position of each sequence's first token here; all
    before it is in the cache. tables: int64 [S, B], the blocks of each sequence in order (unused entries: any valid block).
    """

    tokens: Tensor
    counts: list[int]
    starts: list[int]
    tables: Tensor

    @property
    def positions(self) -> Tensor:
        """int64 [N]."""
        return torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])


class PagedAttend:
    """Attention of one pass over a paged cache: writes the pass's keys and values, then reads each sequence's whole past.

    What does not depend on the layer (slots, masks, padding) is worked out once per pass.
    """

    def __init__(self, cache: KVCache, batch: Batch, positions: Tensor) -> None:
        self._cache = cache
        device = cache.keys[0].device
        ends = [s + n for s, n in zip(batch.starts, batch.counts, strict=True)]
        self._longest, self._most = max(ends), max(batch.counts)
        self._tables = batch.tables[:, : (self._longest + BLOCK - 1) // BLOCK].to(device)
        owner = torch.arange(len(ends)).repeat_interleave(torch.tensor(batch.counts))
        self._slot = batch.tables[owner, positions // BLOCK].to(device), (positions % BLOCK).to(device)
        self._ragged = len(set(batch.counts)) > 1
        # A ragged pass is padded for the product only; row i of sequence s lies at s * most + i.
        first = torch.tensor([0, *batch.counts[:-1]]).cumsum(0)
        self._place = (owner * self._most + torch.arange(len(positions)) - first[owner]).to(device)
        self._queries = (torch.tensor(batch.starts)[:, None] + torch.arange(self._most)).to(device)
        self._lone = len(ends) == 1 and self._most == 1
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None) -> Tensor | None:
        """bool [S, n, longest], or None where one token reads all of one sequence."""
        if window not in self._masks:
            every = self._lone and (window is None or window >= self._longest)
            keys = torch.arange(self._longest, device=self._queries.device)
            self._masks[window] = None if every else causal_mask(self._queries, keys, window)
        return self._masks[window]

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        block, offset = (t.to(keys.device) for t in self._slot)
        if attention.kept is None:
            keys[block, :, offset], values[block, :, offset] = k, v
        else:
            keys[block[:, None], attention.kept, offset[:, None]] = k
            values[block[:, None], attention.kept, offset[:, None]] = v
        past = (self._gather(keys, attention.kept), self._gather(values, attention.kept))
        mask = self.mask(attention.window)
        mixed = mix(self._pad(q), *past, None if mask is None else mask.to(q.device))
        return mixed.flatten(0, 1)[self._place.to(q.device)] if self._ragged else mixed.flatten(0, 1)

    def _pad(self, q: Tensor) -> Tensor:
        """[N, H, D] -> [S, n, H, D]."""
        if self._ragged:
            padded = q.new_zeros(len(self._tables) * self._most, *q.shape[1:])
            padded[self._place.to(q.device)] = q
            q = padded
        return q.view(len(self._tables), self._most, *q.shape[1:])

    def _gather(self, entries: Tensor, kept: Tensor | None) -> Tensor:
        """[S, kv_heads, longest, D] of every sequence's blocks."""
        tables = self._tables.to(entries.device)
        found = entries[tables] if kept is None else entries[tables[..., None], kept]
        return found.transpose(1, 2).flatten(2, 3)[:, :, : self._longest]
