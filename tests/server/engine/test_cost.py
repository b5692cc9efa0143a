"""The cost model: its shape, its level, and how it is measured."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from server.engine.cost import CostModel, measure_costs
from strace.kv import Batch, KVCache
from strace.runner import FULL, Drafter


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


class Timed:
    """A runner on a clock of its own; every fifth full pass is disturbed."""

    def __init__(self) -> None:
        self.now, self.passes = 0.0, 0
        self.cache = KVCache([torch.zeros(4, 1, 1, 1)], [torch.zeros(4, 1, 1, 1)])

    def clock(self) -> float:
        return self.now

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        assert max(s + n for s, n in zip(batch.starts, batch.counts, strict=True)) <= batch.tables.shape[1] * 32
        self.passes += 1
        self.now += 0.1 + 0.01 * len(batch.tokens) + (5.0 if self.passes % 5 == 0 else 0.0)
        return torch.zeros(len(rows), 3)

    def draft(self, graph: str, batch: Batch, drafter: Drafter) -> None:
        alive = list(range(len(batch.counts)))
        while alive:
            self.now += 0.03
            drafter.draw(torch.zeros(len(alive), 3), [1.0] * len(alive), alive)
            alive = drafter.survivors(alive)


def test_measured_in_alternation() -> None:
    runner = Timed()
    cost = measure_costs(runner, ["pooled"], budget=30.0, clock=runner.clock)
    assert [cost.seconds(FULL, n) for n in (1, 2, 4, 8)] == pytest.approx([0.11, 0.12, 0.14, 0.18])
    assert cost.seconds("pooled", 1) == pytest.approx(0.03)
    assert 30 < runner.now < 60


def test_a_start_beside_other_load_is_soon_forgotten() -> None:
    """Measured ten times too slow, the full step must not make every answer look ten times faster for long."""
    cost = CostModel({FULL: {1: 1.0, 2: 1.1}})
    for _ in range(20):
        cost.observe(FULL, [1], 0.1)
    assert cost.seconds(FULL, 1) == pytest.approx(0.1, rel=0.05)
