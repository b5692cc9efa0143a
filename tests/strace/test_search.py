"""Pricing: shapes of many sizes, timed once, and the line through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace import search
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.costs import SETTLE, TYPICAL, Cost, CostTable, Graph, Setting
from strace.runner import FULL
from strace.search import StepCosts, fit_costs, list_shapes, price_steps, project_table
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


def make_table(line: tuple[float, float], shares: dict[str, float], dtype: str = "bfloat16") -> CostTable:
    """A table in which a draft step takes `line` of (1, its share of the full model's bytes in bf16) full steps."""
    whole = 1000 * (2 if dtype == "float32" else 1)
    graphs = {FULL: Graph("", whole)} | {name: Graph("", round(1000 * share)) for name, share in shares.items()}
    costs = [Cost(FULL, 1, n, TYPICAL, seconds) for n, seconds in ((1, 2.0), (9, 3.0))]
    costs += [Cost(name, 1, 1, TYPICAL, 2.0 * (line[0] + line[1] * share)) for name, share in shares.items()]
    setting = replace(SETTING, processor="another", threads=8, dtype=dtype, graphs=graphs)
    return CostTable(setting, "", 0.0, costs, {})


@given(st.floats(0, 0.3), st.floats(0.1, 2), st.sampled_from(["bfloat16", "float32"]))
def test_another_machines_table_gives_back_what_made_it(fixed: float, share: float, dtype: str) -> None:
    found = project_table(make_table((fixed, share), {"code": 0.1, "math": 0.2, "pooled": 0.3}, dtype))
    assert found.v == pytest.approx({1: 1.0, 9: 1.5})
    for each in (0.05, 0.15, 0.5):
        assert found.c(each) == pytest.approx(fixed + share * each, rel=1e-6)
    assert "another, 8 threads" in found.where
    alone = project_table(make_table((fixed, share), {"pooled": 0.3}, dtype))
    assert alone.c(0.3) == pytest.approx(fixed + share * 0.3)


def test_a_table_without_drafts_projects_nothing() -> None:
    with pytest.raises(ValueError, match="some are missing"):
        project_table(make_table((0.1, 1.0), {}))
