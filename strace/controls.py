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
from strace.repair import DAMPING, invert
from strace.texts import Texts, count_positions

TURNS = 96  # in which the neurons of a layer go
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
    return {l: s / max(count_positions(fit), 1) for l, s in sums.items()}


@torch.inference_mode()
def _score_refitted(full: Decoder, fit: Sequence[Texts]) -> Tensor:
    """float64 [L, M]: neurons go some at a time, each time those whose going costs least (after ZipLM,
    arXiv:2302.04089); a neuron's score is the most that any had cost when it went. Errors are shares of the stream's
    mean square behind the MLP, which grows from layer to layer. The moments of one layer are held at a time."""
    device = full.embed.device
    places = [(batch.tokens.flatten().to(device), batch.positions.to(device)) for batch in fit]
    streams, scores = [full.embedded(*place) for place in places], []
    for l, layer in enumerate(full.layers):
        assert layer.mlp is not None, "units are those of a full model"
        moments, size = torch.zeros(full.spec.mlp, full.spec.mlp, dtype=torch.float64, device=layer.device), 0.0
        for i, batch in enumerate(fit):
            real = batch.real.flatten().to(layer.device)

            def tap(name: str, layer: int, value: Tensor, real: Tensor = real, sums: Tensor = moments) -> Tensor:
                if name == "act":
                    x = value[real].float()
                    sums += x.T @ x
                return value

            cos, sin = full.rotation(places[i][1])
            rotation = cos.to(layer.device), sin.to(layer.device)
            attend = DenseAttend(*batch.shape, device=layer.device)
            streams[i] = full.layer(l, streams[i].to(layer.device), rotation, attend, tap)
            size += float(streams[i][real].double().square().sum())
        scores.append(drop_in_turn(layer.mlp.down.dense().double(), moments).cpu() / size)
    return torch.stack(scores)


def drop_in_turn(weight: Tensor, moments: Tensor) -> Tensor:
    """float64 [K] of a projection [N, K] and its inputs' second moments [K, K], which are used up; see
    `_score_refitted`."""
    k = len(moments)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean().clamp_min(1e-12))
    inverse = invert(moments)
    left, scores, most = torch.arange(k, device=weight.device), torch.zeros(k, dtype=weight.dtype), 0.0
    while len(left):
        costs = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-12)
        order = costs.argsort()
        worst, rest = order[: -(-k // TURNS)], order[-(-k // TURNS) :]
        most = max(most, float(costs[worst].mean()))
        scores[left[worst].cpu()] = most
        share = torch.linalg.solve(inverse[worst][:, worst], inverse[worst][:, rest])
        weight = weight[:, rest] - weight[:, worst] @ share
        inverse = inverse[rest]
        across = inverse[:, worst]
        inverse = inverse[:, rest].addmm_(across, share, alpha=-1)
        left = left[rest]
    return scores
