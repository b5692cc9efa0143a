"""The Kneser-Ney baseline against its definition, written with dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kneser_ney import KneserNey, estimate_discounts

Gram = tuple[int, ...]


def events(units: Iterable[np.ndarray], end: int, order: int) -> list[Gram]:
    """Every token with the `order - 1` tokens before it."""
    padded = [(end,) * (order - 1) + tuple(unit.tolist()) + (end,) for unit in units]
    return [p[i : i + order] for p in padded for i in range(len(p) - order + 1)]


class Definition:
    """Interpolated modified Kneser-Ney, straight from the formulas."""

    def __init__(self, units: list[np.ndarray], vocabulary: int, end: int, order: int) -> None:
        self.vocabulary = vocabulary
        self.counts = {order: Counter(events(units, end, order))}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in set(self.counts[n + 1]))
        self.discounts = {n: [0.0, *estimate_discounts(np.array(list(c.values())))] for n, c in self.counts.items()}

    def probability(self, gram: Gram) -> float:
        n = len(gram)
        if n == 0:
            return 1 / self.vocabulary
        followers = {g: c for g, c in self.counts[n].items() if g[:-1] == gram[:-1]}
        if not followers:
            return self.probability(gram[1:])
        total = sum(followers.values())
        freed = sum(self.discounts[n][min(c, 3)] for c in followers.values())
        count = followers.get(gram, 0)
        return (count - self.discounts[n][min(count, 3)] + freed * self.probability(gram[1:])) / total


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[np.ndarray], int]:
    """A few units and the size of their vocabulary; token 0 ends units and may stand inside them."""
    vocabulary = draw(st.integers(2, 6))
    unit = st.lists(st.integers(0, vocabulary - 1), max_size=25).map(lambda ids: np.array(ids, np.int64))
    return draw(st.lists(unit, min_size=1, max_size=6)), vocabulary


def pack_context(context: Iterable[int], vocabulary: int) -> int:
    packed = 0
    for token in context:
        packed = packed * vocabulary + token
    return packed


@settings(max_examples=60, deadline=None)
@given(texts(), texts(), st.integers(1, 4))
def test_equals_the_definition(train: tuple[list[np.ndarray], int], held: tuple[list[np.ndarray], int], n: int) -> None:
    units, vocabulary = train
    unseen = [np.minimum(unit, vocabulary - 1) for unit in held[0]]
    model, definition = KneserNey.fit(units, vocabulary, 0, n), Definition(units, vocabulary, 0, n)
    for scored in (units, unseen):
        expected = -sum(math.log2(definition.probability(gram)) for gram in events(scored, 0, n))
        assert model.bits(scored) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(texts(), st.data())
def test_probabilities_sum_to_one(train: tuple[list[np.ndarray], int], data: st.DataObject) -> None:
    """After any context, seen or not."""
    units, vocabulary = train
    model = KneserNey.fit(units, vocabulary, end=0, order=4)
    context = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=3, max_size=3))
    packed = np.full(vocabulary, pack_context(context, vocabulary), np.uint64)
    p = model.probabilities(packed, np.arange(vocabulary, dtype=np.uint64))
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_sums_to_one_over_a_real_vocabulary_and_order() -> None:
    """8192 words and four of context: the packing uses 52 bits, the entries more than 32."""
    rng = np.random.default_rng(0)
    units = [(8191 * rng.random(400) ** 4).astype(np.int64) for _ in range(20)] + [np.full(9, 8191)]
    model = KneserNey.fit(units, vocabulary=8192, end=0)
    words = np.arange(8192, dtype=np.uint64)
    for context in (units[3][:4].tolist(), [0, 0, 0, 0], [8191] * 4, [1, 2, 3, 8190]):
        p = model.probabilities(np.full(8192, pack_context(context, 8192), np.uint64), words)
        assert p.sum() == pytest.approx(1, abs=1e-9)


def test_discounts_are_chen_and_goodmans() -> None:
    counts = np.repeat([1, 2, 3, 4], [10, 5, 3, 2])
    assert estimate_discounts(counts) == pytest.approx([0.5, 2 - 1.5 * 3 / 5, 3 - 2 * 2 / 3])


def test_a_context_too_long_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        KneserNey.fit([np.array([1])], vocabulary=200_000, end=0)


def test_no_units_are_refused() -> None:
    with pytest.raises(ValueError, match="no units"):
        KneserNey.fit([], vocabulary=10, end=0)
