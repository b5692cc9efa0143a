"""The rule of expected gain and what it learns."""

from __future__ import annotations

import pytest

from server.engine.cost import CostModel
from server.engine.speculation import Calibration, Speculation
from strace.runner import FULL

LOTS = 8


def make_speculation(c: float, verify: dict[int, float], acceptance: float = 0.8) -> Speculation:
    """Costs in full steps, every draft accepted with the same probability."""
    speculation = Speculation(CostModel({FULL: verify, "pooled": {1: c, 8: c}}), ["pooled"])
    for _ in range(2000):
        speculation.calibrations["pooled"].judge(0.5, acceptance)
    return speculation


def best_length(c: float, verify: dict[int, float], acceptance: float) -> int:
    """The k that maximises S = E / (k c + v(k + 1)), by trying all."""
    cost = CostModel({FULL: verify, "pooled": {1: c, 8: c}})

    def speedup(k: int) -> float:
        return sum(acceptance**i for i in range(k + 1)) / (k * cost.c("pooled") + cost.v(k + 1))

    return max(range(LOTS + 1), key=speedup)


def settled_length(c: float, verify: dict[int, float], acceptance: float) -> int:
    """The k that the rule stops at, once its rate is the one that this k achieves."""
    speculation = make_speculation(c, verify, acceptance)
    drawn = 0
    for _ in range(400):
        drawn = 0
        rule = speculation.rule("pooled", planned=1, batch=1)
        while drawn < LOTS and rule.pays(acceptance**drawn, 1, drawn, LOTS - drawn):
            drawn += 1
        tokens = sum(acceptance**i for i in range(drawn + 1))
        seconds = drawn * speculation.cost.seconds("pooled", 1) + speculation.cost.seconds(FULL, drawn + 1)
        speculation.paced(tokens, 1, seconds)
    return drawn


@pytest.mark.parametrize("c", [0.05, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("verify", [{1: 1.0, 8: 1.2}, {1: 1.0, 8: 3.0}])
def test_the_rule_finds_the_best_length(c: float, acceptance: float, verify: dict[int, float]) -> None:
    assert settled_length(c, verify, acceptance) == best_length(c, verify, acceptance)


def test_a_jump_in_the_kernel_does_not_hide_that_more_would_pay() -> None:
    jump = {1: 1.0, 2: 1.9, 8: 2.0}
    speculation = make_speculation(0.05, jump, 0.9)
    rule = speculation.rule("pooled", planned=1, batch=1)
    assert not rule.pays(1.0, 1, 0, most=1)
    assert rule.pays(1.0, 1, 0, most=8)


def test_a_shared_draft_step_is_cheaper() -> None:
    speculation = make_speculation(0.9, {1: 1.0, 16: 1.0})
    assert not speculation.rule("pooled", planned=1, batch=1).pays(1.0, alive=1, drawn=0, most=1)
    assert speculation.rule("pooled", planned=8, batch=1).pays(1.0, alive=8, drawn=0, most=1)


def test_batches_are_judged_by_their_own_rate() -> None:
    """Eight texts at once gain eight times the tokens per step already: a draft must beat that."""
    speculation = make_speculation(0.2, {1: 1.0, 16: 1.0})
    assert speculation.rule("pooled", planned=1, batch=1).pays(1.0, alive=1, drawn=0, most=1)
    assert not speculation.rule("pooled", planned=8, batch=8).pays(1.0, alive=1, drawn=0, most=1)


def test_a_step_is_never_faster_than_its_full_pass() -> None:
    speculation = make_speculation(0.1, {1: 1.0, 8: 1.0})
    for _ in range(500):
        speculation.paced(3, 1, 1e-6)
    assert speculation.rule("pooled", planned=1, batch=1).pays(1.0, 1, 0, 1)


def test_calibration_follows_the_evidence() -> None:
    calibration = Calibration()
    for _ in range(300):
        calibration.judge(0.95, 1.0)
        calibration.judge(0.15, 0.0)
    assert calibration.acceptance[9] > 0.98
    assert calibration.acceptance[1] < 0.05
    assert calibration.acceptance[-1] == pytest.approx(0.5, abs=0.02)
    assert calibration.acceptance[5] == pytest.approx(0.8)
    for _ in range(300):
        calibration.judge(0.95, 0.0)
    assert calibration.acceptance[9] < 0.1


def test_a_plain_step_takes_the_engine_s_own_time_too() -> None:
    """Drafting need not beat a full pass alone, only a whole step."""
    speculation = make_speculation(0.85, {1: 1.0, 8: 1.7}, 0.9)
    rule = speculation.rule("pooled", planned=1, batch=1)
    assert rule.tokens_per_second == pytest.approx(1.0)
    assert not rule.pays(1.0, 1, 0, LOTS)
    speculation.cost.observe_own(1, False, 0.5)
    for _ in range(200):
        speculation.paced(1, 1, 1.5)
    rule = speculation.rule("pooled", planned=1, batch=1)
    assert rule.tokens_per_second < 1.0
    assert rule.pays(1.0, 1, 0, LOTS)
