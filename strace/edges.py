"""Edge weights of one layer: how much each incoming vector of a residual-stream node weighs (s-Trace,
arXiv:2605.27033).

A node's state is the sum of its incoming vectors z_e, and an edge weighs `|z_e|_1 / sum |z_e'|_1`, so the weights into
a node sum to 1. Attention edges need no vector: `z = alpha * W_O^h v` with alpha >= 0, hence `|z|_1 = alpha * |W_O^h
v|_1`.

A post-norm is an RMSNorm made linear at the statistics of the run: behind it `z = alpha * gamma * W_O^h v / rms`, where
rms is that of the whole part at the target, bias included. An output projection's bias reaches its node whatever edges
are cut, so it has no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from strace.decoder import MLP, Attention, Decoder, DenseAttend, Norm, causal_mask, soft_cap


class PatternAttend(DenseAttend):
    """As `DenseAttend`, keeping what the edges of the latest layer need.

    alpha: float32 [S, H, n, n], the pattern after the softmax. v: [S, K, n, D].
    """

    alpha: Tensor
    v: Tensor

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(*self.shape, *t.shape[1:]) for t in (q, k, v))
        self.alpha = attention_pattern(attention, q, k, causal_mask(self._places, self._places, attention.window))
        self.v = v.transpose(1, 2)
        grouped = self.alpha.unflatten(1, (attention.kv_heads, -1))
        return torch.einsum("skgij,sjkd->sikgd", grouped, v.float()).to(q.dtype).reshape(-1, *q.shape[2:])


def attention_pattern(attention: Attention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """float32 [S, H, n, c]: the pattern after the softmax of q [S, n, H, D] over k [S, c, K, D], mask [n, c]."""
    grouped = q.unflatten(2, (attention.kv_heads, -1))
    scores = torch.einsum("sikgd,sjkd->skgij", grouped.float(), k.float()) * attention.scale
    return soft_cap(scores, attention.cap).masked_fill_(~mask, -torch.inf).softmax(-1).flatten(1, 2)


def split_targets(targets: int, each: int, most: int) -> Iterator[slice]:
    """Slices of as many targets as have at most `most` elements, with `each` for one of them; of one at least."""
    few = max(1, most // each)
    return (slice(start, min(start + few, targets)) for start in range(0, targets, few))


@dataclass(frozen=True)
class Edges:
    """Weights of one layer's edges for S texts of n positions, float32.

    attention [S, H, n, n] of (head, j -> i) at [h, i, j], H = 0 where the sublayer is dropped; attention_residual, mlp
    and mlp_residual [S, n]. neurons [S * n, M]: each neuron's share of the MLP edge, rows summing to 1 (None: no MLP).

    Attention and its residual lead to the stream before the MLP, the MLP and its own residual to the stream after it.
    In a parallel block all lead to the one node after the layer: there is one residual, and mlp_residual is None.
    """

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor | None
    neurons: Tensor | None


def value_norms(attention: Attention, v: Tensor) -> Tensor:
    """float32 [S, H, n]: `|W_O^h v|_1` of each query head h and position, from the values v [S, K, n, D]; with a
    post-norm `|gamma * W_O^h v|_1`.

    One head at a time, so that nothing of size positions * heads * hidden is ever held.
    """
    per_head = scale_rows(attention.o.dense(), attention.post_norm).view(attention.o.shape[0], attention.heads, -1)
    group = attention.heads // attention.kv_heads
    norms = [(v[:, h // group].float() @ per_head[:, h].T).abs().sum(-1) for h in range(attention.heads)]
    return torch.stack(norms, 1)


def scale_rows(weight: Tensor, post_norm: Norm | None) -> Tensor:
    """An output projection's weight [hidden, K] with the gamma of the norm behind it."""
    return weight if post_norm is None else post_norm.weight[:, None] * weight


def target_scale(attention: Attention, z: Tensor) -> Tensor:
    """float32 [N]: 1 / rms at each target of the mixed values z [N, H * D] that its heads give; 1 without a
    post-norm."""
    norm = attention.post_norm
    if norm is None:
        return torch.ones(len(z), device=z.device)
    return (attention.o(z).float().square().mean(-1) + norm.eps).rsqrt()


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
        scale = target_scale(attention, seen["z"]).view(shape)[:, None, :, None]
        weights = attend.alpha * value_norms(attention, attend.v)[:, :, None] * scale
    added = torch.zeros_like(whole) if mlp is None else seen["mlp_out"].float().abs().sum(-1).view(shape)
    neurons = None if mlp is None else neuron_shares(mlp, seen["act"])
    into = whole + weights.sum((1, 3))
    if decoder.spec.parallel:
        into = into + added
        return Edges(weights / into[:, None, :, None], whole / into, added / into, None, neurons)
    middle = seen["stream_mid"].abs().sum(-1).view(shape)
    after = middle + added
    return Edges(weights / into[:, None, :, None], whole / into, added / after, middle / after, neurons)


def neuron_shares(mlp: MLP, act: Tensor) -> Tensor:
    """float32 [N, M]: of each neuron in the L1 norms of all that they add, from the activations act [N, M]."""
    share = act.float().abs() * scale_rows(mlp.down.dense(), mlp.post_norm).abs().sum(0)
    return share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
