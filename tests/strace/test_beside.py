"""A class's subgraph beside pooled's: the gain is that of the sums, and its interval holds what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strace.beside import Drafter, compare_speedups, sum_depths
from strace.measure import predict_speedup
from strace.onpolicy import Positions, conditional_acceptance

V = {1: 1.0, 9: 1.5}


def draw_table(accepted: float, sources: int, seed: int, spread: float = 0.05) -> Positions:
    """Blocks of 8 of `sources` documents, of which each accepts a share about `accepted`."""
    rng, blocks = np.random.default_rng(seed), 12
    size = sources * blocks * 8
    source = np.repeat(np.arange(sources), blocks * 8)
    stood = np.clip(accepted + spread * rng.standard_normal(sources)[source] + spread * rng.standard_normal(size), 0, 1)
    rest = {name: np.zeros(size) for name in ("temperature", "top", "gap", "entropy", "drawn", "q", "p", "same")}
    names = tuple(f"source {i}" for i in range(sources))
    depth = np.tile(np.arange(8), sources * blocks)
    return Positions(names, source=source, text=source, depth=depth, tv=1 - stood, stood=stood, **rest)


@settings(max_examples=20)
@given(st.floats(0.3, 0.95), st.floats(0.3, 0.95), st.floats(0.05, 0.4), st.integers(0, 100))
def test_the_gain_is_the_difference_of_predictions(own: float, other: float, c: float, seed: int) -> None:
    drafters = [Drafter(draw_table(a, 6, seed + i), c + 0.1 * i) for i, a in enumerate((own, other))]
    gain, low, high = compare_speedups(*drafters, V)
    speedups = [predict_speedup(conditional_acceptance(d.positions), d.c, V)[0] for d in drafters]
    assert gain == pytest.approx(speedups[0] - speedups[1])
    assert low <= high
    back, *_ = compare_speedups(*drafters[::-1], V)
    assert back == pytest.approx(-gain)


def test_the_interval_parts_what_differs_and_only_that() -> None:
    good, bad = (Drafter(draw_table(a, 30, seed), 0.2) for a, seed in ((0.9, 1), (0.8, 2)))
    assert compare_speedups(good, bad, V)[1] > 0
    assert compare_speedups(bad, good, V)[2] < 0
    assert compare_speedups(good, good, V) == (0, 0, 0)
    # The better draft of two does not win where a step of it costs too much.
    assert compare_speedups(replace(good, c=0.6), bad, V)[2] < 0


def test_one_source_that_does_well_does_not_decide() -> None:
    same = draw_table(0.8, 8, 3)
    lucky = same.tv.copy()
    lucky[same.source == 0] = 0
    stood = np.where(same.source == 0, 1.0, same.stood)
    gain, low, _ = compare_speedups(Drafter(replace(same, tv=lucky, stood=stood), 0.2), Drafter(same, 0.2), V)
    assert gain > 0
    assert low <= 0


def test_sums_leave_out_what_stands_behind_a_rejected_draft() -> None:
    table = draw_table(0.8, 1, 4)
    stood = np.where(table.depth == 2, 0.0, 1.0)
    sums = sum_depths(replace(table, stood=stood, tv=1 - stood))
    assert sums[0, :, 1].tolist() == [12, 12, 12, 0, 0, 0, 0, 0]
    assert sums[0, :, 0].tolist() == [12, 12, 0, 0, 0, 0, 0, 0]


def test_tables_of_other_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="different sources"):
        compare_speedups(Drafter(draw_table(0.8, 4, 0), 0.2), Drafter(draw_table(0.8, 5, 0), 0.2), V)
