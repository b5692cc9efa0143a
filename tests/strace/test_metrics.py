"""Metrics against values worked out by hand and against other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from strace.metrics import (
    NUCLEI,
    cka,
    cosine,
    draw_bootstrap,
    entropy,
    fit_phases,
    gini,
    lorenz,
    ordered_nucleus,
    rank_residuals,
    relative_distance,
    spearman,
    split_quarters,
    tv_density,
    unigram_correlation,
)
from strace.sampling import total_variation


def test_total_variation_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([0.25, 0.25, 0.5])
    assert torch.allclose(total_variation(p, q), torch.tensor([0.5, 0.05]))


def test_entropy_of_flat_and_certain() -> None:
    assert torch.allclose(entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]])), torch.tensor([math.log(4), 0.0]))


def test_ordered_nucleus_by_hand() -> None:
    full = torch.tensor([0.5, 0.3, 0.15, 0.05])
    p = torch.tensor(
        [
            [0.5, 0.3, 0.15, 0.05],  # the same
            [0.5, 0.3, 0.05, 0.15],  # the first two, which hold 80 %
            [0.45, 0.32, 0.03, 0.2],  # the same two, but 80 % needs a third token: 60 % is the most
            [0.9, 0.02, 0.05, 0.03],  # its 60 % is one token, the full model's two
            [0.3, 0.5, 0.15, 0.05],  # not even the first token
            [0.35, 0.25, 0.1, 0.3],  # the first token alone never holds 40 %
        ]
    )
    assert ordered_nucleus(full, p) == [99, 80, 60, 40, 0, 20]
    assert ordered_nucleus(full, full[None]) == [NUCLEI[-1]]


def test_density_is_the_mean_on_the_logarithmic_axis() -> None:
    sizes = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert tv_density(sizes, [1, 1, 1, 1, 1]) == pytest.approx(1)
    assert tv_density(sizes, [1, 1, 0.5, 0, 0]) == pytest.approx((1 + 0.75 + 0.25 + 0) / 4)
    assert tv_density(sizes, [9, 9, 0.5, 0, 0], start=5e-3) == pytest.approx((0.25 + 0) / 2)
    assert math.isnan(tv_density(sizes, [0] * 5, start=0.5))


@given(st.integers(0, 1000))
def test_spearman_is_scipys_and_its_interval_holds_it(seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 12))
    found = spearman(x, y + x)
    assert found.rho == pytest.approx(spearmanr(x, y + x).statistic)
    assert found.low < found.rho < found.high
    assert found.n == 12


def test_spearman_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    truth = 6 / math.pi * math.asin(0.5 / 2)  # Spearman's rho of a normal pair of correlation 0.5
    for _ in range(400):
        x, e = generator.normal(size=(2, 60))
        found = spearman(x, 0.5 * x + math.sqrt(0.75) * e)
        covered += found.low < truth < found.high
    assert 0.91 < covered / 400 < 0.985


def test_spearman_leaves_out_what_is_not_known() -> None:
    assert spearman([1, 2, 3, math.nan, 5, 6], [1, 2, 3, 4, 5, 6]).n == 5
    assert math.isnan(spearman([1, 2, 3], [1, 2, 3]).rho)
    assert math.isnan(spearman([1] * 9, range(9)).rho)


def test_unigram_correlation_is_spearmans_over_the_tokens_that_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    p, counts = torch.rand(2, 40, generator=generator), torch.randint(0, 5, (40,), generator=generator)
    seen = counts > 0
    expected = [spearmanr(row[seen].numpy(), counts[seen].numpy()).statistic for row in p]
    assert unigram_correlation(p, counts) == pytest.approx(expected)
    assert math.isnan(unigram_correlation(torch.ones(1, 40), counts)[0])


def test_lorenz_and_gini_by_hand() -> None:
    assert gini([3, 3, 3]) == pytest.approx(0)
    assert gini([0, 0, 0, 1]) == pytest.approx(0.75)
    assert gini([0, 0]) == pytest.approx(0)
    shares, held = lorenz([3, 1])
    assert shares.tolist() == [0, 0.5, 1]
    assert held.tolist() == [0, 0.25, 1]


def test_quarters_of_layers() -> None:
    assert split_quarters([1, 1, 1, 1, 2, 2, 0, 0]).tolist() == [0.25, 0.25, 0.5, 0]
    assert split_quarters([2, 1, 1]) == pytest.approx([1.5 / 4, 1 / 4, 0.75 / 4, 0.75 / 4])
    assert split_quarters([0, 0, 0, 0]).tolist() == [0, 0, 0, 0]


def test_cka_ignores_rotation_scale_and_shift_and_sees_unrelated_states() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 60, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert cka(x, other) < 0.3
    assert math.isnan(cka(x, torch.ones(60, 8)))


def test_cosine_and_distance_by_hand() -> None:
    x, y = torch.tensor([[4.0, 0.0], [0.0, 6.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0])
    assert torch.allclose(cosine(x, y), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(relative_distance(x, y), torch.tensor([1.0, 10**0.5, 1.0]))


def test_phases_of_a_line_in_three_pieces_are_found() -> None:
    sizes = [10 ** (-5 + i / 4) for i in range(21)]
    x = np.log10(sizes)
    tv = 1 - 0.3 * np.clip(x + 4, 0, 2) - 0.2 * np.clip(x + 2, 0, 2)
    phases = fit_phases(sizes, tv.tolist())
    assert phases is not None
    assert (phases.first, phases.second) == pytest.approx((1e-4, 1e-2))
    assert phases.slopes == pytest.approx((0, -0.3, -0.2))
    assert phases.error < 1e-9
    assert fit_phases(sizes[:5], [1] * 5) is None


def test_partial_ranks_leave_out_what_stands_between() -> None:
    generator = np.random.default_rng(0)
    length, group = generator.normal(size=400), generator.integers(3, size=400)
    x, y = (length + 4 * group + generator.normal(size=400) for _ in range(2))
    assert spearman(x, y).rho > 0.8
    mine, theirs = (rank_residuals(z, group.tolist(), length) for z in (x, y))
    assert abs(spearman(mine, theirs).rho) < 0.12
    both = generator.normal(size=400)  # what neither explains is still there
    mine, theirs = (rank_residuals(z + 3 * both, group.tolist(), length) for z in (x, y))
    assert spearman(mine, theirs).rho > 0.5
    by_group = rank_residuals(x, group.tolist())
    assert [by_group[group == g].mean() for g in range(3)] == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_bootstrap_draws_whole_groups_and_keeps_strata() -> None:
    groups, strata = ["a", "a", "b", "c", "d", "d", "d"], ["x", "x", "x", "x", "y", "y", "y"]
    bootstrap = draw_bootstrap(groups, strata, draws=200)
    assert (bootstrap.n, bootstrap.groups, len(bootstrap.draws)) == (7, 4, 200)
    for draw in bootstrap.draws:
        drawn = draw.tolist()
        assert drawn.count(0) == drawn.count(1)
        assert [drawn.count(i) for i in (4, 5, 6)] == [1, 1, 1]
        assert drawn.count(0) + drawn.count(2) + drawn.count(3) == 3
    assert len({tuple(draw.tolist()) for draw in bootstrap.draws}) > 5


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Prompts of one source are alike: drawn one by one they would promise far too much."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 4)
    grouped = draw_bootstrap(groups.tolist(), ["x"] * 120, draws=300)
    alone = draw_bootstrap(range(120), ["x"] * 120, draws=300)
    covered = {"grouped": 0, "alone": 0}
    for _ in range(200):
        values = generator.normal(size=30)[groups] + 0.3 * generator.normal(size=120)
        for name, bootstrap in (("grouped", grouped), ("alone", alone)):
            found = bootstrap.estimate(lambda draw: float(values[draw].mean()))  # noqa: B023
            covered[name] += found.low < 0 < found.high
    assert 0.88 < covered["grouped"] / 200 < 0.99
    assert covered["alone"] / 200 < 0.8


def test_an_estimate_of_nothing_is_not_known() -> None:
    found = draw_bootstrap(range(4), ["x"] * 4, draws=5).estimate(lambda draw: math.nan)
    assert math.isnan(found.low)
    assert math.isnan(found.value)
