"""The one decoder-only transformer: full models and subgraphs alike, from a `Spec` and weights.

It is functional and knows nothing of where keys and values are kept: an `Attend` strategy takes each layer's q, k, v
and gives the mixed values back (paged cache when serving, dense when tracing). The residual stream is float32 whatever
the dtype of the weights; products take and give the compute dtype. A subgraph is the same structure with fewer heads,
neurons, sublayers and head rows, and other formats.

Shapes: N tokens of any number of sequences, concatenated; H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Norm:
    """RMSNorm (`rms`) or LayerNorm (`layer`) over the last dimension; weight and bias float32 [size]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        """float32, like x."""
        if self.kind == "layer":
            return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def device(self) -> torch.device:
        return self.weight.device


@dataclass
class Sublayer:
    """What attention and MLP share: a norm of what they read, a `post_norm` of what they add, or both."""

    norm: Norm | None
    post_norm: Norm | None

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in vars(self).values() if isinstance(part, Norm | Linear))

    @property
    def device(self) -> torch.device:
        norm = self.norm or self.post_norm
        assert norm is not None, "a sublayer has a norm before it, after it or both"
        return norm.device


@dataclass
class Attention(Sublayer):
    """One attention sublayer, or what a subgraph keeps of it.

    `qkv` stacks the kept query, key and value heads' rows. `kept` holds the numbers of its key/value heads in the full
    model (None: all), by which it finds them in the full model's cache. `q_norm` and `k_norm` have the size of one head
    (each is normalised by itself) or of all heads (OLMo-2: all at once; those that a subgraph keeps are then normalised
    among themselves, which is an approximation). `scale` and `cap` are those of the scores, `rope` the number of the
    rope table.
    """

    qkv: Linear
    o: Linear
    heads: int
    kv_heads: int
    scale: float
    cap: float = 0.0
    window: int | None = None
    rope: int = 0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    kept: Tensor | None = None


@dataclass
class MLP(Sublayer):
    """One MLP sublayer, or the neurons that a subgraph keeps. `inner` stacks the gate's rows over the up rows; one that
    is not `gated` has the up rows alone."""

    inner: Linear
    down: Linear
    gated: bool = True


@dataclass
class Layer:
    """A sublayer that a subgraph drops whole is None and costs nothing."""

    attention: Attention | None
    mlp: MLP | None

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in (self.attention, self.mlp) if part is not None)

    @property
    def device(self) -> torch.device:
        """Of a layer that has a sublayer left."""
        part = self.attention or self.mlp
        assert part is not None
        return part.device


Ropes = tuple[Tensor, Tensor]


class Attend(Protocol):
    """Mixes values: q [N, H, D], k and v [N, K, D] after rope -> [N, H, D]."""

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Tap(Protocol):
    """Sees an activation by name and layer, and gives back what the decoder goes on with (usually the same tensor).

    Names, in order: stream [N, hidden] before attention; z [N, H * D]; attention_out; stream_mid; mlp_in (a tap may
    keep some rows only, and give them back among N at mlp_out); act [N, neurons]; mlp_out; stream_out; after the last
    layer, final [N, hidden], the normalised stream. `attention_out` and `mlp_out` are what is added to the stream, past
    a post-norm. A parallel block has no stream_mid.
    """

    def __call__(self, name: str, layer: int, value: Tensor) -> Tensor: ...


def see(name: str, layer: int, value: Tensor) -> Tensor:
    """The tap that only looks away."""
    return value


@dataclass
class Decoder:
    """Weights and arithmetic of one model or subgraph.

    `position_embed` holds learned positions, float32 [context, hidden]. `token_ids` maps the rows of a short head to
    the vocabulary (None: all rows, in order). `coverage` is the share of the full model's probability that falls on
    those rows, by which a short head's confidence is corrected. `ropes`: cos and signed sin [rope tables, context,
    rotary_dim], made where none are given, and shared by all that is cut from the model: a long context has large ones.
    """

    spec: Spec
    embed: Tensor
    layers: Sequence[Layer]
    final_norm: Norm
    head: Linear
    dtype: torch.dtype
    position_embed: Tensor | None = None
    token_ids: Tensor | None = None
    coverage: float = 1.0
    devices: list[torch.device] = field(default_factory=list)
    ropes: Ropes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._activate = _ACTIVATIONS[self.spec.activation]
        if self.ropes is None:
            self.ropes = self._make_ropes()

    def _make_ropes(self) -> Ropes:
        tables = self.spec.inverse_frequencies
        frequencies = torch.stack(tables) if tables else torch.empty(0, 0)
        half = torch.arange(self.spec.context).float()[:, None] * frequencies[:, None]
        scaling = torch.tensor(self.spec.rope_scalings)[:, None, None]
        cos, sin = half.cos() * scaling, half.sin() * scaling
        device = self.embed.device
        return torch.cat([cos, cos], -1).to(device), torch.cat([-sin, sin], -1).to(device)

    @property
    def bytes_per_step(self) -> int:
        """All weights, scales, biases and head rows read for one token, without KV; one embedding row."""
        embedded = self.embed[0].nbytes + (0 if self.position_embed is None else self.position_embed[0].nbytes)
        layers = sum(layer.bytes for layer in self.layers)
        return layers + self.final_norm.bytes + self.head.bytes + embedded

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The float32 stream [N, hidden] before the first layer, for int64 tokens and positions [N]."""
        x = self.embed[tokens].float() * self.spec.embed_scale
        return x if self.position_embed is None else x + self.position_embed[positions]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [rope tables, N, 1, rotary_dim] at int64 positions [N]."""
        assert self.ropes is not None, "made with the decoder"
        cos, signed_sin = self.ropes
        return cos[:, positions, None], signed_sin[:, positions, None]

    def attention(
        self, l: int, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, tap: Tap = see
    ) -> Tensor | None:
        """What the attention sublayer of layer `l` adds to the stream x [N, hidden]."""
        part = self.layers[l].attention
        if part is None:
            return None
        heads = part.heads + part.kv_heads
        rows = part.qkv(self.normalise(x, part.norm)).view(len(x), heads + part.kv_heads, self.spec.head_dim)
        qk, v = rows[:, :heads], rows[:, heads:]
        if part.q_norm is not None and part.k_norm is not None:
            q = normalise_heads(qk[:, : part.heads], part.q_norm)
            qk = torch.cat([q, normalise_heads(qk[:, part.heads :], part.k_norm)], 1).to(self.dtype)
        if self.spec.rotary_dim:
            qk = rotate(qk, rotation[0][part.rope], rotation[1][part.rope])
        z = attend(l, part, qk[:, : part.heads], qk[:, part.heads :], v)
        return tap("attention_out", l, normalise_part(part.o(tap("z", l, z.reshape(len(x), -1))), part))

    def mlp(self, l: int, x: Tensor, tap: Tap = see) -> Tensor | None:
        """What the MLP sublayer of layer `l` adds to the stream x [N, hidden]."""
        part = self.layers[l].mlp
        if part is None:
            return None
        inner = part.inner(self.normalise(tap("mlp_in", l, x), part.norm))
        if part.gated:
            gate, up = inner.chunk(2, -1)
            act = self._activate(gate) * up
        else:
            act = self._activate(inner)
        return tap("mlp_out", l, normalise_part(part.down(tap("act", l, act)), part))

    def layer(self, l: int, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, tap: Tap = see) -> Tensor:
        """The float32 stream after layer `l`."""
        x = tap("stream", l, x)
        middle = add(x, self.attention(l, x, rotation, attend, tap))
        if self.spec.parallel:
            return tap("stream_out", l, add(middle, self.mlp(l, x, tap)))
        middle = tap("stream_mid", l, middle)
        return tap("stream_out", l, add(middle, self.mlp(l, middle, tap)))

    def streams(self, tokens: Tensor, positions: Tensor, attend: Attend, tap: Tap = see) -> Tensor:
        """The float32 stream [N, hidden] after the last layer, for int64 tokens and positions [N]."""
        [x] = deque(self.walk(tokens, positions, attend, tap), maxlen=1)
        return x.to(self.final_norm.device)

    def walk(self, tokens: Tensor, positions: Tensor, attend: Attend, tap: Tap = see) -> Iterator[Tensor]:
        """The float32 stream [N, hidden] after every layer in turn, for int64 tokens and positions [N]."""
        x = self.embedded(tokens, positions)
        rotation = self.rotation(positions)
        for l in range(len(self.layers)):
            if self.devices and x.device != self.devices[l]:
                x, rotation = x.to(self.devices[l]), (rotation[0].to(self.devices[l]), rotation[1].to(self.devices[l]))
            x = self.layer(l, x, rotation, attend, tap)
            yield x

    def logits(self, x: Tensor, tap: Tap = see) -> Tensor:
        """float32 [R, head rows] of the stream [R, hidden]."""
        logits = self.head(tap("final", len(self.layers), self.normalise(x, self.final_norm))).float()
        return soft_cap(logits, self.spec.logit_cap)

    def normalise(self, x: Tensor, norm: Norm | None) -> Tensor:
        """What a product reads of the float32 stream x, in the compute dtype."""
        return (x if norm is None else norm(x)).to(self.dtype)


def normalise_heads(x: Tensor, norm: Norm) -> Tensor:
    """float32, like x [N, heads, D]: each head by itself or all at once, as the size of the norm says."""
    return norm(x.reshape(len(x), -1, len(norm.weight))).view(x.shape)


def normalise_part(x: Tensor, part: Sublayer) -> Tensor:
    """What a sublayer adds to the stream, from its output projection's result."""
    return x if part.post_norm is None else part.post_norm(x)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x, bounded by `cap` (0: not)."""
    return cap * torch.tanh(x / cap) if cap else x


def add(x: Tensor, part: Tensor | None) -> Tensor:
    """The stream with a sublayer's part; a dropped sublayer adds nothing."""
    return x if part is None else x + part


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rope on the first rotary_dim elements of x [N, heads, D], in float32, given in x's dtype."""
    rotary = cos.shape[-1]
    part = x if rotary == x.shape[-1] else x[..., :rotary]
    turned = torch.addcmul(part * cos, part.roll(rotary // 2, -1), signed_sin).to(x.dtype)
    return turned if part is x else torch.cat([turned, x[..., rotary:]], -1)


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, part: Attention) -> Tensor:
    """Grouped-query attention: q [S, n, H, D], k and v [S, K, c, D], boolean mask [S or 1, n, c] -> [S, n, H, D].

    The query heads of one key/value head become extra query rows, so that no key or value is ever repeated in memory.
    """
    s, n, heads, d = q.shape
    kv = k.shape[1]
    rows = q.reshape(s, n, kv, heads // kv, d).transpose(1, 2).reshape(s, kv, -1, d)
    if mask is not None:
        mask = mask.repeat_interleave(heads // kv, 1)[:, None]
    if part.cap:
        scores = soft_cap(rows.float() @ k.float().transpose(2, 3) * part.scale, part.cap)
        pattern = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        mixed = pattern.to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=part.scale)
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
        return mix(q, k.transpose(1, 2), v.transpose(1, 2), mask, attention).flatten(0, 1)
