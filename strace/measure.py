"""What decides whether a subgraph pays: its acceptance on text, and what its steps cost on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from strace.blocks import LONGEST_BLOCK, BlockAttend, RecordAttend, even_starts
from strace.decoder import Decoder
from strace.kv import BLOCK, Batch, make_cache
from strace.runner import FULL, TorchRunner
from strace.texts import Texts

ROW_CHUNK = 1024  # logit rows held at once
CONTEXT = 192  # tokens before a timed step
DRAFTS = (1, 3, 7)  # draft lengths timed
ROUNDS = 8


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
        for some in rows.split(ROW_CHUNK):
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
    whole = full.streams(tokens, positions, record)
    return whole, subgraph.streams(tokens, positions, BlockAttend(starts, record.entries))


def compare(p: Tensor, q: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 - TV and equality of the arg max [R] of the full distributions p [R, V] and a subgraph's q [R, head rows]."""
    near = p if token_ids is None else p[:, token_ids]
    best = q.argmax(-1) if token_ids is None else token_ids[q.argmax(-1)]
    return torch.minimum(near, q).sum(-1), (p.argmax(-1) == best).float()


@dataclass(frozen=True)
class Costs:
    """One machine's step costs in full-model steps: c of a draft step, v(n) of a full pass over n tokens; `full_ms` is
    the unit."""

    c: float
    v: dict[int, float]
    full_ms: float

    def verify(self, n: int) -> float:
        """v(n), linear between the measured ones."""
        return float(np.interp(n, list(self.v), list(self.v.values())))


class _Clock:
    """Times single passes of several graphs over one sequence, after a context of the full model."""

    def __init__(self, full: Decoder, subgraphs: Sequence[Decoder]) -> None:
        self.context = min(CONTEXT, full.spec.context - LONGEST_BLOCK - 2)
        length = self.context + LONGEST_BLOCK + 2
        cache = make_cache(full.spec, -(-length // BLOCK), full.dtype, full.devices or None)
        graphs = {f"draft {i}": subgraph for i, subgraph in enumerate(subgraphs)}
        self._runner = TorchRunner({FULL: full, **graphs}, cache)
        self._table = torch.arange(cache.blocks)[None]
        self._tokens = torch.randint(full.spec.vocabulary, (length,), generator=torch.Generator().manual_seed(0))
        self._device = full.embed.device
        self._runner.forward(FULL, Batch(self._tokens[: self.context], [self.context], [0], self._table), [0])

    def time(self, graph: str, place: int, count: int) -> float:
        """Seconds of a pass of `graph` over `count` tokens, `place` tokens after the context."""
        start = self.context + place
        batch = Batch(self._tokens[start : start + count], [count], [start], self._table)
        return _seconds(lambda: self._runner.forward(graph, batch, list(range(count))), self._device)


@torch.inference_mode()
def measure_costs(full: Decoder, subgraphs: Sequence[Decoder], rounds: int | None = None) -> list[Costs]:
    """The costs of each subgraph, on a `TorchRunner`, timed in the alternation of serving: a full step, k draft steps,
    a full pass over k + 1. All subgraphs take turns within a round, so that other load on the machine hits them alike,
    and lower quartiles are taken, because it only ever adds time. v(n) is the full model's and the same for all.
    """
    clock = _Clock(full, subgraphs)
    plain: list[float] = []
    drafts: list[list[float]] = [[] for _ in subgraphs]
    verify: dict[int, list[float]] = {k: [] for k in DRAFTS}
    for turn in range((rounds or ROUNDS) + 1):
        for i, k in product(range(len(subgraphs)), DRAFTS):
            one = clock.time(FULL, 0, 1)
            steps = [clock.time(f"draft {i}", place, 1) for place in range(k)]
            block = clock.time(FULL, 0, k + 1)
            if turn:  # the first round warms up
                plain.append(one)
                drafts[i] += steps
                verify[k].append(block)
    unit = _lower_quartile(plain)
    v = {1: 1.0} | {k + 1: _lower_quartile(times) / unit for k, times in verify.items()}
    return [Costs(_lower_quartile(times) / unit, v, unit * 1000) for times in drafts]


def _lower_quartile(times: Sequence[float]) -> float:
    return float(np.quantile(times, 0.25))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def name_processor() -> str:
    """The CPU's name where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def predict_speedup(accepted: Sequence[float], costs: Costs) -> tuple[float, int]:
    """The best S over draft lengths k and that k: `S = E / (k c + v(k + 1))`, E = 1 + sum of prod a_i, a_i measured per
    position."""
    expected = 1 + np.cumsum(np.cumprod(accepted))
    speedups = [e / (k * costs.c + costs.verify(k + 1)) for k, e in enumerate(expected, 1)]
    best = int(np.argmax(speedups))
    return float(speedups[best]), best + 1
