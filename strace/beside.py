"""Does a class's own subgraph win beside `pooled`'s? The two draft for the same texts, and sources are drawn again.

The texts are the full model's own, of prompts that neither was fitted on or chosen by. What counts is the predicted
speedup at temperature 1, each at its own cost: of two subgraphs that do equally well the class needs none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from strace.blocks import LONGEST_BLOCK
from strace.measure import predict_speedup
from strace.onpolicy import Positions

DRAWS = 1000
MIDDLE = (0.025, 0.975)


@dataclass(frozen=True)
class Drafter:
    """A subgraph's table at one temperature, and what a step of it costs in full steps."""

    positions: Positions
    c: float


def sum_depths(positions: Positions) -> np.ndarray:
    """float64 [sources, 8, 2] by source and draft position: the weight of drafts that stand where all before them
    stood, and of those that were reached."""
    sums = np.zeros((len(positions.sources), LONGEST_BLOCK, 2))
    at = positions.source, positions.depth
    np.add.at(sums[..., 0], at, positions.reached * (1 - positions.tv))
    np.add.at(sums[..., 1], at, positions.reached)
    return sums


def compare_speedups(own: Drafter, other: Drafter, v: Mapping[int, float], seed: int = 0) -> tuple[float, float, float]:
    """What `own` is predicted to gain over `other`, and the middle 95 % of draws of the sources that both drafted for.

    Raises:
        ValueError: if they drafted for other sources.
    """
    if own.positions.sources != other.positions.sources:
        raise ValueError("the two drafted for texts of different sources")
    tables = [sum_depths(each.positions) for each in (own, other)]

    def gain(chosen: np.ndarray) -> float:
        """Of the sources `chosen`."""
        a, b = (
            predict_speedup(_shares(table[chosen].sum(0)), each.c, v)[0]
            for table, each in zip(tables, (own, other), strict=True)
        )
        return a - b

    count = len(own.positions.sources)
    drawn = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    low, high = np.quantile([gain(chosen) for chosen in drawn], MIDDLE)
    return gain(np.arange(count)), float(low), float(high)


def _shares(sums: np.ndarray) -> list[float]:
    stood, reached = sums.T
    return np.divide(stood, reached, out=np.zeros(len(sums)), where=reached > 0).tolist()
