"""The cost model: its shape, its level, and where it starts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from server.engine.cost import CostModel, measure_start
from strace.classes import POOLED
from strace.costs import SETTLE, Cost, CostTable, describe_setting, save_table
from strace.runner import FULL
from tests.server.engine.harness import make_runner


def make_cost() -> CostModel:
    return CostModel({FULL: {1: 0.010, 2: 0.012, 8: 0.018}, "pooled": {1: 0.004, 8: 0.005}})


def test_between_and_beyond_the_points() -> None:
    cost = make_cost()
    assert cost.v(1) == 1.0
    assert cost.seconds(FULL, 5) == pytest.approx(0.015)
    assert cost.seconds(FULL, 10) == pytest.approx(0.020)
    assert cost.seconds(FULL, 500) == pytest.approx(0.510)
    assert cost.c("pooled") == pytest.approx(0.4)


def test_more_tokens_never_cost_less() -> None:
    cost = CostModel({FULL: {1: 2.0, 2: 1.0, 4: 3.0, 8: 2.5}})
    assert all(a <= b for a, b in pairwise(cost.seconds(FULL, n) for n in range(1, 200)))


def test_a_slower_machine_slows_every_graph() -> None:
    cost = make_cost()
    for _ in range(200):
        cost.observe(FULL, [5], 0.030)
    assert cost.seconds(FULL, 1) == pytest.approx(0.020, rel=1e-3)
    assert cost.c("pooled") == pytest.approx(0.4)


def test_a_draft_is_learnt_apart() -> None:
    cost = make_cost()
    for _ in range(200):
        cost.observe("pooled", [1, 1, 1], 0.024)
    assert cost.c("pooled") == pytest.approx(0.8, rel=1e-3)
    assert cost.seconds(FULL, 1) == pytest.approx(0.010)


def test_one_hiccup_is_no_trend() -> None:
    cost = make_cost()
    for _ in range(50):
        cost.observe(FULL, [1], 0.010)
    cost.observe(FULL, [1], 60.0)
    assert cost.seconds(FULL, 1) < 0.0106


def test_a_kept_table_is_where_the_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = make_runner()
    costs = [Cost(graph, 1, n, 64, n * 10.0) for graph in (*runner.graphs, SETTLE) for n in (1, 2)]
    save_table(CostTable(describe_setting(runner, "these weights"), "today", 1e10, costs, {}))
    assert measure_start(runner, "these weights").seconds(FULL, 2) == pytest.approx(40.0)
    measured = measure_start(runner, "other weights")
    assert 0 < measured.seconds(FULL, 1) <= measured.seconds(FULL, 8) < 1
    assert 0 < measured.seconds("pooled", 1) <= measured.seconds("pooled", 8) < 1


def test_what_the_engine_takes_itself_is_learnt_by_texts_and_drafting() -> None:
    cost = make_cost()
    assert cost.own(1, drafting=False) == 0.0
    for _ in range(50):
        cost.observe_own(1, True, 0.003)
        cost.observe_own(4, False, 0.001)
    cost.observe_own(1, True, 60.0)
    assert cost.own(1, drafting=True) == pytest.approx(0.003, rel=0.06)
    assert cost.own(4, drafting=False) == pytest.approx(0.001)
    assert cost.own(1, drafting=False) == 0.0
    assert cost.estimate({}).own(4, drafting=False) == pytest.approx(0.001)


def test_a_start_beside_other_load_is_soon_forgotten() -> None:
    """Measured ten times too slow, the full step must not make every answer look ten times faster for long."""
    cost = CostModel({FULL: {1: 1.0, 2: 1.1}})
    for _ in range(20):
        cost.observe(FULL, [1], 0.1)
    assert cost.seconds(FULL, 1) == pytest.approx(0.1, rel=0.05)


def test_costs_of_drafts_that_were_never_measured() -> None:
    model = CostModel({FULL: {1: 1.0, 8: 1.5}, POOLED: {1: 0.4, 8: 0.6}})
    for _ in range(200):
        model.observe(FULL, [1], 2.0)
    other = model.estimate({POOLED: 1.0, "code": 0.5})
    assert other.seconds(FULL, 1) == pytest.approx(model.seconds(FULL, 1))
    assert other.seconds(POOLED, 4) == pytest.approx(model.seconds(POOLED, 4))
    assert other.c("code") == pytest.approx(0.2)
    other.observe("code", [1], 10.0)
    assert other.c("code") > 0.25
    assert model.c(POOLED) == pytest.approx(0.4)
