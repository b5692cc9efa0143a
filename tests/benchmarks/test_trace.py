"""`benchmarks/trace.py`: what is timed beside ours takes the same edges, and a difference ends the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from strace.extract import SIZES, Traces
from tests.strace.test_extract import grow, make_weights

# By its path: the standard library has a module `trace` too.
_SPEC = importlib.util.spec_from_file_location("trace_benchmark", Path(__file__).parents[2] / "benchmarks" / "trace.py")
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize("grid", [None, 3])
def test_both_heaps_take_the_edges_in_the_papers_order(grid: int | None) -> None:
    weights = make_weights(3, 2, 7, seed=5, grid=grid)
    order = grow(weights)
    assert benchmark.trace_arrays(weights) == order
    assert benchmark.trace_networkx(weights) == order


def test_a_set_that_differs_ends_the_run() -> None:
    weights = make_weights(3, 2, 7)
    traces, order = benchmark.trace_ours(weights), grow(weights)
    benchmark.check_sets(traces, {"arrays": order, "networkx": order})
    with pytest.raises(SystemExit, match="differs from that of the heap over networkx"):
        benchmark.check_sets(traces, {"arrays": order, "networkx": order[::-1]})


def test_masks_hold_the_edges_of_every_size() -> None:
    weights = make_weights(3, 2, 7)
    traces = Traces(weights)
    held = np.zeros(len(SIZES), np.int64)
    for mask in benchmark.write_masks(weights):
        for part in (mask.residual, mask.attention, mask.mlp):
            if part is not None:
                held += part.reshape(len(SIZES), -1).sum(1)
    assert held.tolist() == [traces.count_of(size) for size in SIZES]
