"""The paged KV cache: blocks of 32 tokens, keys after rope, one cache for the full model and all its subgraphs.

Per sequence everything before `verified` was written by the full model. Past it lie a subgraph's provisional entries,
which only that subgraph reads, during one draft, and which the next full pass overwrites in every layer. Nothing past
`verified` is ever shared or kept.
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


@dataclass(slots=True)
class Batch:
    """The tokens of one pass: ragged, concatenated, no padding.

    tokens: N of them. counts: tokens of each of the S sequences. starts: position of each sequence's first token here;
    all before it is in the cache. tables: int64 [S, B], the blocks of each sequence in order (unused entries: any valid
    block). (Not frozen, and no tensor but the tables: one is made for every pass, and tensors take far longer.)
    """

    tokens: list[int]
    counts: list[int]
    starts: list[int]
    tables: Tensor

    @property
    def positions(self) -> Tensor:
        """int64 [N]."""
        return torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])


class PagedAttend:
    """Attention of one pass over a paged cache: writes the pass's keys and values, then reads each sequence's past.

    A cache tensor is seen as rows, one per (block, head) when reading and one per (block, head, offset) when writing,
    so that each is a single gather or scatter of whole rows. What does not depend on the layer is worked out once a
    pass.
    """

    def __init__(self, cache: KVCache, batch: Batch, positions: Tensor) -> None:
        self._cache = cache
        self._heads, self._size = cache.keys[0].shape[1], cache.keys[0].shape[3]
        ends = [s + n for s, n in zip(batch.starts, batch.counts, strict=True)]
        self._sequences, self._longest, self._most = len(ends), max(ends), max(batch.counts)
        self._starts = batch.starts
        owner = torch.arange(len(ends)).repeat_interleave(torch.tensor(batch.counts))
        self._tables = batch.tables[:, None, : -(-self._longest // BLOCK)] * self._heads
        blocks = batch.tables[owner, positions // BLOCK]
        self._slots = (blocks * self._heads * BLOCK + positions % BLOCK)[:, None]
        self._place: Tensor | None = None
        if len(set(batch.counts)) > 1:
            # A ragged pass is padded for the product only; row i of sequence s lies at s * most + i.
            self._place = owner * self._most + positions - torch.tensor(batch.starts)[owner]
        self._rows: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int | None, torch.device], Tensor | None] = {}

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """bool [S, n, longest], or None where one token reads all of one sequence."""
        lone = self._sequences == self._most == 1
        if lone and (window is None or window >= self._longest):
            return None
        if (window, device) not in self._masks:
            queries = torch.tensor(self._starts)[:, None] + torch.arange(self._most)
            mask = causal_mask(queries, torch.arange(self._longest), window)
            self._masks[window, device] = mask.to(device)
        return self._masks[window, device]

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        read, write = self._find_rows(attention.kept, keys.device)
        past = (self._exchange(keys, k, read, write), self._exchange(values, v, read, write))
        mixed = mix(self._pad(q), *past, self.mask(attention.window, q.device), attention).flatten(0, 1)
        return mixed if self._place is None else mixed[self._place.to(q.device)]

    def _find_rows(self, kept: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of the rows to read, int64 [S * heads * blocks], and to write, [N * heads], for the `kept` heads."""
        if kept is None and device in self._rows:
            return self._rows[device]
        heads = torch.arange(self._heads, device=device) if kept is None else kept
        read, write = self._tables.to(device) + heads[:, None], self._slots.to(device) + heads * BLOCK
        rows = read.flatten(), write.flatten()
        if kept is None:
            self._rows[device] = rows
        return rows

    def _exchange(self, entries: Tensor, new: Tensor, read: Tensor, write: Tensor) -> Tensor:
        """Write the pass's entries [N, heads, D]; give every sequence's past [S, heads, longest, D]."""
        entries.view(-1, self._size).index_copy_(0, write, new.reshape(-1, self._size))
        past = entries.view(-1, BLOCK * self._size).index_select(0, read)
        return past.view(self._sequences, new.shape[1], -1, self._size)[:, :, : self._longest]

    def _pad(self, q: Tensor) -> Tensor:
        """[N, H, D] -> [S, n, H, D]."""
        if self._place is not None:
            padded = q.new_zeros(self._sequences * self._most, *q.shape[1:])
            padded[self._place.to(q.device)] = q
            q = padded
        return q.view(self._sequences, self._most, *q.shape[1:])
