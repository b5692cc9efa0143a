"""What passes cost on this machine: c and v(n) of `S = E / (k c + v(k + 1))`, measured, and kept up to date by live
passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from strace.kv import BLOCK, Batch
from strace.runner import FULL, Drawn, Runner

POINTS = (1, 2, 4, 8)
_TABLE = 64  # passes over more tokens are extrapolated
_STEPS = 3  # draft steps timed in one call
_RATE = 0.05  # weight of one live pass, once there were some
_FASTER = 0.25  # weight of one that was faster than expected: other load only ever adds, so the model was wrong
_WILD = 2.0  # how far a slow pass is believed: a hiccup is no trend


class CostModel:
    """Seconds of one pass of each graph over n tokens.

    The shape over n is the one measured at start. The level follows live passes: the full model's moves all graphs, for
    then the machine has become faster or slower; a draft's moves its own.
    """

    def __init__(self, measured: dict[str, dict[int, float]]) -> None:
        """measured: per graph, seconds by number of tokens, at two numbers or more."""
        self._tables = {graph: _interpolate(points) for graph, points in measured.items()}
        self._level = dict.fromkeys(measured, 1.0)
        self._seen = dict.fromkeys(measured, 0)

    def seconds(self, graph: str, tokens: int) -> float:
        """One pass over `tokens`; of the full model at one token per sequence, this is the full step."""
        table = self._tables[graph]
        beyond = max(0, tokens - _TABLE)
        level = self._level[FULL] if graph == FULL else self._level[FULL] * self._level[graph]
        return level * (table[tokens - beyond] + beyond * (table[_TABLE] - table[_TABLE - 1]))

    def observe(self, graph: str, passes: Iterable[int], seconds: float) -> None:
        """Learn from live passes over so many tokens each, which took `seconds` together."""
        expected = sum(self.seconds(graph, tokens) for tokens in passes)
        ratio = min(seconds / expected, _WILD)
        self._seen[graph] += 1
        least = _FASTER if ratio < 1 else _RATE
        self._level[graph] *= 1 + max(least, 1 / (2 + self._seen[graph])) * (ratio - 1)

    def c(self, graph: str) -> float:
        """Draft step over full step, one sequence."""
        return self.seconds(graph, 1) / self.seconds(FULL, 1)

    def v(self, tokens: int) -> float:
        """Full pass over `tokens` over full step."""
        return self.seconds(FULL, tokens) / self.seconds(FULL, 1)


def _interpolate(points: dict[int, float]) -> list[float]:
    """Seconds for 0.._TABLE tokens: linear between the points, never falling, the last slope going on."""
    known = sorted(points)
    values = np.maximum.accumulate([points[n] for n in known])
    slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
    counts = np.arange(_TABLE + 1)
    inside = np.interp(counts, known, values)
    return [float(x) for x in inside + np.maximum(counts - known[-1], 0) * slope]


class _Steps:
    """A drafter that takes the best token, for a given number of steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def draw(self, rows: Tensor, confidence: list[float], alive: list[int]) -> Drawn:
        return Drawn(rows.argmax(1).tolist(), rows, confidence)

    def survivors(self, alive: list[int]) -> list[int]:
        self._left -= 1
        return alive if self._left else []


def measure_costs(
    runner: Runner, drafts: Iterable[str], budget: float = 1.5, clock: Callable[[], float] = time.perf_counter
) -> CostModel:
    """Time the runner's passes as they alternate in serving: a few draft steps, then one full pass.

    Of several times the least is taken: what disturbs a pass only adds, and c and v are ratios of undisturbed passes.
    Writes over the cache's first blocks, so nothing may be stored there yet. budget: seconds, exceeded only where two
    rounds take longer.
    """
    graphs = list(drafts)
    samples: dict[str, dict[int, list[float]]] = {g: {n: [] for n in POINTS} for g in (FULL, *graphs)}
    _round(runner, graphs, {g: {n: [] for n in POINTS} for g in samples}, clock)
    start, rounds = clock(), 0
    while rounds < 2 or clock() - start < budget:
        _round(runner, graphs, samples, clock)
        rounds += 1
    return CostModel({g: {n: min(times) for n, times in by_n.items()} for g, by_n in samples.items()})


def _round(
    runner: Runner, graphs: list[str], samples: dict[str, dict[int, list[float]]], clock: Callable[[], float]
) -> None:
    for n in POINTS:
        for graph in graphs:
            begun = clock()
            runner.draft(graph, _dummy([1] * n, runner.cache.blocks), _Steps(_STEPS))
            samples[graph][n].append((clock() - begun) / _STEPS)
        begun = clock()
        runner.forward(FULL, _dummy([n], runner.cache.blocks), list(range(n)))
        samples[FULL][n].append(clock() - begun)


def _dummy(counts: list[int], blocks: int) -> Batch:
    """Sequences of token 0 at the start of the cache; they share blocks, for only the time counts."""
    width = min(blocks, 2)
    tables = torch.arange(width).repeat(len(counts), 1)
    start = width * BLOCK - max(counts) - _STEPS
    return Batch(torch.zeros(sum(counts), dtype=torch.int64), counts, [start] * len(counts), tables)
