"""Pricing: shapes of many sizes, timed once, and the line through them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from strace import search
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.costs import SETTLE, TYPICAL, Cost, CostTable, Setting
from strace.runner import FULL
from strace.search import StepCosts, fit_costs, list_shapes, price_steps
from tests.tiny import save_tiny

SETTING = Setting("cpu", "none", 1, "torch", "none", {}, "", "fp32", {})


def test_the_line_gives_back_what_made_it(tmp_path: Path) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "bf16")
    shapes = list_shapes(full, "int4")
    assert len({graph.bytes_per_step for graph in shapes.values()}) == len(shapes)
    true = StepCosts((1e-4, 2e-5, 3e-10), {1: 1e-3, 9: 3e-3}, "torch")
    costs = [Cost(name, 1, 1, TYPICAL, true.c(graph) * 1e-3) for name, graph in shapes.items()]
    costs += [Cost(FULL, 1, n, TYPICAL, 0.75 * seconds) for n, seconds in true.full.items()]
    costs += [Cost(SETTLE, 1, n, TYPICAL, 0.25 * seconds) for n, seconds in true.full.items()]
    found = fit_costs(CostTable(SETTING, "", 0.0, costs, {}), list(shapes.values()), list(shapes))
    assert found.draft == pytest.approx(true.draft, rel=0.05)
    assert found.v == pytest.approx({1: 1.0, 9: 3.0})
    assert found.full_ms == pytest.approx(1.0)
    whole = quantise_decoder(full, "int4")
    assert found.c(whole) == pytest.approx(true.c(whole), rel=0.01)


def test_a_machine_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(search, "BUDGET", 0.0)
    ticks: Iterator[int] = count()
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path))), "bf16")
    first = price_steps(full, "hash", "int4", "torch", lambda: float(next(ticks)))
    assert first.full[1] == 2.0, "a pass and its verdicts"
    asked = next(ticks)
    assert price_steps(full, "hash", "int4", "torch", lambda: float(next(ticks))) == first
    assert next(ticks) == asked + 1
    price_steps(full, "another", "int4", "torch", lambda: float(next(ticks)))
    assert next(ticks) > asked + 10
