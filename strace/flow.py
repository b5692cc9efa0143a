"""Backward flow: what share of a text's computation passes through each unit.

F is 1 at every target position of the last level, and `F(u) = sum over out-edges of w * F(v)`. Weights into a node sum
to 1, so every level sums to the number of targets, and scores compare across layers, texts and lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strace.decoder import Attention, Decoder, DenseAttend
from strace.edges import Edges, layer_edges
from strace.texts import Texts, split_texts

STREAMS = 1 << 30  # bytes of the streams kept


@dataclass
class Flow:
    """Scores per unit, float64 sums over all targets.

    groups [L, K]: per key/value head with its query heads, by its number in the full model. neurons [L, M]. levels [2L
    + 1] (parallel blocks: [L + 1]): the flow that reaches each level, which is `targets` at all of them.
    """

    groups: Tensor
    neurons: Tensor
    levels: Tensor
    targets: int = 0

    @property
    def attention(self) -> Tensor:
        """[L] per attention sublayer."""
        return self.groups.sum(1)

    @property
    def mlp(self) -> Tensor:
        """[L] per MLP sublayer."""
        return self.neurons.sum(1)


@torch.inference_mode()
def measure_flow(decoder: Decoder, batches: Sequence[Texts]) -> Flow:
    """The flow through `decoder` over all positions of all texts.

    A forward pass keeps the stream before each layer, of no more texts at once than `STREAMS` allows; the backward
    sweep runs one layer at a time again, so that only one layer's attention pattern is held.
    """
    depth = len(decoder.layers)
    flow = Flow(
        groups=torch.zeros(depth, decoder.spec.kv_heads, dtype=torch.float64),
        neurons=torch.zeros(depth, decoder.spec.mlp, dtype=torch.float64),
        levels=torch.zeros(decoder.spec.steps + 1, dtype=torch.float64),
    )
    for batch in batches:
        size = 4 * depth * batch.shape[1] * decoder.spec.hidden
        for few in split_texts(batch, max(1, STREAMS // size)):
            _add_batch(flow, decoder, few)
    return flow


def _add_batch(flow: Flow, decoder: Decoder, batch: Texts) -> None:
    streams: list[Tensor] = []

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        if name == "stream":
            streams.append(value)
        return value

    device = decoder.embed.device
    positions = batch.positions.to(device)
    attend = DenseAttend(*batch.shape, device=device)
    f = decoder.streams(batch.tokens.flatten().to(device), positions, attend, tap).new_ones(batch.shape)
    f *= batch.real.to(device)
    flow.targets += int(batch.lengths.sum())
    flow.levels[-1] += total(f)
    cos, sin = decoder.rotation(positions)
    for l in reversed(range(len(decoder.layers))):
        here = streams[l].device
        edges = layer_edges(decoder, l, streams[l], (cos.to(here), sin.to(here)), batch.shape)
        f = _cross_layer(flow, l, edges, f.to(here), decoder.layers[l].attention)


def _cross_layer(flow: Flow, l: int, edges: Edges, f: Tensor, attention: Attention | None) -> Tensor:
    """The flow f [S, n] after layer `l` taken back before it."""
    if edges.mlp_residual is None:
        through = _cross_mlp(flow, l, edges, f)
        f = _cross_attention(flow, l, edges, f, attention) + through
        flow.levels[l] += total(f)
        return f
    f = _cross_mlp(flow, l, edges, f) + f * edges.mlp_residual
    flow.levels[2 * l + 1] += total(f)
    f = _cross_attention(flow, l, edges, f, attention)
    flow.levels[2 * l] += total(f)
    return f


def _cross_mlp(flow: Flow, l: int, edges: Edges, f: Tensor) -> Tensor:
    """Of the flow f [S, n] into the targets of layer `l`'s MLP what passes it; neurons score by their shares of
    that."""
    through = f * edges.mlp
    if edges.neurons is not None:
        by_neuron = through.flatten() @ edges.neurons
        flow.neurons[l, : len(by_neuron)] += by_neuron.double().cpu()
    return through


def _cross_attention(flow: Flow, l: int, edges: Edges, f: Tensor, attention: Attention | None) -> Tensor:
    """Of the flow f [S, n] into the targets of layer `l`'s attention what reaches its sources, by its heads and by the
    residual."""
    arriving = torch.einsum("si,shij->shj", f, edges.attention)
    if attention is not None:
        by_group = arriving.double().sum((0, 2)).view(attention.kv_heads, -1).sum(1)
        flow.groups[l, slice(None) if attention.kept is None else attention.kept] += by_group.cpu()
    return f * edges.attention_residual + arriving.sum(1)


def total(f: Tensor) -> Tensor:
    """The float64 sum, on the CPU."""
    return f.double().sum().cpu()
