"""Traces of every size from one run of Prim's algorithm over the nodes of the residual stream.

A trace grows from the output: of all edges whose target is in, the heaviest joins and brings its source, until there
are k of them (paper, section 3). The usual way is a heap of edges. Here only the *nodes* are taken one at a time, which
is some hundred times fewer steps, each one vectorised; all else follows from the order in which they join:

- the bottleneck b(v) of a node is the least weight by which any node up to v has joined;
- edges come in falling order of `kappa(u -> v) = min(w, b(v))`, so a size ends at the k-th largest kappa;
- all edges behind one bottleneck share its kappa, which at small sizes is most of them. Inside the group that a size
  cuts, an edge comes after the last node that joins before it by heavier edges only, heaviest first.

Equal weights are taken in the order of the edges' numbers, so that a trace is a function of the weights alone. numpy,
not torch: the steps are so small that the cost of a call decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

SIZES: tuple[float, ...] = (1e-5, 2e-5, 4e-5, 8e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 2e-3, 3e-3, 4e-3)
SIZES += (6e-3, 8e-3, 1e-2, 2e-2, 4e-2, 6e-2, 8e-2, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # the paper's grid
KINDS = ("residual", "attention", "mlp")
_NUMBER_BITS = 33  # of an int64 key, below the 30 bits that a float32 in [0, 1] has
_MOST = 1 << _NUMBER_BITS
_PIECE = 1 << 20  # edges of one kappa ordered at once
_BIN_BITS = 15  # low bits of a float32 left out of its histogram bin
_BINS = (0x3F800000 >> _BIN_BITS) + 1  # up to the pattern of 1.0


@lru_cache(maxsize=8)
def pairs(tokens: int) -> tuple[Integers, Integers]:
    """Targets i and sources j <= i of the T(T+1)/2 attention pairs, in row order."""
    rows, columns = np.tril_indices(tokens)
    return rows, columns


@dataclass(frozen=True)
class Step:
    """Weights of the edges from one level of the residual stream to the next, float32.

    residual [T], mlp [T], attention [H, T(T+1)/2] over `pairs`; None where the level has no such edges. A sequential
    block is two steps (attention, then MLP), a parallel one a single step with both. -inf marks an attention edge that
    does not exist (outside a sliding window).
    """

    layer: int
    residual: Floats
    attention: Floats | None = None
    mlp: Floats | None = None


@dataclass(frozen=True)
class EdgeWeights:
    """Local weights in [0, 1] of all edges of one prompt of T tokens, from the embeddings up."""

    steps: tuple[Step, ...]
    tokens: int

    @property
    def heads(self) -> int:
        """H, the query heads of a layer."""
        return next(len(step.attention) for step in self.steps if step.attention is not None)

    @property
    def layers(self) -> int:
        return self.steps[-1].layer + 1


@dataclass(frozen=True)
class StepMask:
    """Which edges of one step are in each of B edge sets: residual [B, T], attention [B, H, P], mlp [B, T]."""

    residual: Booleans
    attention: Booleans | None
    mlp: Booleans | None


@dataclass(frozen=True)
class Edge:
    """One edge, decoded: a residual or MLP edge has equal `target` and `source` position and no head."""

    step: int
    layer: int
    kind: str
    head: int | None
    target: int
    source: int
    weight: float


@dataclass(frozen=True)
class _Cut:
    """Where a size ends: all edges of kappa above `value`, and of those at `value` the `tied` numbers (sorted)."""

    value: np.float32
    tied: Integers


def count_edges(layers: int, heads: int, tokens: int, parallel: bool = False) -> int:
    """|E| of unwindowed attention: all edges from which the output can be reached (in the last layer only the last
    position survives). A parallel block has one residual edge per position, a sequential one has two."""
    single = 2 if parallel else 3
    attention = heads * tokens * (tokens + 1) // 2
    return (layers - 1) * (attention + single * tokens) + heads * tokens + single


class Traces:
    """All traces of one prompt, nested by construction.

    Edges are numbered step by step: residual [T], attention [P, H], MLP [T].
    """

    def __init__(self, weights: EdgeWeights) -> None:
        self.weights = weights
        self.pairs = len(pairs(weights.tokens)[0])
        self.stride = 2 * weights.tokens + self.pairs * weights.heads
        if self.stride * len(weights.steps) >= _MOST:
            raise ValueError(f"{weights.tokens} tokens make more edges than can be numbered ({_MOST})")
        self._order, self._keys = self._join_nodes()
        joined = _weight_of(self._keys)
        joined[0] = np.inf
        self._bottleneck = np.where(self._order < 0, -np.inf, np.minimum.accumulate(joined)[self._order])
        self._bottleneck = self._bottleneck.astype(np.float32)
        self._least = _tabulate_minima(self._keys)
        self._histogram = self._count_kappas()
        self.total = int(self._histogram.sum())
        self._cuts: dict[int, _Cut] = {}

    def _join_nodes(self) -> tuple[Integers, Integers]:
        """The place of every node [levels, T] in the order of joining (-1: never), and the key of the edge by which
        each joined."""
        steps, tokens = self.weights.steps, self.weights.tokens
        single, pair = self._node_keys()
        best = np.full((len(steps) + 1, tokens), -1, np.int64)
        free = np.ones(best.shape, np.bool_)
        order = np.full(best.shape, -1, np.int64)
        top = np.full(len(best), -1, np.int64)
        joined = [np.iinfo(np.int64).max]
        level, place = len(steps), tokens - 1
        starts = [i * (i + 1) // 2 for i in range(tokens)]
        while True:
            order[level, place] = len(joined) - 1
            free[level, place] = False
            best[level, place] = -1
            top[level] = best[level].max()
            if level:
                below, row = level - 1, best[level - 1]
                if free[below, place]:
                    row[place] = max(row[place], single[below][place])
                keys = pair[below]
                if keys is not None:
                    end, start = place + 1, starts[place]
                    np.maximum(row[:end], keys[start : start + end], out=row[:end], where=free[below, :end])
                top[below] = row.max()
            level = int(top.argmax())
            if top[level] < 0:
                break
            place = int(best[level].argmax())
            joined.append(int(top[level]))
        return order, self._name_heads(np.array(joined))

    def _node_keys(self) -> tuple[list[list[int]], list[Integers | None]]:
        """Per step the key of the best edge between two nodes of equal position (other than attention), and of the best
        attention edge of every pair, numbered as its first head."""
        tokens, heads = self.weights.tokens, self.weights.heads
        single: list[list[int]] = []
        pair: list[Integers | None] = []
        for number, step in enumerate(self.weights.steps):
            base = number * self.stride
            keys = _keys(step.residual, base + np.arange(tokens))
            if step.mlp is not None:
                keys = np.maximum(keys, _keys(step.mlp, base + self.stride - tokens + np.arange(tokens)))
            single.append(keys.tolist())
            first = base + tokens + heads * np.arange(self.pairs)
            pair.append(None if step.attention is None else _keys(step.attention.max(0), first))
        return single, pair

    def _name_heads(self, keys: Integers) -> Integers:
        """The keys of joining edges with the head that they go through: the lowest among equals."""
        tokens, heads = self.weights.tokens, self.weights.heads
        step, offset = np.divmod(_number_of(keys[1:]), self.stride)
        inside = (offset >= tokens) & (offset < self.stride - tokens)
        for number in np.unique(step[inside]):
            chosen = np.flatnonzero(inside & (step == number))
            attention = self.weights.steps[number].attention
            assert attention is not None
            keys[1 + chosen] -= attention[:, (offset[chosen] - tokens) // heads].argmax(0)
        return keys

    def _kappas(self, number: int) -> Iterator[tuple[str, Floats]]:
        """kappa of one step's edges by kind, shaped as the weights; -inf where an edge is not in E."""
        step, target = self.weights.steps[number], self._bottleneck[number + 1]
        yield "residual", np.minimum(step.residual, target)
        if step.attention is not None:
            yield "attention", np.minimum(step.attention, target[pairs(self.weights.tokens)[0]])
        if step.mlp is not None:
            yield "mlp", np.minimum(step.mlp, target)

    def _count_kappas(self) -> Integers:
        """How many edges of E fall in each bin of kappa."""
        histogram = np.zeros(_BINS, np.int64)
        for number in range(len(self.weights.steps)):
            for _, kappa in self._kappas(number):
                bins = _bins(kappa).ravel()
                histogram += np.bincount(bins[bins >= 0] if bins.min() < 0 else bins, minlength=_BINS)
        return histogram

    def count_of(self, size: float) -> int:
        """Edges of the trace of `size`, a share of |E|, rounded down.

        Raises:
            ValueError: for a size outside (0, 1].
        """
        if not 0 < size <= 1:
            raise ValueError(f"a trace's size must lie in (0, 1], got {size}")
        return int(size * self.total * (1 + 1e-12))

    def cut(self, counts: Sequence[int]) -> None:
        """Find where the traces of `counts` edges end, all in one pass over the edges."""
        fresh = np.array(sorted({k for k in counts if 0 < k <= self.total} - self._cuts.keys()), np.int64)
        if not len(fresh):
            return
        falling = self._histogram[::-1].cumsum()
        bins = _BINS - 1 - np.searchsorted(falling, fresh)
        kappa, weight, number = self._collect(bins)
        rising = np.sort(kappa)
        # A kappa's rank among all edges is its rank among the collected, and the others in higher bins.
        left_out = self._histogram.copy()
        left_out[bins] = 0
        higher = left_out[::-1].cumsum()[::-1][bins]
        values = rising[len(rising) - (fresh - higher)]
        for value in np.unique(values):
            heavier, group = len(rising) - np.searchsorted(rising, value, "right"), np.flatnonzero(kappa == value)
            chosen = np.flatnonzero(values == value)
            needs = fresh[chosen] - higher[chosen] - heavier
            most = int(needs[needs < len(group)].max(initial=0))
            ordered = self._first_tied(group, weight, number, most)
            for k, need in zip(fresh[chosen].tolist(), needs, strict=True):
                taken = group if need == len(group) else ordered[:need]
                self._cuts[k] = _Cut(value, np.sort(number[taken]))

    def _first_tied(self, group: Integers, weight: Floats, number: Integers, most: int) -> Integers:
        """The first `most` of a group of edges of one kappa, in a heap's order.

        A piece at a time: the group may be a fifth of the graph, and what is cut out of it very little.
        """
        piece = max(_PIECE, most)
        first = group[:0]
        for start in range(0, len(group) if most else 0, piece):
            first = np.concatenate([first, group[start : start + piece]])
            first = first[self._sort_tied(weight[first], number[first])[:most]]
        return first

    def _collect(self, bins: Integers) -> tuple[Floats, Floats, Integers]:
        """kappa, weight and number of all edges whose kappa falls in one of `bins`."""
        wanted = np.zeros(_BINS + 1, np.bool_)  # the last is for -inf, whose bin is negative
        wanted[bins] = True
        kappas, weights, numbers = [], [], []
        for number, step in enumerate(self.weights.steps):
            for kind, kappa in self._kappas(number):
                found = np.flatnonzero(wanted[np.maximum(_bins(kappa), -1)].ravel())
                kappas.append(kappa.ravel()[found])
                weights.append(getattr(step, kind).ravel()[found])
                numbers.append(number * self.stride + self._offset(kind, found))
        return np.concatenate(kappas), np.concatenate(weights), np.concatenate(numbers)

    def _offset(self, kind: str, flat: Integers) -> Integers:
        """Number within the step of the edges at `flat` places of a kind's weights."""
        tokens = self.weights.tokens
        if kind == "attention":
            head, pair = np.divmod(flat, self.pairs)
            return tokens + pair * self.weights.heads + head
        return flat + (0 if kind == "residual" else self.stride - tokens)

    def _sort_tied(self, weight: Floats, number: Integers) -> Integers:
        """The order in which a heap would take edges of one kappa."""
        step, _, _, target, _ = self._locate(number)
        key = _keys(weight, number)
        place = self._order[step + 1, target]
        for power in reversed(range(len(self._least))):
            ahead = place + 1
            fits = ahead + (1 << power) <= len(self._keys)
            heavier = self._least[power][np.where(fits, ahead, 0)] > key
            place = place + ((fits & heavier).astype(np.int64) << power)
        return np.lexsort((-key, place))

    def _locate(self, number: Integers) -> tuple[Integers, Integers, Integers, Integers, Integers]:
        """Step, kind (an index into KINDS), head, target and source position of numbered edges."""
        tokens, heads = self.weights.tokens, self.weights.heads
        rows, columns = pairs(tokens)
        step, offset = np.divmod(number, self.stride)
        kind = (offset >= tokens).astype(np.int64) + (offset >= self.stride - tokens)
        pair, head = np.divmod(np.clip(offset - tokens, 0, self.pairs * heads - 1), heads)
        place = np.where(kind == 0, offset, offset - (self.stride - tokens))
        inside = kind == 1
        return step, kind, head, np.where(inside, rows[pair], place), np.where(inside, columns[pair], place)

    def masks(self, number: int, counts: Sequence[int]) -> StepMask:
        """The edges of one step that lie in the traces of `counts` edges."""
        self.cut(counts)
        base = number * self.stride
        found: dict[str, Booleans] = {}
        for kind, kappa in self._kappas(number):
            found[kind] = mask = np.zeros((len(counts), *kappa.shape), np.bool_)
            for row, count in zip(mask, counts, strict=True):
                if count:
                    np.greater(kappa, self._cuts[count].value, out=row)
        tied = [self._tied(count, base) for count in counts]
        row = np.repeat(np.arange(len(counts)), [len(part) for part in tied])
        _, kinds, head, target, source = self._locate(np.concatenate(tied))
        for k, name in enumerate(KINDS):
            at = kinds == k
            if name == "attention" and at.any():
                found[name][row[at], head[at], target[at] * (target[at] + 1) // 2 + source[at]] = True
            elif at.any():
                found[name][row[at], target[at]] = True
        return StepMask(found["residual"], found.get("attention"), found.get("mlp"))

    def _tied(self, count: int, base: int) -> Integers:
        """Of the tied edges of a trace those of the step whose numbers start at `base`."""
        if not count:
            return np.empty(0, np.int64)
        tied = self._cuts[count].tied
        first, last = np.searchsorted(tied, (base, base + self.stride))
        return tied[first:last]

    def numbers(self, count: int) -> Integers:
        """The numbers of the edges of the trace of `count` edges, sorted."""
        parts = []
        for number in range(len(self.weights.steps)):
            mask = self.masks(number, [count])
            for kind in KINDS:
                here = getattr(mask, kind)
                if here is not None:
                    parts.append(number * self.stride + self._offset(kind, np.flatnonzero(here[0].ravel())))
        return np.sort(np.concatenate(parts))

    def edges(self, count: int) -> list[Edge]:
        """The edges of the trace of `count` edges, decoded, from the embeddings up."""
        numbers = self.numbers(count)
        return [
            self._decode(*fields) for fields in zip(*(column.tolist() for column in self._locate(numbers)), strict=True)
        ]

    def _decode(self, number: int, kind: int, head: int, target: int, source: int) -> Edge:
        step = self.weights.steps[number]
        values = getattr(step, KINDS[kind])
        inside = KINDS[kind] == "attention"
        weight = values[head, target * (target + 1) // 2 + source] if inside else values[target]
        return Edge(number, step.layer, KINDS[kind], head if inside else None, target, source, float(weight))


def _keys(weight: Floats, number: Integers) -> Integers:
    """One int64 per edge that grows with its weight and, among equal weights, falls with its number; negative for
    -inf."""
    return (weight.view(np.int32).astype(np.int64) << _NUMBER_BITS) + (_MOST - 1 - number)


def _weight_of(keys: Integers) -> Floats:
    return (keys >> _NUMBER_BITS).astype(np.int32).view(np.float32)


def _number_of(keys: Integers) -> Integers:
    return _MOST - 1 - (keys & (_MOST - 1))


def _bins(kappa: Floats) -> NDArray[np.int32]:
    """Histogram bins of numbers in [0, 1], in their order: the high bits of their pattern. Negative for -inf."""
    return kappa.view(np.int32) >> _BIN_BITS


def _tabulate_minima(keys: Integers) -> list[Integers]:
    """Level p holds the least of each run of 2^p keys, by the run's first place."""
    table = [keys]
    while 2 << len(table) - 1 <= len(keys):
        half = 1 << len(table) - 1
        table.append(np.minimum(table[-1][:-half], table[-1][half:]))
    return table
