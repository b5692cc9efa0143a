"""What a plan would cost and bring, without timing every plan: plain shapes are timed once for a model and machine, a
line through them prices any other.

A draft step costs `fixed + sublayers * per_sublayer + bytes * per_byte`; which units are kept and how they were rounded
does not change it, so neither classes nor repaired weights need timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import nnls

from strace.checkpoint import quantise_layer, quantise_linear
from strace.costs import (
    TYPICAL,
    CostTable,
    count_blocks,
    describe_setting,
    draw_curve,
    draw_verifying,
    list_cases,
    load_table,
    measure_costs,
    save_table,
    stamp,
)
from strace.decoder import Decoder, Layer
from strace.graphs import make_runner
from strace.keep import BF16, NEURON_BLOCK, Kept, slice_layer
from strace.layers import map_layers
from strace.linear import Codes, Linear
from strace.runner import FULL

LENGTHS = (1, 2, 4, 5, 6, 7, 9)  # tokens of the full passes timed; 9 verify the longest draft
# Shares of the attention layers, neurons and head rows of the shapes timed: they span what plans may keep.
SHAPES = ((1, 1, 1), (1, 1 / 2, 1 / 2), (1, 1 / 4, 1 / 4), (1, 1 / 4, 1), (1 / 2, 1 / 2, 1 / 2))
ROUNDS = 30
BUDGET = 40.0  # seconds after which no further round of timing is begun


@dataclass(frozen=True)
class StepCosts:
    """Seconds by size. draft: of (1, sublayers, bytes) per step. full: of full passes, by tokens. runner: ran them."""

    draft: tuple[float, float, float]
    full: dict[int, float]
    runner: str

    def c(self, subgraph: Decoder) -> float:
        """A draft step of `subgraph`, in full steps."""
        return float(np.dot(self.draft, _features(subgraph))) / self.full[1]

    @property
    def v(self) -> dict[int, float]:
        """Full passes in full steps, by tokens."""
        return {n: seconds / self.full[1] for n, seconds in self.full.items()}

    @property
    def full_ms(self) -> float:
        return self.full[1] * 1e3


@dataclass(frozen=True)
class Projection:
    """What steps cost elsewhere, in full steps there. where: on what. draft: of (1, share of the full model's bytes in
    bf16) per step. v: of full passes, by tokens."""

    where: str
    draft: tuple[float, float]
    v: dict[int, float]

    def c(self, share: float) -> float:
        """A draft step that reads such a share of the full model's bytes."""
        return self.draft[0] + self.draft[1] * share


def project_table(table: CostTable) -> Projection:
    """The line, no part of it below zero, nearest to the draft steps of a table of any machine and model.

    Raises:
        ValueError: for a table without full passes or without drafts.
    """
    setting, full = table.setting, draw_verifying(table.costs)
    drafts = {name: draw_curve(table.costs, name) for name in setting.graphs if name != FULL}
    if FULL not in setting.graphs or 1 not in full or not drafts or any(1 not in curve for curve in drafts.values()):
        raise ValueError("the costs of a projection are those of full passes and of drafts; some are missing")
    whole = setting.graphs[FULL].bytes_per_step * BF16 / getattr(torch, setting.dtype).itemsize
    rows = np.array([[1.0, setting.graphs[name].bytes_per_step / whole] for name in drafts])
    c = np.array([curve[1] for curve in drafts.values()]) / full[1]
    (fixed, share), _ = nnls(rows / c[:, None], np.ones(len(c)))  # relative errors count
    where = f"{setting.processor}, {setting.threads} threads, {setting.runner} {setting.isa}"
    return Projection(where, (float(fixed), float(share)), {n: seconds / full[1] for n, seconds in full.items()})


def _features(graph: Decoder) -> tuple[int, int, int]:
    sublayers = sum(part is not None for layer in graph.layers for part in (layer.attention, layer.mlp))
    return 1, sublayers, graph.bytes_per_step


def list_shapes(full: Decoder, format: str) -> dict[str, Decoder]:
    """Graphs of the sizes to time, by name, plainly quantised: which units they keep does not matter."""
    spec, whole = full.spec, quantise_linear(full.head, format, full.dtype)
    shapes, heads = {}, dict[int, Linear]()  # one of a size is packed once
    for attention, mlp, head in SHAPES:
        layers = range(spec.layers)
        groups = tuple(torch.arange(spec.kv_heads if l < round(attention * spec.layers) else 0) for l in layers)
        neurons = (
            torch.arange(min(spec.mlp, max(1, round(mlp * spec.mlp / NEURON_BLOCK)) * NEURON_BLOCK)),
        ) * spec.layers
        rows = round(head * spec.vocabulary)
        name = f"attention {attention:g}, neurons {mlp:g}, head {head:g}, {format}"
        ids = None if rows == spec.vocabulary else torch.arange(rows)
        if rows not in heads:
            heads[rows] = _take_first(whole, rows, full.dtype)
        shapes[name] = _make_shape(full, Kept(groups, neurons, ids), heads[rows], format)
    return shapes


def _make_shape(full: Decoder, kept: Kept, head: Linear, format: str) -> Decoder:
    """The kept units over a head that is rounded already. No layer stays: each is packed once."""

    def make(l: int, layer: Layer) -> Layer:
        part = slice_layer(layer, kept.groups[l], kept.neurons[l], full.spec)
        return quantise_layer(part, format, full.dtype)

    layers = map_layers(full.layers, make, room=0)
    return replace(full, layers=layers, head=head, token_ids=kept.token_ids)


def _take_first(linear: Linear, rows: int, dtype: torch.dtype) -> Linear:
    """The first rows of a matrix, in the same memory."""
    weight, bias = linear.weight, None if linear.bias is None else linear.bias[:rows]
    if isinstance(weight, Codes):
        return Linear(replace(weight, codes=weight.codes[:rows], scales=weight.scales[:rows]), bias, dtype)
    return Linear(weight[:rows], bias)


def price_steps(
    full: Decoder,
    weight_hash: str,
    format: str,
    runner: str = "auto",
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """The costs on this machine: from the table kept for this model and setting, else timed now and kept."""
    shapes = list_shapes(full, format)
    cases = list_cases(full.spec.context, (TYPICAL,), (1,), LENGTHS)
    served = make_runner({FULL: full, **shapes}, count_blocks(cases), runner)
    setting = describe_setting(served, weight_hash)
    table = load_table(setting)
    if table is None:
        costs = measure_costs(served, list(shapes), cases, ROUNDS, BUDGET, clock=clock)
        table = CostTable(setting, stamp(), 0.0, costs, {})
        save_table(table)
    return fit_costs(table, [served.graphs[name] for name in shapes], list(shapes))


def fit_costs(table: CostTable, graphs: Sequence[Decoder], names: Sequence[str]) -> StepCosts:
    """The line, no part of it below zero, nearest to the measured draft steps."""
    rows = np.array([_features(graph) for graph in graphs], dtype=float)
    seconds = np.array([draw_curve(table.costs, name)[1] for name in names])
    scale = rows.max(0)
    weights, _ = nnls(rows / scale / seconds[:, None], np.ones(len(seconds)))  # relative errors count
    fixed, sublayer, byte = (weights / scale).tolist()
    return StepCosts((fixed, sublayer, byte), draw_verifying(table.costs), table.setting.runner)
