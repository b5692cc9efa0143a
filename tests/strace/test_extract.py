"""Traces against a heap of edges on generated graphs: equal edge sets at every size, ties, windows, parallel blocks."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strace.checkpoint import EMBEDDED, load_decoder, open_checkpoint
from strace.extract import SIZES, Edge, EdgeWeights, Floats, Step, Traces, count_edges, pairs
from strace.importance import weigh_edges


def make_weights(
    layers: int,
    heads: int,
    tokens: int,
    seed: int = 0,
    grid: int | None = None,
    parallel: bool = False,
    window: int | None = None,
) -> EdgeWeights:
    """Random weights, those into a node summing to about 1; `grid` rounds them first, so that many are equal."""
    generator = np.random.default_rng(seed)
    rows, columns = pairs(tokens)

    def draw(*shape: int) -> Floats:
        drawn = generator.random(shape, np.float32) ** 4 + 1e-3
        return drawn if grid is None else (np.ceil(drawn * grid) / grid).astype(np.float32)

    steps: list[Step] = []
    for l in range(layers):
        residual, attention, mlp = draw(tokens) * 3, draw(heads, len(rows)), draw(tokens)
        total = residual + np.bincount(rows, attention.sum(0), tokens) + (mlp if parallel else 0)
        weights = (attention / total[rows]).astype(np.float32)
        if window is not None:
            weights[:, rows - columns >= window] = -np.inf
        both = [(part / total).astype(np.float32) for part in (residual, mlp)]
        if parallel:
            steps.append(Step(l, both[0], weights, both[1]))
        else:
            skip = draw(tokens)
            total_mlp = mlp + skip
            steps.append(Step(l, both[0], weights))
            steps.append(Step(l, skip / total_mlp, None, mlp / total_mlp))
    return EdgeWeights(tuple(steps), tokens)


def list_edges(weights: EdgeWeights) -> dict[tuple[int, int], list[tuple[float, int, tuple[int, int]]]]:
    """Incoming edges of every node as (-weight, number, source), written out one by one."""
    tokens, heads = weights.tokens, weights.heads
    stride = 2 * tokens + heads * tokens * (tokens + 1) // 2
    found: dict[tuple[int, int], list[tuple[float, int, tuple[int, int]]]] = {}
    for g, step in enumerate(weights.steps):
        for i in range(tokens):
            edges = [(-float(step.residual[i]), g * stride + i, (g, i))]
            for j in range(i + 1) if step.attention is not None else ():
                for h in range(heads):
                    pair = i * (i + 1) // 2 + j
                    weight = float(step.attention[h, pair])
                    if weight > -math.inf:
                        edges.append((-weight, g * stride + tokens + pair * heads + h, (g, j)))
            if step.mlp is not None:
                edges.append((-float(step.mlp[i]), (g + 1) * stride - tokens + i, (g, i)))
            found[g + 1, i] = edges
    return found


def grow(weights: EdgeWeights) -> list[int]:
    """The paper's growth, with a heap of edges."""
    incoming = list_edges(weights)
    out = (len(weights.steps), weights.tokens - 1)
    heap, seen, order = list(incoming[out]), {out}, []
    heapq.heapify(heap)
    while heap:
        _, number, source = heapq.heappop(heap)
        order.append(number)
        if source not in seen:
            seen.add(source)
            for edge in incoming.get(source, []):
                heapq.heappush(heap, edge)
    return order


def assert_equal_at_all_counts(weights: EdgeWeights) -> None:
    traces, order = Traces(weights), grow(weights)
    assert traces.total == len(order)
    counts = range(traces.total + 1)
    traces.cut(list(counts))
    for count in counts:
        assert set(traces.numbers(count).tolist()) == set(order[:count]), count


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 10**6),
    st.sampled_from([None, None, 2, 5]),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_edge_sets_equal_a_heaps_at_every_number_of_edges(
    layers: int, heads: int, tokens: int, seed: int, grid: int | None, parallel: bool, window: int | None
) -> None:
    assert_equal_at_all_counts(make_weights(layers, heads, tokens, seed, grid, parallel, window))


@pytest.mark.parametrize("grid", [None, 3])
def test_ties_ordered_in_pieces_equal_a_heaps(grid: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strace.extract._PIECE", 2)
    weights = make_weights(3, 2, 5, seed=6, grid=grid)
    order = grow(weights)
    for count in range(1, len(order) + 1):
        assert set(Traces(weights).numbers(count).tolist()) == set(order[:count]), count


def test_equal_weights_everywhere_are_taken_by_number() -> None:
    even = make_weights(2, 2, 4)
    for step in even.steps:
        for part in (step.residual, step.attention, step.mlp):
            if part is not None:
                part[:] = 0.25
    assert_equal_at_all_counts(even)


def test_sizes_of_the_grid_equal_a_heaps_on_a_larger_graph() -> None:
    weights = make_weights(8, 6, 24, seed=3)
    traces, order = Traces(weights), grow(weights)
    counts = [traces.count_of(size) for size in SIZES]
    traces.cut(counts)
    for count in counts:
        assert np.array_equal(traces.numbers(count), np.sort(np.array(order[:count], np.int64)))


def test_sizes_of_the_grid_equal_a_heaps_on_real_weights() -> None:
    checkpoint = open_checkpoint(EMBEDDED)
    ids = checkpoint.tokenizer("The old house stood at the end of the lane, and nobody")["input_ids"]
    for measure in ("l1", "ifr"):
        weights = weigh_edges(load_decoder(checkpoint, "fp32"), torch.tensor(ids), measure)
        traces, order = Traces(weights), grow(weights)
        assert traces.total == len(order) == count_edges(12, 4, len(ids))
        counts = [traces.count_of(size) for size in SIZES] + [24, 48, 200]
        traces.cut(counts)
        for count in counts:
            assert np.array_equal(traces.numbers(count), np.sort(np.array(order[:count], np.int64)))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (3, 2, 1), (4, 3, 7), (2, 5, 12)])
def test_edge_count_equals_its_formula_and_brute_force(shape: tuple[int, int, int], parallel: bool) -> None:
    weights = make_weights(*shape, parallel=parallel)
    incoming, todo, seen = list_edges(weights), [(len(weights.steps), shape[2] - 1)], set()
    edges = 0
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            edges += len(incoming.get(node, []))
            todo += [source for _, _, source in incoming.get(node, [])]
    assert count_edges(*shape, parallel=parallel) == edges == Traces(weights).total


def test_papers_edge_count() -> None:
    assert count_edges(32, 32, 50) == 1_271_053


def test_traces_are_nested_and_connected_to_the_output() -> None:
    weights = make_weights(5, 3, 10, seed=8)
    traces = Traces(weights)
    smaller: set[Edge] = set()
    for count in [traces.count_of(size) for size in SIZES]:
        edges = set(traces.edges(count))
        assert len(edges) == count
        assert smaller <= edges
        reached = {(len(weights.steps), weights.tokens - 1)}
        for edge in sorted(edges, key=lambda e: -e.step):
            assert (edge.step + 1, edge.target) in reached
            reached.add((edge.step, edge.source))
        smaller = edges


def test_masks_hold_as_many_edges_as_asked_and_the_same_as_numbers() -> None:
    weights = make_weights(4, 2, 9, seed=2, grid=3)
    traces = Traces(weights)
    counts = [0, 1, 7, 40, traces.total // 2, traces.total]
    held = np.zeros(len(counts), np.int64)
    for number in range(len(weights.steps)):
        mask = traces.masks(number, counts)
        for part in (mask.residual, mask.attention, mask.mlp):
            if part is not None:
                held += part.reshape(len(counts), -1).sum(1)
    assert held.tolist() == counts == [len(traces.numbers(count)) for count in counts]


def test_decoded_edges_carry_their_own_weight() -> None:
    weights = make_weights(2, 2, 5, seed=4)
    incoming = {number: -weight for edges in list_edges(weights).values() for weight, number, _ in edges}
    traces = Traces(weights)
    numbers, edges = traces.numbers(traces.total), traces.edges(traces.total)
    assert [edge.weight for edge in edges] == [incoming[number] for number in numbers.tolist()]
    assert {edge.kind for edge in edges} == {"residual", "attention", "mlp"}
    assert all(edge.source <= edge.target for edge in edges)


@pytest.mark.parametrize("size", [0, -0.1, 1.0001, math.nan])
def test_a_size_outside_its_range_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match=r"size must lie in \(0, 1\]"):
        Traces(make_weights(1, 1, 2)).count_of(size)
