"""How a trace's output compares with the full model's, and what traces are made of (paper, section 4).

Distributions are probabilities over the vocabulary at the last position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata, spearmanr
from torch import Tensor

NUCLEI = (1, 5, 10, 20, 40, 60, 80, 90, 99)  # percent
CONFIDENCE = 0.95
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def entropy(p: Tensor) -> Tensor:
    """In nats, of distributions [..., V]."""
    return torch.special.entr(p).sum(-1)


def ordered_nucleus(full: Tensor, p: Tensor) -> list[int]:
    """Of each distribution of p [B, V]: the largest percentage of `NUCLEI` whose tokens, likeliest first until that
    mass is reached, are those of `full` [V] in the same order; 0 where none is."""
    masses = torch.tensor([k / 100 for k in NUCLEI], dtype=torch.float64)
    rows = torch.cat([full[None], p]).double()
    values, ids = rows.sort(stable=True, dim=-1, descending=True)
    lengths = torch.searchsorted(values.cumsum(-1), masses.expand(len(rows), -1).contiguous()) + 1
    differ = ids[1:] != ids[0]
    common = torch.where(differ.any(-1), differ.int().argmax(-1), ids.shape[1])
    same = (lengths[1:] == lengths[0]) & (lengths[1:] <= common[:, None])
    return [max((k for k, yes in zip(NUCLEI, row, strict=True) if yes), default=0) for row in same.tolist()]


def tv_density(sizes: Sequence[float], tv: Sequence[float], start: float = 0.0) -> float:
    """Area under TV over log10(size) from the first size of at least `start` to the last, divided by its width: the
    mean TV in [0, 1] on that axis. Smaller sizes cannot hold a path from the embeddings; nan with fewer than two
    others."""
    at = [i for i, size in enumerate(sizes) if size >= start]
    if len(at) < 2:
        return math.nan
    x, y = np.log10(np.array(sizes)[at]), np.array(tv)[at]
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho over n pairs with its 95 % interval (nan below five pairs or where one side is constant)."""

    rho: float
    low: float
    high: float
    n: int


def spearman(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Rank correlation; the interval is Fisher's with the standard error of Bonett and Wright (2000)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[known], y[known], int(known.sum())
    if n < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, math.nan, n)
    rho = float(spearmanr(x, y).statistic)
    error = math.sqrt((1 + rho**2 / 2) / (n - 3)) * norm.ppf(0.5 + CONFIDENCE / 2)
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    return Correlation(rho, math.tanh(centre - error), math.tanh(centre + error), n)


def rank_residuals(x: ArrayLike, within: Sequence[Hashable], *beside: ArrayLike) -> Doubles:
    """The ranks of x less what the groups `within` and the ranks of `beside` explain linearly: correlated with another
    variable's, a partial rank correlation."""
    groups = {group: i for i, group in enumerate(dict.fromkeys(within))}
    dummies = np.eye(len(groups))[[groups[group] for group in within]]
    basis = np.concatenate([dummies, np.stack([rankdata(y) for y in beside], 1)], 1) if beside else dummies
    ranks = rankdata(x)
    left: Doubles = ranks - basis @ np.linalg.lstsq(basis, ranks)[0]
    return left


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval; n prompts in `groups` groups that were drawn whole."""

    value: float
    low: float
    high: float
    n: int
    groups: int


@dataclass(frozen=True)
class Bootstrap:
    """Prompts drawn anew with replacement, a group of them at a time (their source), from each stratum (their class) as
    many groups as it has: prompts of one source are alike, and classes are as many as they were made."""

    n: int
    groups: int
    draws: tuple[Integers, ...]

    def estimate(self, statistic: Callable[[Integers], float]) -> Estimate:
        """`statistic` of the numbers of all prompts, with the 95 % percentile interval over the draws."""
        found = np.array([statistic(draw) for draw in self.draws])
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(found, [tail, 1 - tail]) if np.isfinite(found).any() else (math.nan, math.nan)
        return Estimate(float(statistic(np.arange(self.n))), float(low), float(high), self.n, self.groups)


def draw_bootstrap(
    groups: Sequence[Hashable], strata: Sequence[Hashable], draws: int = 1000, seed: int = 0
) -> Bootstrap:
    """`draws` samples of len(groups) or so prompts; a group lies in one stratum."""
    members: dict[Hashable, dict[Hashable, list[int]]] = {}
    for i, (group, stratum) in enumerate(zip(groups, strata, strict=True)):
        members.setdefault(stratum, {}).setdefault(group, []).append(i)
    generator = np.random.default_rng(seed)
    pools = [[np.array(some) for some in pool.values()] for pool in members.values()]
    made = [
        np.concatenate([pool[k] for pool in pools for k in generator.integers(len(pool), size=len(pool))])
        for _ in range(draws)
    ]
    return Bootstrap(len(groups), sum(map(len, pools)), tuple(made))


def unigram_correlation(p: Tensor, counts: Tensor) -> list[float]:
    """Spearman's rho of each distribution of p [B, V] with a corpus's token `counts` [V], over the tokens that occur in
    it; nan where a distribution is flat."""
    seen = counts > 0
    frequency = rankdata(counts[seen].numpy())
    return [_pearson(rankdata(row), frequency) for row in p[:, seen].numpy()]


def _pearson(x: Doubles, y: Doubles) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / scale if scale else math.nan


def lorenz(amounts: ArrayLike) -> tuple[Doubles, Doubles]:
    """The Lorenz curve: cumulative share of components, least first, and of what they hold; both start at 0."""
    ordered = np.sort(np.asarray(amounts, np.float64).ravel())
    held = np.concatenate([[0.0], ordered.cumsum()])
    return np.linspace(0, 1, len(held)), held / held[-1] if held[-1] else np.linspace(0, 1, len(held))


def gini(amounts: ArrayLike) -> float:
    """0 where all components hold the same, near 1 where one holds everything."""
    shares, held = lorenz(amounts)
    return float(1 - 2 * np.trapezoid(held, shares))


def split_quarters(per_layer: ArrayLike) -> Doubles:
    """Amounts [..., L] -> [..., 4], the shares of the four quarters of the layers; a layer across a border is split."""
    amounts = np.asarray(per_layer, np.float64)
    layers = amounts.shape[-1]
    edges = np.arange(5) * layers / 4
    starts = np.arange(layers)
    inside = np.minimum(edges[1:], starts[:, None] + 1) - np.maximum(edges[:-1], starts[:, None])
    quarters = amounts @ np.clip(inside, 0, 1)
    return quarters / np.maximum(quarters.sum(-1, keepdims=True), 1e-300)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of states [n, d] of the same n prompts; nan where one side is constant."""
    x, y = (m.double() - m.double().mean(0) for m in (x, y))
    # Through [n, n] kernels: n prompts are far fewer than d * d.
    a, b = x @ x.T, y @ y.T
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else math.nan


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of states [..., d]; 0 where one is zero."""
    return torch.nn.functional.cosine_similarity(x, y.expand_as(x), dim=-1, eps=1e-30)


def relative_distance(x: Tensor, y: Tensor) -> Tensor:
    """`|x - y|_2 / |y|_2` of states [..., d]."""
    return (x - y).norm(dim=-1) / y.norm(dim=-1)


@dataclass(frozen=True)
class Phases:
    """A continuous line of three pieces over log10(size), broken at `first` and `second` (sizes); TV per decade on each
    piece, and the root mean square error of the fit."""

    first: float
    second: float
    slopes: tuple[float, float, float]
    error: float


def fit_phases(sizes: Sequence[float], tv: Sequence[float]) -> Phases | None:
    """The best such line by least squares, its breaks on the given sizes; None below six sizes."""
    if len(sizes) < 6:
        return None
    x, y = np.log10(np.asarray(sizes)), np.asarray(tv)
    best: tuple[float, Doubles, int, int] | None = None
    for i in range(1, len(x) - 2):
        for j in range(i + 1, len(x) - 1):
            basis = np.stack([np.ones_like(x), x, np.maximum(x - x[i], 0), np.maximum(x - x[j], 0)], 1)
            found = np.linalg.lstsq(basis, y)[0]
            error = float(np.square(basis @ found - y).mean())
            if best is None or error < best[0]:
                best = error, found, i, j
    assert best is not None
    error, found, i, j = best
    slopes = np.cumsum(found[1:]).tolist()
    return Phases(float(sizes[i]), float(sizes[j]), (slopes[0], slopes[1], slopes[2]), math.sqrt(error))
