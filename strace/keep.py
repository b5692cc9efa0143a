"""Which units a subgraph keeps: the best by flow score per byte, within a budget of bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strace.decoder import MLP, Attention, Decoder, Layer, Norm
from strace.families import Spec
from strace.flow import Flow
from strace.layers import map_layers
from strace.linear import DENSE, GROUP, Linear

NEURON_BLOCK = 32
BF16 = 2  # bytes


@dataclass(frozen=True)
class Plan:
    """The scalars that decide a subgraph.

    attention, mlp: shares of the key/value groups and of the neurons to keep; `whole` keeps or drops whole sublayers
    instead. coverage: share of the full model's probability that the short head must hold (1: all rows). format: of
    every matrix. units: how they are scored (strace.controls). repaired: else plainly rounded.
    """

    name: str
    attention: float = 1.0
    mlp: float = 1.0
    whole: bool = False
    coverage: float = 0.98
    format: str = "int4"
    units: str = "flow"
    repaired: bool = True


@dataclass(frozen=True)
class Kept:
    """Units by their numbers in the full model, ascending: int64 key/value groups and neurons per layer, and head rows
    (None: all). An empty list drops the sublayer."""

    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    token_ids: Tensor | None = None


def keep_units(flow: Flow, plan: Plan, token_ids: Tensor | None = None) -> Kept:
    """The best groups and neuron blocks of a plan's shares.

    Units of a kind take the same bytes, so score order is score per byte. Neurons of a layer are sorted by score and
    cut into blocks of 32, the last one shorter; blocks of all layers compete.
    """
    if plan.whole:
        groups = _best(flow.attention[:, None], plan.attention).expand(flow.groups.shape)
        neurons = _best(flow.mlp[:, None], plan.mlp).expand(flow.neurons.shape)
    else:
        groups, neurons = _best(flow.groups, plan.attention), _best_neurons(flow.neurons, plan.mlp)
    return Kept(_numbers(groups), _numbers(neurons), token_ids)


def _best(scores: Tensor, share: float) -> Tensor:
    """bool, like scores: the best `share` of all."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[: round(share * scores.numel())]] = True
    return chosen.view(scores.shape)


def _best_neurons(scores: Tensor, share: float) -> Tensor:
    """bool [L, M]."""
    layers, neurons = scores.shape
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    blocks = torch.nn.functional.pad(ordered, (0, -neurons % NEURON_BLOCK)).view(layers, -1, NEURON_BLOCK)
    chosen = _best(blocks.mean(2), share).repeat_interleave(NEURON_BLOCK, 1)[:, :neurons]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _numbers(chosen: Tensor) -> tuple[Tensor, ...]:
    return tuple(row.nonzero().flatten() for row in chosen)


def take(linear: Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
    """A dense `Linear` of some rows and columns of another; its bias goes with the rows."""
    weight, bias = linear.dense(), linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    return Linear(weight.to(DENSE.get(linear.format, torch.bfloat16)).contiguous(), bias)


def slice_attention(part: Attention, groups: Tensor, spec: Spec) -> Attention | None:
    """What the key/value groups leave of a full attention sublayer; all of it is the sublayer itself."""
    if len(groups) == spec.kv_heads:
        return part
    if not len(groups):
        return None
    groups = groups.to(part.device)
    heads = (groups[:, None] * spec.group + torch.arange(spec.group, device=groups.device)).flatten()
    stacked = torch.cat([heads, spec.heads + groups, spec.heads + spec.kv_heads + groups])
    return replace(
        part,
        qkv=take(part.qkv, rows=_elements(stacked, spec.head_dim)),
        o=take(part.o, columns=_elements(heads, spec.head_dim)),
        heads=len(heads),
        kv_heads=len(groups),
        q_norm=_take_norm(part.q_norm, heads, spec.head_dim),
        k_norm=_take_norm(part.k_norm, groups, spec.head_dim),
        kept=groups,
    )


def _take_norm(norm: Norm | None, heads: Tensor, head_dim: int) -> Norm | None:
    """The kept heads of a norm over all heads at once, whose statistics are then those of the kept heads alone: an
    approximation of the full model's. A norm of single heads stays as it is."""
    if norm is None or len(norm.weight) == head_dim:
        return norm
    return replace(norm, weight=norm.weight[_elements(heads, head_dim)])


def _elements(heads: Tensor, head_dim: int) -> Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def slice_mlp(part: MLP, neurons: Tensor, spec: Spec) -> MLP | None:
    """What the neurons leave of a full MLP sublayer; all of it is the sublayer itself."""
    if len(neurons) == spec.mlp:
        return part
    if not len(neurons):
        return None
    neurons = neurons.to(part.device)
    rows = torch.cat([neurons, spec.mlp + neurons]) if part.gated else neurons
    return replace(part, inner=take(part.inner, rows=rows), down=take(part.down, columns=neurons))


def slice_layer(layer: Layer, groups: Tensor, neurons: Tensor, spec: Spec) -> Layer:
    """What the kept units leave of a full layer."""
    assert layer.attention is not None and layer.mlp is not None, "units are cut out of a full model"
    return Layer(slice_attention(layer.attention, groups, spec), slice_mlp(layer.mlp, neurons, spec))


def slice_decoder(full: Decoder, kept: Kept) -> Decoder:
    """The kept units of the full model at its own formats, everything unchanged shared with it."""

    def cut(l: int, layer: Layer) -> Layer:
        return slice_layer(layer, kept.groups[l], kept.neurons[l], full.spec)

    layers = map_layers(full.layers, cut, room=0)  # cutting is cheap, and what is cut is mostly rounded at once
    if kept.token_ids is None:
        return replace(full, layers=layers)
    ids = kept.token_ids.to(full.embed.device)
    return replace(full, layers=layers, head=take(full.head, rows=ids), token_ids=ids)


def full_bytes(full: Decoder) -> int:
    """bf16 bytes per step of the full model, the whole that a size is a share of."""
    parts = [p for l in full.layers for s in (l.attention, l.mlp) if s is not None for p in vars(s).values()]
    linears = [p for p in [*parts, full.head] if isinstance(p, Linear)]
    norms = [p for p in [*parts, full.final_norm] if isinstance(p, Norm)]
    numbers = sum(p.shape[0] * p.shape[1] for p in linears) + sum(len(p.weight) for p in norms)
    return BF16 * (numbers + full.spec.hidden)


def matrix_bytes(n: int, k: int, format: str) -> int:
    """Bytes of an [n, k] matrix in `format`, as `make_linear` stores it."""
    if format in DENSE:
        return n * k * DENSE[format].itemsize
    if format == "int4" and k % GROUP == 0:
        return n * k // 2 + n * k // GROUP * BF16
    return n * k + n * BF16


def kept_bytes(spec: Spec, kept: Kept, format: str) -> int:
    """Bytes per step of the kept units' matrices, and of the head's rows."""
    rows = spec.vocabulary if kept.token_ids is None else len(kept.token_ids)
    total = matrix_bytes(rows, spec.hidden, format)
    for groups, neurons in zip(kept.groups, kept.neurons, strict=True):
        width, m = len(groups) * spec.head_dim, len(neurons)
        if width:
            total += matrix_bytes(width * (spec.group + 2), spec.hidden, format)
            total += matrix_bytes(spec.hidden, width * spec.group, format)
        if m:
            inner = 2 * m if spec.gated else m
            total += matrix_bytes(inner, spec.hidden, format) + matrix_bytes(spec.hidden, m, format)
    return total


def fit_size(
    plan: Plan, flow: Flow, spec: Spec, token_ids: Tensor | None, budget: float, steps: int = 64
) -> Plan | None:
    """`plan` with the largest share of the neurons that fits into `budget` bytes beside its attention and its head;
    None where those two alone take more."""
    for step in range(steps, -1, -1):
        scaled = replace(plan, mlp=plan.mlp * step / steps)
        if kept_bytes(spec, keep_units(flow, scaled, token_ids), plan.format) <= budget:
            return scaled
    return None
