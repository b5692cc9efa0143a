"""The bound holds as often as it says, at the boundary too; thresholds pass in order; few units certify nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strace import certify
from strace.certify import (
    DELTA,
    RISKS,
    bound_mean,
    choose_threshold,
    count_certified,
    count_needed,
    grow_wealth,
    share_broken,
)

DRAWS = 1000
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
LOSSES = st.lists(st.floats(0, 1), min_size=1, max_size=60).map(np.array)


def two_points(mean: float, high: float, count: int = 2000) -> np.ndarray:
    """A population of 0 and `high` whose mean is just above `mean`."""
    some = math.ceil(count * mean / high) + 1
    return np.repeat([high, 0.0], [some, count - some])


@pytest.mark.parametrize("n", [60, 200, 400])
@pytest.mark.parametrize("high", [0.04, 0.1, 0.5, 1.0])
def test_a_mean_just_above_the_risk_is_hardly_ever_certified(n: int, high: float) -> None:
    population = two_points(0.02, high)
    assert population.mean() > 0.02
    rng = np.random.default_rng(n)
    certified = grow_wealth(rng.choice(population, (DRAWS, n)), 0.02, DELTA) >= 1 / DELTA
    assert certified.mean() <= ALLOWED


def populate(*means: float, spread: float = 0.6) -> np.ndarray:
    """Losses [units, thresholds] of a pool, one unit bad at every threshold or at none, with these means."""
    rng = np.random.default_rng(0)
    units = rng.gamma(spread, size=600)
    units /= units.mean()
    return np.stack([np.minimum(units * mean, 1.0) for mean in means], 1)


@pytest.mark.parametrize(
    "pool",
    [
        populate(0.001, 0.005, 0.0203, 0.05),
        populate(0.0203),
        populate(0.019, 0.0202, 0.03, spread=0.1),
        np.stack([two_points(0.02, 1.0), two_points(0.02, 0.05)], 1),
        np.stack([two_points(0.005, 0.05), two_points(0.02, 0.3), two_points(0.001, 0.1)], 1),
    ],
    ids=["gradual", "boundary", "rare", "two points", "not monotone"],
)
@pytest.mark.parametrize("n", [150, 400])
def test_the_promise_is_kept_over_calibration_draws(pool: np.ndarray, n: int) -> None:
    assert (pool.mean(0) > 0.02).any()
    assert share_broken(pool, 0.02, DRAWS, n) <= ALLOWED


def test_a_choice_by_the_mean_alone_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_mean(losses: np.ndarray, risk: float, delta: float) -> np.ndarray:
        return np.cumprod(losses.mean(-2) <= risk, -1).sum(-1)

    monkeypatch.setattr(certify, "count_certified", by_mean)
    assert share_broken(populate(0.001, 0.005, 0.0203, 0.05), 0.02, 200, 400) > 0.3


def test_what_is_certified_is_of_use() -> None:
    """Hundreds of units with half the risk are enough, or no threshold would ever pass."""
    assert count_certified(populate(0.004, 0.01)[:400], 0.02) == 2


@pytest.mark.parametrize("risk", RISKS)
def test_units_needed(risk: float) -> None:
    needed = count_needed(risk)
    assert bound_mean(np.zeros(needed)) <= risk + 1e-5
    assert bound_mean(np.zeros(needed - 1)) > risk
    # No test can do with fewer: a population with a loss of 1 in a share `risk` of it shows none so often.
    assert (1 - risk) ** needed <= DELTA
    assert needed < 1.05 * math.log(DELTA) / math.log(1 - risk) + 2


@given(LOSSES, st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_wealth_grows_with_the_mean_that_is_bet_against(losses: np.ndarray, mean: float, more: float) -> None:
    assert grow_wealth(losses, mean + more, DELTA) >= grow_wealth(losses, mean, DELTA) * (1 - 1e-9)


@given(LOSSES)
def test_the_bound_is_where_the_wealth_reaches_the_level(losses: np.ndarray) -> None:
    bound = bound_mean(losses)
    assert 0 < bound <= 1
    if bound < 1:
        assert grow_wealth(losses, bound, DELTA) >= 1 / DELTA
        assert grow_wealth(losses, bound - 1e-5, DELTA) < 1 / DELTA


@settings(max_examples=50)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(30, 120))
def test_thresholds_pass_in_order_or_not_at_all(good: int, more: int, n: int) -> None:
    """A threshold behind one that fails is not looked at, however good."""
    losses = np.concatenate([np.zeros((n, good)), np.full((n, 1), 0.5), np.zeros((n, more))], 1)
    thresholds = [1 - i / 20 for i in range(losses.shape[1])]
    choice = choose_threshold(losses, thresholds, 0.1)
    assert count_certified(losses, 0.1) == good
    assert choice.threshold == (thresholds[good - 1] if good else None)


def test_many_draws_at_once_are_each_as_alone() -> None:
    drawn = np.random.default_rng(1).beta(0.2, 10, size=(7, 80, 3))
    assert count_certified(drawn, 0.05).tolist() == [int(count_certified(one, 0.05)) for one in drawn]


def test_reasons() -> None:
    few, bad = np.zeros((40, 2)), np.full((200, 2), 0.3)
    assert choose_threshold(few, [0.9, 0.8], 0.02).why == "too few documents: 40 of at least 153 needed"
    assert choose_threshold(np.zeros((0, 0)), [], 0.02).threshold is None
    why = choose_threshold(bad, [0.9, 0.8], 0.02).why
    assert "mean divergence 0.3000" in why
    assert "0.9" in why
    assert choose_threshold(np.zeros((200, 0)), [], 0.02).why == "no threshold was measured to its end"
    kept = choose_threshold(np.zeros((200, 2)), [0.9, 0.8], 0.02)
    assert kept.threshold == 0.8
    assert "200 documents" in kept.why


def test_nothing_seen_is_no_evidence() -> None:
    assert grow_wealth(np.zeros(0), 0.5, DELTA) == 1
    assert bound_mean(np.zeros(0)) == 1
    assert bound_mean(np.ones(50)) == 1
