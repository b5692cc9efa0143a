"""The one decoder-only transformer: full models and subgraphs alike, from a `Spec` and weights.

It is functional and knows nothing of where keys and values are kept: an `Attend` strategy takes each layer's q, k, v
and gives the mixed values back (paged cache when serving, dense when tracing). The residual stream is float32 whatever
the dtype of the weights; products take and give the compute dtype. A subgraph is the same structure with fewer heads,
neurons, sublayers and head rows, and other formats.

Shapes: N tokens of any number of sequences, concatenated; H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from strace.families import Spec
from strace.linear import Linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Attention:
    """One attention sublayer, or what a subgraph keeps of it.

    `qkv` stacks the kept query, key and value heads' rows. `kept` holds the numbers of its key/value heads in the full
    model (None: all), by which it finds them in the full model's cache.
    """

    norm: Tensor
    qkv: Linear
    o: Linear
    heads: int
    kv_heads: int
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    kept: Tensor | None = None

    @property
    def bytes(self) -> int:
        norms = (norm for norm in (self.norm, self.q_norm, self.k_norm) if norm is not None)
        return sum(norm.nbytes for norm in norms) + self.qkv.bytes + self.o.bytes


@dataclass
class MLP:
    """One MLP sublayer, or the neurons that a subgraph keeps; `gate_up` stacks the gate's rows over the up rows."""

    norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def bytes(self) -> int:
        return self.norm.nbytes + self.gate_up.bytes + self.down.bytes


@dataclass
class Layer:
    """A sublayer that a subgraph drops whole is None and costs nothing."""

    attention: Attention | None
    mlp: MLP | None


class Attend(Protocol):
    """Mixes values: q [N, H, D], k and v [N, K, D] after rope -> [N, H, D]."""

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Tap(Protocol):
    """Sees an activation by name and layer, and gives back what the decoder goes on with (usually the same tensor).

    Names, in order: stream [N, hidden] before attention; z [N, H * D]; attention_out; stream_mid; act [N, neurons];
    mlp_out; stream_out; after the last layer, final [N, hidden], the normalised stream.
    """

    def __call__(self, name: str, layer: int, value: Tensor) -> Tensor: ...


def see(name: str, layer: int, value: Tensor) -> Tensor:
    """The tap that only looks away."""
    return value


@dataclass
class Decoder:
    """Weights and arithmetic of one model or subgraph.

    `token_ids` maps the rows of a short head to the vocabulary (None: all rows, in order). `coverage` is the share of
    the full model's probability that falls on those rows, by which a short head's confidence is corrected.
    """

    spec: Spec
    embed: Tensor
    layers: list[Layer]
    final_norm: Tensor
    head: Linear
    dtype: torch.dtype
    token_ids: Tensor | None = None
    coverage: float = 1.0
    devices: list[torch.device] = field(default_factory=list)

    def __post_init__(self) -> None:
        angles = torch.outer(torch.arange(self.spec.context).float(), self.spec.inverse_frequency)
        cos, sin = angles.cos() * self.spec.rope_scaling, angles.sin() * self.spec.rope_scaling
        self._cos = torch.cat([cos, cos], -1).to(self.embed.device)
        self._sin = torch.cat([-sin, sin], -1).to(self.embed.device)
        self._activate = _ACTIVATIONS[self.spec.activation]

    @property
    def bytes_per_step(self) -> int:
        """All weights, scales, biases and head rows read for one token, without KV; one embedding row."""
        parts = [s.bytes for layer in self.layers for s in (layer.attention, layer.mlp) if s is not None]
        return sum(parts) + self.final_norm.nbytes + self.head.bytes + self.embed[0].nbytes

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [N, 1, rotary_dim] at int64 positions [N]."""
        return self._cos[positions, None], self._sin[positions, None]

    def attention(
        self, l: int, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, tap: Tap = see
    ) -> Tensor | None:
        """What the attention sublayer of layer `l` adds to the stream x [N, hidden]."""
        part = self.layers[l].attention
        if part is None:
            return None
        heads = part.heads + part.kv_heads
        rows = part.qkv(self.normalise(x, part.norm)).view(len(x), heads + part.kv_heads, self.spec.head_dim)
        if part.q_norm is not None and part.k_norm is not None:
            q = self.normalise(rows[:, : part.heads], part.q_norm)
            rows = torch.cat([q, self.normalise(rows[:, part.heads : heads], part.k_norm), rows[:, heads:]], 1)
        qk = rotate(rows[:, :heads], *rotation)
        z = attend(l, part, qk[:, : part.heads], qk[:, part.heads :], rows[:, heads:])
        return tap("attention_out", l, part.o(tap("z", l, z.reshape(len(x), -1))))

    def mlp(self, l: int, x: Tensor, tap: Tap = see) -> Tensor | None:
        """What the MLP sublayer of layer `l` adds to the stream x [N, hidden]."""
        part = self.layers[l].mlp
        if part is None:
            return None
        gate, up = part.gate_up(self.normalise(x, part.norm)).chunk(2, -1)
        return tap("mlp_out", l, part.down(tap("act", l, self._activate(gate) * up)))

    def layer(self, l: int, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, tap: Tap = see) -> Tensor:
        """The float32 stream after layer `l`."""
        x = tap("stream", l, x)
        x = tap("stream_mid", l, add(x, self.attention(l, x, rotation, attend, tap)))
        return tap("stream_out", l, add(x, self.mlp(l, x, tap)))

    def streams(self, tokens: Tensor, positions: Tensor, attend: Attend, tap: Tap = see) -> Tensor:
        """The float32 stream [N, hidden] after the last layer, for int64 tokens and positions [N]."""
        x = self.embed[tokens].float()
        rotation = self.rotation(positions)
        for l in range(len(self.layers)):
            if self.devices and x.device != self.devices[l]:
                x, rotation = x.to(self.devices[l]), (rotation[0].to(self.devices[l]), rotation[1].to(self.devices[l]))
            x = self.layer(l, x, rotation, attend, tap)
        return x.to(self.final_norm.device)

    def logits(self, x: Tensor, tap: Tap = see) -> Tensor:
        """float32 [R, head rows] of the stream [R, hidden]."""
        return self.head(tap("final", len(self.layers), self.normalise(x, self.final_norm))).float()

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, computed in float32, given in the compute dtype."""
        return F.rms_norm(x.float(), weight.shape, weight, self.spec.norm_eps).to(self.dtype)


def add(x: Tensor, part: Tensor | None) -> Tensor:
    """The stream with a sublayer's part; a dropped sublayer adds nothing."""
    return x if part is None else x + part


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rope on the first rotary_dim elements of x [N, heads, D], in float32, given in x's dtype."""
    rotary = cos.shape[-1]
    part = x if rotary == x.shape[-1] else x[..., :rotary]
    turned = torch.addcmul(part * cos, part.roll(rotary // 2, -1), signed_sin).to(x.dtype)
    return turned if part is x else torch.cat([turned, x[..., rotary:]], -1)


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: q [S, n, H, D], k and v [S, K, c, D], boolean mask [S or 1, n, c] -> [S, n, H, D].

    The query heads of one key/value head become extra query rows, so that no key or value is ever repeated in memory.
    """
    s, n, heads, d = q.shape
    kv = k.shape[1]
    rows = q.reshape(s, n, kv, heads // kv, d).transpose(1, 2).reshape(s, kv, -1, d)
    if mask is not None:
        mask = mask.repeat_interleave(heads // kv, 1)[:, None]
    mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return mixed.view(s, kv, n, heads // kv, d).transpose(1, 2).reshape(s, n, heads, d)


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a query position may read a key position: int64 [..., n] and [c] -> bool [..., n, c]."""
    distance = queries[..., :, None] - keys
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


class DenseAttend:
    """Attention of `sequences` texts of `length` tokens each, without a cache: for tracing and fitting."""

    def __init__(self, sequences: int, length: int, device: torch.device | str = "cpu") -> None:
        self.shape = (sequences, length)
        self._places = torch.arange(length, device=device)

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(*self.shape, *t.shape[1:]) for t in (q, k, v))
        mask = causal_mask(self._places, self._places, attention.window)[None]
        return mix(q, k.transpose(1, 2), v.transpose(1, 2), mask).flatten(0, 1)
