"""The Runner contract and its torch implementation: one full-model or subgraph pass over a ragged batch.

Everything the engine does to a model goes through `forward` and `draft`. The full model is the graph named `full`; a
subgraph is named by its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from strace.decoder import Decoder
from strace.kv import Batch, KVCache, PagedAttend

FULL = "full"


@dataclass(frozen=True)
class Drawn:
    """What one draft step gave for S sequences: ids [S] drawn, `q` float32 [S, vocabulary] they were drawn from, and
    the draft's confidence [S] before the draw (its top-1 probability at temperature 1, corrected for a short head)."""

    ids: list[int]
    q: Tensor
    confidence: list[float]


class Drafter(Protocol):
    """Sampling and stop rule of a draft, kept out of the runner so that a native one can take them over."""

    def draw(self, rows: Tensor, confidence: list[float], alive: list[int]) -> Drawn:
        """Draw one token for each sequence still `alive` (numbers in the batch) from its float32 logits [len(alive),
        V]."""

    def survivors(self, alive: list[int]) -> list[int]:
        """Which of the `alive` sequences shall draw another token."""


class Runner(Protocol):
    """Runs graphs over one shared KV cache."""

    cache: KVCache

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        """float32 logits [len(rows), vocabulary] at the positions `rows` of the concatenated tokens.

        Ids outside a subgraph's short head get -inf.
        """

    def draft(self, graph: str, batch: Batch, drafter: Drafter) -> None:
        """Run the subgraph over the batch's pending tokens, then token by token while the drafter has survivors."""


class TorchRunner:
    """The portable reference, in eager torch."""

    def __init__(self, graphs: dict[str, Decoder], cache: KVCache) -> None:
        self.graphs = graphs
        self.cache = cache

    @torch.inference_mode()
    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        decoder = self.graphs[graph]
        positions = batch.positions
        device = decoder.embed.device
        attend = PagedAttend(self.cache, batch, positions)
        streams = decoder.streams(batch.tokens.to(device), positions.to(device), attend)
        logits = decoder.logits(streams[torch.tensor(rows, dtype=torch.int64, device=streams.device)]).cpu()
        if decoder.token_ids is None:
            return logits
        full = torch.full((len(rows), decoder.spec.vocabulary), -torch.inf)
        full[:, decoder.token_ids] = logits
        return full

    def draft(self, graph: str, batch: Batch, drafter: Drafter) -> None:
        coverage = self.graphs[graph].coverage
        alive = list(range(len(batch.counts)))
        ends = [s + n for s, n in zip(batch.starts, batch.counts, strict=True)]
        rows = [sum(batch.counts[: i + 1]) - 1 for i in alive]
        step = batch
        while alive:
            logits = self.forward(graph, step, rows)
            confidence = (logits.softmax(-1).amax(-1) * coverage).tolist()
            drawn = drafter.draw(logits, confidence, alive)
            kept = set(drafter.survivors(alive))
            last = {i: token for i, token in zip(alive, drawn.ids, strict=True) if i in kept}
            alive = list(last)
            tables = batch.tables[alive]
            step = Batch(torch.tensor(list(last.values())), [1] * len(alive), [ends[i] for i in alive], tables)
            for i in alive:
                ends[i] += 1
            rows = list(range(len(alive)))
