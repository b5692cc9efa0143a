"""What decides whether a subgraph pays: its acceptance on text, and the speedup predicted from it and costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strace.blocks import LONGEST_BLOCK, BlockAttend, RecordAttend, even_starts
from strace.decoder import Decoder
from strace.texts import Texts, split_rows


@dataclass(frozen=True)
class Acceptance:
    """At draft positions 1..8, means over all text positions: `accepted`, 1 - TV of the distributions at temperature 1,
    and `agreement`, the share of equal arg max. In the serving regime: the full model's keys and values before the
    draft."""

    accepted: tuple[float, ...]
    agreement: tuple[float, ...]
    positions: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accepted)


@torch.inference_mode()
def measure_acceptance(full: Decoder, subgraph: Decoder, batches: Sequence[Texts], seed: int = 0) -> Acceptance:
    """How far `subgraph` agrees with `full` on texts, which neither was fitted on."""
    sums = torch.zeros(3, LONGEST_BLOCK, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        starts = even_starts(batch.shape, generator)
        p_stream, q_stream = block_streams(full, subgraph, batch, starts)
        rows = batch.real.flatten().nonzero().flatten()
        depth = (torch.arange(batch.shape[1]) - starts).flatten()
        for some in split_rows(rows, full.spec.vocabulary):
            here = some.to(p_stream.device)
            p, q = full.logits(p_stream[here]).softmax(-1), subgraph.logits(q_stream[here]).softmax(-1)
            accepted, agreed = compare(p, q, subgraph.token_ids)
            for row, values in zip(sums, (accepted, agreed, torch.ones(len(some))), strict=True):
                row.index_add_(0, depth[some], values.double().cpu())
    accepted, agreed = (sums[:2] / sums[2].clamp_min(1)).tolist()
    return Acceptance(tuple(accepted), tuple(agreed), int(sums[2].sum()))


def block_streams(full: Decoder, subgraph: Decoder, batch: Texts, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The last streams [S * n, hidden] of the full model and of the subgraph drafting in blocks that begin at
    `starts`."""
    device = full.embed.device
    tokens, positions = batch.tokens.flatten().to(device), batch.positions.to(device)
    record = RecordAttend(*batch.shape, device=device)
    drafts = subgraph.walk(tokens, positions, BlockAttend(starts, record.entries))
    for streams in zip(full.walk(tokens, positions, record), drafts, strict=True):
        record.entries.clear()  # those of one layer are held at a time
        whole, own = streams
    return whole.to(full.final_norm.device), own.to(full.final_norm.device)


def compare(p: Tensor, q: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 - TV and equality of the arg max [R] of the full distributions p [R, V] and a subgraph's q [R, head rows]."""
    near = p if token_ids is None else p[:, token_ids]
    best = q.argmax(-1) if token_ids is None else token_ids[q.argmax(-1)]
    return torch.minimum(near, q).sum(-1), (p.argmax(-1) == best).float()


def predict_speedup(accepted: Sequence[float], c: float, v: Mapping[int, float]) -> tuple[float, int]:
    """The best S over draft lengths k and that k: `S = E / (k c + v(k + 1))`, E = 1 + sum of prod a_i, a_i measured per
    position, v linear between the tokens it is given for."""
    expected = 1 + np.cumsum(np.cumprod(accepted))
    lengths = np.arange(1, len(expected) + 1)
    verify = np.interp(lengths + 1, sorted(v), [v[n] for n in sorted(v)])
    speedups = expected / (lengths * c + verify)
    best = int(np.argmax(speedups))
    return float(speedups[best]), best + 1
