"""How units are scored, as options of the same command: by flow, by the error of doing without, and the controls that
both must beat at equal bytes.

| units | score of a key/value group or neuron |
|---|---|
| refit | groups by flow; a neuron by the output's squared error without it, once those left are refitted |
| flow | the flow of the class's text that passes it (strace.flow) |
| uniform | its rank by flow within its layer: every layer keeps the same share |
| first | layers from the first on |
| random | a random number |
| magnitude | sum of squares of its columns of the output projection |
| wanda | rms of its activation times the L1 norm of those columns (after arXiv:2306.11695) |
| moment | mean square of its activation times the sum of squares of those columns |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strace.decoder import Decoder, DenseAttend
from strace.flow import Flow
from strace.texts import Texts

DAMPING = 0.01  # in mean diagonals of the inputs' moments
UNITS = ("refit", "flow", "uniform", "first", "random", "magnitude", "wanda", "moment")


def score_units(units: str, flow: Flow, full: Decoder, fit: Sequence[Texts], seed: int = 0) -> Flow:
    """Scores of the kind `units`, in place of those of `flow`.

    Raises:
        ValueError: for a kind that is not known.
    """
    if units not in UNITS:
        raise ValueError(f"unknown units {units!r}; choose one of {', '.join(UNITS)}")
    if units == "flow":
        return flow
    if units == "refit":
        return replace(flow, neurons=_score_refitted(full, fit))
    if units == "uniform":
        return replace(flow, groups=_rank(flow.groups), neurons=_rank(flow.neurons))
    if units == "first":
        order = torch.arange(len(full.layers), 0, -1, dtype=torch.float64)[:, None]
        return replace(flow, groups=order.expand_as(flow.groups), neurons=order.expand_as(flow.neurons))
    if units == "random":
        generator = torch.Generator().manual_seed(seed)
        groups, neurons = (torch.rand(t.shape, generator=generator).double() for t in (flow.groups, flow.neurons))
        return replace(flow, groups=groups, neurons=neurons)
    return _score_outputs(units, flow, full, fit)


def _rank(scores: Tensor) -> Tensor:
    return scores.argsort(1).argsort(1).double()


def _score_outputs(units: str, flow: Flow, full: Decoder, fit: Sequence[Texts]) -> Flow:
    """By the columns of the output projections, and by what comes into them."""
    z, act = ({}, {}) if units == "magnitude" else (_add_products(full, fit, kind, _square) for kind in ("z", "act"))
    groups, neurons = torch.zeros_like(flow.groups), torch.zeros_like(flow.neurons)
    for l, layer in enumerate(full.layers):
        assert layer.attention is not None and layer.mlp is not None, "units are those of a full model"
        by_input = _score_columns(units, layer.attention.o.dense(), z.get(l))
        groups[l] = by_input.view(len(groups[l]), -1).sum(1)
        neurons[l] = _score_columns(units, layer.mlp.down.dense(), act.get(l))
    return replace(flow, groups=groups, neurons=neurons)


def _score_columns(units: str, weight: Tensor, squares: Tensor | None) -> Tensor:
    """float64 [K] of a projection [N, K] and its inputs' mean squares [K]."""
    weight = weight.double().cpu()
    if squares is None:
        return weight.square().sum(0)
    return squares.sqrt() * weight.abs().sum(0) if units == "wanda" else squares * weight.square().sum(0)


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum(0)


def _cross(x: Tensor) -> Tensor:
    return (x.float().T @ x.float()).double()


@torch.inference_mode()
def _add_products(
    full: Decoder, fit: Sequence[Texts], kind: str, product: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """By layer, the mean over positions of a product of the activation `kind`; `z` and `act` are what the output
    projections of attention and MLP read."""
    sums: dict[int, Tensor] = {}
    for batch in fit:
        real = batch.real.flatten()

        def tap(name: str, layer: int, value: Tensor, real: Tensor = real) -> Tensor:
            if name == kind:
                sums[layer] = sums.get(layer, 0) + product(value[real.to(value.device)]).cpu()
            return value

        device = full.embed.device
        attend = DenseAttend(*batch.shape, device=device)
        full.streams(batch.tokens.flatten().to(device), batch.positions.to(device), attend, tap)
    rows = sum(int(batch.lengths.sum()) for batch in fit)
    return {l: s / max(rows, 1) for l, s in sums.items()}


def _score_refitted(full: Decoder, fit: Sequence[Texts]) -> Tensor:
    """float64 [L, M]: neurons go one by one, each time the one whose going costs least (after ZipLM,
    arXiv:2302.04089); a neuron's score is the most that one had cost when it went. Errors are shares of the stream's
    mean square behind the MLP, which grows from layer to layer."""
    moments, streams = _add_products(full, fit, "act", _cross), _add_products(full, fit, "stream_out", _square)
    scores = []
    for l, layer in enumerate(full.layers):
        assert layer.mlp is not None, "units are those of a full model"
        scores.append(drop_in_turn(layer.mlp.down.dense().double().cpu(), moments[l]) / streams[l].sum())
    return torch.stack(scores)


def drop_in_turn(weight: Tensor, moments: Tensor) -> Tensor:
    """float64 [K] of a projection [N, K] and its inputs' second moments [K, K]; see `_score_refitted`."""
    k = len(moments)
    damping = DAMPING * moments.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(moments + damping * torch.eye(k, dtype=torch.float64))
    left, weight = torch.ones(k, dtype=torch.bool), weight.clone()
    scores, most = torch.zeros(k, dtype=torch.float64), 0.0
    for _ in range(k):
        costs = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        worst = int(torch.where(left, costs, torch.inf).argmin())
        most = max(most, float(costs[worst]))
        scores[worst], left[worst] = most, False
        share = inverse[:, worst] / inverse[worst, worst]
        weight -= torch.outer(weight[:, worst], share)
        inverse -= torch.outer(share, inverse[worst])
        weight[:, ~left] = 0
    return scores
