"""What passes cost on this machine: c and v(n) of `S = E / (k c + v(k + 1))`, measured, and kept up to date by live
passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from strace.classes import POOLED
from strace.costs import (
    SETTLE,
    TYPICAL,
    Case,
    Cost,
    describe_setting,
    draw_curve,
    draw_verifying,
    list_cases,
    list_drafts,
    load_table,
    measure_costs,
    text_limit,
)
from strace.draft import extrapolate
from strace.runner import FULL, Runner

POINTS = (1, 2, 4, 5, 6, 7, 9)  # where kernels change; 9 judge the longest draft
_TABLE = 64  # passes over more tokens are extrapolated
_BUDGET = 1.5  # seconds of measuring at start, exceeded only where three rounds take longer
_RATE = 0.05  # weight of one live pass, once there were some
_FASTER = 0.25  # weight of one that was faster than expected: other load only ever adds, so the model was wrong
_WILD = 2.0  # how far a slow pass is believed: a hiccup is no trend


class CostModel:
    """Seconds of one pass of each graph over n tokens, and of what the engine does beside them in a step.

    The shape over n is the one measured at start. The level follows live passes: the full model's moves all graphs, for
    then the machine has become faster or slower; a draft's moves its own.
    """

    def __init__(self, measured: dict[str, dict[int, float]]) -> None:
        """measured: per graph, seconds by number of tokens, at two numbers or more."""
        self._tables = {graph: _interpolate(points) for graph, points in measured.items()}
        self._level = dict.fromkeys(measured, 1.0)
        self._seen = dict.fromkeys(measured, 0)
        self._own: dict[tuple[int, bool], tuple[float, int]] = {}

    def table(self, graph: str) -> list[float]:
        """Seconds of one pass over so many tokens; `strace.draft.extrapolate` gives those beyond it."""
        factor = self._factor(graph)
        return [seconds * factor for seconds in self._tables[graph]]

    def seconds(self, graph: str, tokens: int) -> float:
        """One pass over `tokens`; of the full model at one token per sequence, this is the full step."""
        return self._factor(graph) * extrapolate(self._tables[graph], tokens)

    def _factor(self, graph: str) -> float:
        return self._level[FULL] if graph == FULL else self._level[FULL] * self._level[graph]

    def estimate(self, shares: Mapping[str, float]) -> CostModel:
        """A model for other drafts, none of which was measured: each like `pooled`, times its share of the bytes that
        `pooled` read. Live passes put it right."""
        other, step, level = CostModel({}), self._tables[POOLED], self._level[POOLED]
        other._tables = {FULL: self._tables[FULL]} | {g: [s * level * x for s in step] for g, x in shares.items()}
        other._level = {FULL: self._level[FULL]} | dict.fromkeys(shares, 1.0)
        other._seen = {FULL: self._seen[FULL]} | dict.fromkeys(shares, 0)
        other._own = self._own.copy()
        return other

    def observe(self, graph: str, passes: Iterable[int], seconds: float) -> None:
        """Learn from live passes over so many tokens each, which took `seconds` together."""
        expected = self._factor(graph) * sum(extrapolate(self._tables[graph], tokens) for tokens in passes)
        ratio = min(seconds / expected, _WILD)
        self._seen[graph] += 1
        least = _FASTER if ratio < 1 else _RATE
        self._level[graph] *= 1 + max(least, 1 / (2 + self._seen[graph])) * (ratio - 1)

    def observe_own(self, batch: int, drafting: bool, seconds: float) -> None:
        """Learn what a step over so many texts took beside its passes."""
        mean, seen = self._own.get((batch, drafting), (seconds, 0))
        share = max(_RATE, 1 / (1 + seen))
        self._own[batch, drafting] = mean + share * (min(seconds, _WILD * mean) - mean), seen + 1

    def own(self, batch: int, drafting: bool) -> float:
        """Seconds that the engine takes itself in a step over so many texts; 0 until there was one."""
        return self._own.get((batch, drafting), (0.0, 0))[0]

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
    seconds: list[float] = (np.interp(counts, known, values) + np.maximum(counts - known[-1], 0) * slope).tolist()
    return seconds


def measure_start(runner: Runner, weight_hash: str) -> CostModel:
    """The cost model to start with: from the table that `strace-llm measure` kept for this very runner, else measured
    now, in about `_BUDGET` seconds."""
    table = load_table(describe_setting(runner, weight_hash))
    if table is not None:
        return make_model(table.costs)
    return make_model(measure_costs(runner, list_drafts(runner), list_start(text_limit(runner)), budget=_BUDGET))


def make_model(costs: Sequence[Cost]) -> CostModel:
    """The model of all graphs that were measured, at a typical context; a full pass is one with its verdicts."""
    drafts = {cost.graph for cost in costs} - {FULL, SETTLE}
    return CostModel({FULL: draw_verifying(costs)} | {graph: draw_curve(costs, graph) for graph in drafts})


def list_start(limit: int) -> list[Case]:
    """The cases that the model is drawn from: full passes over one text, draft steps of one text and of many."""
    return [*list_cases(limit, (TYPICAL,), (1,), POINTS), *list_cases(limit, (TYPICAL,), (max(POINTS),), (1,))]
