"""The torch runner with its steps compiled: on CUDA, a pass over few tokens is one captured graph.

A captured graph has fixed shapes, so a pass is padded to the next shape of a small set; passes over more tokens, such
as prompts, run eagerly, where the overhead of single operations does not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from strace.decoder import Decoder, causal_mask
from strace.kv import BLOCK, Batch, KVCache, PagedAttend
from strace.runner import TorchRunner

logger = logging.getLogger(__name__)

_MOST = 64  # tokens of a compiled pass, padded
_LEAST_BLOCKS = 8


class Shape(NamedTuple):
    """Sequences, tokens of each, and blocks of the cache that each may read."""

    sequences: int
    tokens: int
    blocks: int


def fit_shape(batch: Batch) -> Shape | None:
    """The least shape that a batch fits, each size a power of two; None if it is too large for any."""
    longest = max(s + n for s, n in zip(batch.starts, batch.counts, strict=True))
    sequences, tokens = _next_power(len(batch.counts)), _next_power(max(batch.counts))
    if sequences * tokens > _MOST:
        return None
    return Shape(sequences, tokens, max(_LEAST_BLOCKS, _next_power(-(-longest // BLOCK))))


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class StaticAttend(PagedAttend):
    """Attention over a paged cache in which everything that a pass varies is a tensor: positions [sequences * tokens]
    and tables [sequences, blocks]."""

    def __init__(self, cache: KVCache, shape: Shape, positions: Tensor, tables: Tensor) -> None:
        self._cache = cache
        self._heads, self._size = cache.keys[0].shape[1], cache.keys[0].shape[3]
        self._sequences, self._most, self._longest = shape.sequences, shape.tokens, shape.blocks * BLOCK
        self._positions = positions.view(shape.sequences, shape.tokens)
        self._tables = tables[:, None] * self._heads
        blocks = tables.gather(1, self._positions // BLOCK).flatten()
        self._slots = (blocks * self._heads * BLOCK + positions % BLOCK)[:, None]
        self._place, self._rows, self._masks = None, {}, {}

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """bool [S, n, longest]."""
        if (window, device) not in self._masks:
            keys = torch.arange(self._longest, device=device)
            self._masks[window, device] = causal_mask(self._positions, keys, window)
        return self._masks[window, device]


class Step:
    """One graph's pass at one shape: the same tensors, filled anew for every batch."""

    def __init__(self, decoder: Decoder, cache: KVCache, shape: Shape) -> None:
        self._decoder, self._cache, self._shape = decoder, cache, shape
        device, count = decoder.embed.device, shape.sequences * shape.tokens
        self._tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._tables = torch.zeros(shape.sequences, shape.blocks, dtype=torch.int64, device=device)
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, batch: Batch, rows: list[int]) -> Tensor:
        """Logits [len(rows), head rows]."""
        places = self._fill(batch)
        if self._replay is None:
            self._replay = capture(self._compute, self._tokens.device)
        logits = self._replay()
        return logits[torch.tensor([places[row] for row in rows], device=logits.device)]

    def _compute(self) -> Tensor:
        attend = StaticAttend(self._cache, self._shape, self._positions, self._tables)
        return self._decoder.logits(self._decoder.streams(self._tokens, self._positions, attend))

    def _fill(self, batch: Batch) -> list[int]:
        """Set the inputs; where each of the batch's tokens lies among the padded ones.

        Padding repeats: a sequence its last token, the batch its last sequence, a table its first block. So it writes
        what is written anyway, and reads nothing that was never written.
        """
        shape, end = self._shape, 0
        chosen: list[int] = []
        places: list[int] = []
        for number, count in enumerate(batch.counts):
            chosen += [end + min(i, count - 1) for i in range(shape.tokens)]
            places += range(number * shape.tokens, number * shape.tokens + count)
            end += count
        missing = shape.sequences - len(batch.counts)
        chosen += chosen[-shape.tokens :] * missing
        self._tokens.copy_(torch.tensor([batch.tokens[i] for i in chosen]))
        self._positions.copy_(batch.positions[chosen])
        used = batch.tables[:, : shape.blocks]
        tables = torch.cat([used, used[:, :1].expand(-1, shape.blocks - used.shape[1])], 1)
        self._tables.copy_(torch.cat([tables, tables[-1:].expand(missing, -1)]))
        return places


def capture(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`compute` as one CUDA graph over the tensors that it reads and writes now; on another device, itself."""
    if device.type != "cuda":
        return compute
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        compute()  # kernels are chosen and layouts built on a first call, which must not be captured
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compute()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class CompiledRunner(TorchRunner):
    """See `strace.runner.Runner`. A shape is captured when it is first seen, in well under a second; one that cannot
    be, and a graph spread over several devices, runs eagerly."""

    name = "torch compiled"

    def __init__(self, graphs: dict[str, Decoder], cache: KVCache) -> None:
        super().__init__(graphs, cache)
        self._steps: dict[tuple[str, Shape], Step] = {}
        self._eager = {name for name, decoder in graphs.items() if decoder.devices}

    def _run(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        shape = None if graph in self._eager else fit_shape(batch)
        if shape is None:
            return super()._run(graph, batch, rows)
        if (graph, shape) not in self._steps:
            self._steps[graph, shape] = Step(self.graphs[graph], self.cache, shape)
        try:
            return self._steps[graph, shape](batch, rows)
        except RuntimeError as error:
            self._eager.add(graph)
            logger.warning("graph %s runs eagerly from now on, its step could not be compiled: %s", graph, error)
            return super()._run(graph, batch, rows)
