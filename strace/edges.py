"""Edge weights of one layer: how much each incoming vector of a residual-stream node weighs (s-Trace,
arXiv:2605.27033).

A node's state is the sum of its incoming vectors z_e, and an edge weighs `|z_e|_1 / sum |z_e'|_1`, so the weights into
a node sum to 1. Attention edges need no vector: `z = alpha * W_O^h v` with alpha >= 0, hence `|z|_1 = alpha * |W_O^h
v|_1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strace.decoder import Attention, Decoder, DenseAttend, causal_mask


class PatternAttend(DenseAttend):
    """As `DenseAttend`, keeping what the edges of the latest layer need.

    alpha: float32 [S, H, n, n], the pattern after the softmax. v: [S, K, n, D].
    """

    alpha: Tensor
    v: Tensor

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(*self.shape, *t.shape[1:]) for t in (q, k, v))
        s, n, heads, d = q.shape
        grouped = q.view(s, n, attention.kv_heads, -1, d)
        scores = torch.einsum("sikgd,sjkd->skgij", grouped.float(), k.float()) * d**-0.5
        mask = causal_mask(self._places, self._places, attention.window)
        alpha = scores.masked_fill_(~mask, -torch.inf).softmax(-1)
        self.alpha, self.v = alpha.flatten(1, 2), v.transpose(1, 2)
        return torch.einsum("skgij,sjkd->sikgd", alpha, v.float()).to(q.dtype).reshape(-1, heads, d)


@dataclass(frozen=True)
class Edges:
    """Weights of one layer's edges for S texts of n positions, float32.

    attention [S, H, n, n] of (head, j -> i) at [h, i, j], H = 0 where the sublayer is dropped; attention_residual, mlp
    and mlp_residual [S, n]. neurons [S * n, M]: each neuron's share of the MLP edge, rows summing to 1 (None: no MLP).
    """

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor
    neurons: Tensor | None


def value_norms(attention: Attention, v: Tensor) -> Tensor:
    """float32 [S, H, n]: `|W_O^h v|_1` of each query head h and position, from the values v [S, K, n, D].

    One head at a time, so that nothing of size positions * heads * hidden is ever held.
    """
    per_head = attention.o.dense().view(attention.o.shape[0], attention.heads, -1)
    group = attention.heads // attention.kv_heads
    norms = [(v[:, h // group].float() @ per_head[:, h].T).abs().sum(-1) for h in range(attention.heads)]
    return torch.stack(norms, 1)


def layer_edges(
    decoder: Decoder, l: int, stream: Tensor, rotation: tuple[Tensor, Tensor], shape: tuple[int, int]
) -> Edges:
    """The edges of layer `l`, whose input is the float32 stream [S * n, hidden] of `shape` = (S, n) texts."""
    seen: dict[str, Tensor] = {}

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    attend = PatternAttend(*shape, device=stream.device)
    decoder.layer(l, stream, rotation, attend, tap)
    attention, mlp = decoder.layers[l].attention, decoder.layers[l].mlp
    whole = seen["stream"].abs().sum(-1).view(shape)
    if attention is None:
        weights = stream.new_zeros(shape[0], 0, shape[1], shape[1])
    else:
        weights = attend.alpha * value_norms(attention, attend.v)[:, :, None]
    total = whole + weights.sum((1, 3))
    middle = seen["stream_mid"].abs().sum(-1).view(shape)
    if mlp is None:
        return Edges(
            weights / total[:, None, :, None], whole / total, torch.zeros_like(middle), torch.ones_like(middle), None
        )
    added = seen["mlp_out"].float().abs().sum(-1).view(shape)
    share = seen["act"].float().abs() * mlp.down.dense().abs().sum(0)
    return Edges(
        attention=weights / total[:, None, :, None],
        attention_residual=whole / total,
        mlp=added / (middle + added),
        mlp_residual=middle / (middle + added),
        neurons=share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny),
    )
