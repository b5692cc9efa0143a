"""Thresholds with a promise: which of them keep the mean of losses in [0, 1] at or below a risk, by test.

Statistics only. The test bets against the claim that the mean is above the risk (Waudby-Smith and Ramdas,
arXiv:2010.09686); thresholds are tested in a fixed order, strictest first, up to the first that fails (Learn then Test,
arXiv:2110.01052). So with probability at least 1 - delta over the units, the mean loss at the threshold chosen is at
most the risk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import bisect

DELTA = 0.05
RISKS = (0.01, 0.02, 0.05, 0.1)
_MOST = 0.99  # of the wealth that one unit may lose
_CHUNK = 50  # simulated draws held in memory at once


def grow_wealth(losses: np.ndarray, mean: float, delta: float) -> np.ndarray:
    """float64 [...]: the most a gambler owns who bets unit by unit that the mean is below `mean`, of 1 at first.

    losses: [..., n], in [0, 1], each drawn independently. Wherever their mean is `mean` or more, the probability that
    this ever reaches 1 / delta is at most delta (Ville). The bets are the predictable plug-in of section 4 of the
    paper, for n units and this delta.
    """
    x = np.asarray(losses, dtype=np.float64)
    n = x.shape[-1]
    if n == 0:
        return np.ones(x.shape[:-1])
    count = np.arange(2, n + 2)
    estimate = (0.5 + x.cumsum(-1)) / count
    variance = (0.25 + ((x - estimate) ** 2).cumsum(-1)) / count
    before = np.concatenate([np.full((*x.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    bets = np.sqrt(2 * math.log(1 / delta) / (n * before))
    if mean < 1:
        bets = np.minimum(bets, _MOST / (1 - mean))
    return np.asarray(np.exp(np.log1p(bets * (mean - x)).cumsum(-1).max(-1)))


def bound_mean(losses: np.ndarray, delta: float = DELTA) -> float:
    """What the mean of the distribution that losses [n] were drawn from is at most, with probability 1 - delta."""

    def excess(mean: float) -> float:
        return float(grow_wealth(losses, mean, delta)) - 1 / delta

    return 1.0 if excess(1.0) < 0 else float(bisect(excess, 0.0, 1.0, xtol=1e-6)) + 1e-6


def count_certified(losses: np.ndarray, risk: float, delta: float = DELTA) -> np.ndarray:
    """int64 [...]: how many thresholds pass one after the other. losses: [..., n, thresholds], strictest first."""
    passed = grow_wealth(np.moveaxis(np.asarray(losses), -1, -2), risk, delta) >= 1 / delta
    return np.asarray(np.cumprod(passed, axis=-1).sum(-1))


@cache
def count_needed(risk: float, delta: float = DELTA) -> int:
    """The fewest units that certify a risk: so many if none of them has any loss."""
    low, high = 0, 1
    while grow_wealth(np.zeros(high), risk, delta) < 1 / delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = grow_wealth(np.zeros(middle), risk, delta) >= 1 / delta
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True)
class Choice:
    """The loosest threshold that is certified, or None; and what speaks for or against it."""

    threshold: float | None
    why: str


def choose_threshold(losses: np.ndarray, thresholds: Sequence[float], risk: float, delta: float = DELTA) -> Choice:
    """What keeps the mean loss at or below `risk`. losses: [n, thresholds], strictest threshold first."""
    n = len(losses)
    passed = int(count_certified(losses, risk, delta)) if n and len(thresholds) else 0
    if passed:
        own = losses[:, passed - 1]
        bound = bound_mean(own, delta)
        return Choice(thresholds[passed - 1], f"{n} documents, mean divergence {own.mean():.4f}, at most {bound:.4f}")
    if n < (needed := count_needed(risk, delta)):
        return Choice(None, f"too few documents: {n} of at least {needed} needed")
    if not len(thresholds):
        return Choice(None, "no threshold was measured to its end")
    own = losses[:, 0]
    bound = bound_mean(own, delta)
    return Choice(
        None, f"mean divergence {own.mean():.4f}, by {n} documents at most {bound:.4f}, at {thresholds[0]:g} already"
    )


def share_broken(losses: np.ndarray, risk: float, draws: int, n: int, seed: int = 0, delta: float = DELTA) -> float:
    """How often the promise would be broken were losses [N, thresholds] the whole population: the share of `draws`,
    each of n units with replacement, whose chosen threshold has a mean above the risk in the population."""
    rng = np.random.default_rng(seed)
    above = np.concatenate([[False], losses.mean(0) > risk])
    broken = 0
    for first in range(0, draws, _CHUNK):
        drawn = losses[rng.integers(len(losses), size=(min(_CHUNK, draws - first), n))]
        broken += int(above[count_certified(drawn, risk, delta)].sum())
    return broken / draws
