"""An n-gram model with interpolated modified Kneser-Ney smoothing: the baseline that the embedded model must beat.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), with three discounts per
order. Counts live in sorted arrays, so that 17 million tokens fit in a few gigabytes and scoring is a binary search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# For an order whose counts of counts are too sparse to estimate discounts from (few words, little text).
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


class Level(NamedTuple):
    """One order of the model. A context is packed into one integer, its oldest token most significant."""

    contexts: np.ndarray  # uint64 [C], sorted
    entries: np.ndarray  # uint64 [E], sorted: row in `contexts` * vocabulary + word
    shares: np.ndarray  # float64 [E], discounted count / total of the context
    backoffs: np.ndarray  # float64 [C], weight of the next lower order


class KneserNey:
    """Conditional probabilities of tokens in units that start from, and end with, the end token."""

    def __init__(self, levels: list[Level], vocabulary: int, end: int) -> None:
        self.levels, self.vocabulary, self.end = levels, vocabulary, end

    @classmethod
    def fit(cls, units: Sequence[np.ndarray], vocabulary: int, end: int, order: int = 5) -> KneserNey:
        """Count `units`, integer arrays without their end token.

        Raises ValueError where a context of `order - 1` tokens does not fit into 64 bits, or without any unit.
        """
        if vocabulary ** (order - 1) > 2**64:
            raise ValueError(f"{order - 1} tokens of a vocabulary of {vocabulary} do not fit into 64 bits")
        if not units:
            raise ValueError("no units to count")
        contexts, words = pack(units, vocabulary, end, order)
        levels = []
        for length in reversed(range(order)):
            level, contexts, words = build_level(contexts, words, vocabulary)
            levels.append(level)
            # What remains are the distinct n-grams. Without their oldest token they are the next order's events, each
            # counted once per token it was seen after: the continuation counts.
            contexts = contexts % vocabulary ** max(length - 1, 0)
        return cls(levels[::-1], vocabulary, end)

    def probabilities(self, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """float64 [N]: the probability of each word after its packed context of `order - 1` tokens."""
        p = np.full(len(words), 1 / self.vocabulary)
        for length, level in enumerate(self.levels):
            row, known = find(level.contexts, contexts % self.vocabulary**length)
            entry, seen = find(level.entries, row.astype(np.uint64) * self.vocabulary + words)
            p *= np.where(known, level.backoffs[row], 1.0)
            p += np.where(known & seen, level.shares[entry], 0.0)
        return p

    def bits(self, units: Sequence[np.ndarray]) -> float:
        """-log2 of the probability of all tokens of all units, end tokens included."""
        contexts, words = pack(units, self.vocabulary, self.end, len(self.levels))
        return float(-np.log2(self.probabilities(contexts, words)).sum())


def pack(units: Sequence[np.ndarray], vocabulary: int, end: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Every token of every unit, its end token included, with the `order - 1` tokens before it.

    Returns packed contexts and words, both uint64 [N]. Before a unit stand end tokens only.
    """
    before = order - 1
    padding, last = np.full(before, end, np.uint64), np.array([end], np.uint64)
    stream = np.concatenate([part for unit in units for part in (padding, unit, last)]).astype(np.uint64)
    lengths = np.array([before + len(unit) + 1 for unit in units])
    starts = np.cumsum(lengths) - lengths
    predicted = np.ones(len(stream), bool)
    predicted[(starts[:, None] + np.arange(before)).ravel()] = False
    contexts = np.zeros(len(stream) - before, np.uint64)
    for place in range(before):
        contexts = contexts * vocabulary + stream[place : place + len(contexts)]
    inside = predicted[before:]
    return contexts[inside], stream[before:][inside]


def build_level(contexts: np.ndarray, words: np.ndarray, vocabulary: int) -> tuple[Level, np.ndarray, np.ndarray]:
    """The level of these events, and the distinct ones among them as contexts and words."""
    known, row = np.unique(contexts, return_inverse=True)
    entries, counts = np.unique(row.astype(np.uint64) * vocabulary + words, return_counts=True)
    owner = (entries // vocabulary).astype(np.intp)
    discounts = estimate_discounts(counts)[np.minimum(counts, 3) - 1]
    totals = np.bincount(owner, counts)
    level = Level(known, entries, (counts - discounts) / totals[owner], np.bincount(owner, discounts) / totals)
    return level, known[owner], entries % vocabulary


def estimate_discounts(counts: np.ndarray) -> np.ndarray:
    """float64 [3]: what is taken off a count of one, of two, and of three or more (Chen and Goodman, equation 26)."""
    once, twice, thrice, four = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (once and twice and thrice):
        return np.array(FALLBACK_DISCOUNTS)
    y = once / (once + 2 * twice)
    discounts = np.array([1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice])
    # A discount of zero would leave nothing for unseen words.
    return discounts if (discounts > 0).all() else np.array(FALLBACK_DISCOUNTS)


def find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each key in a sorted table, and whether it is there; row 0 where it is not."""
    row = np.searchsorted(table, keys)
    row[row == len(table)] = 0
    there = table[row] == keys
    return np.where(there, row, 0), there
