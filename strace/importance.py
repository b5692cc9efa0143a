"""Edge weights of one prompt from one full run: what each edge brings to the node that it leads to (paper, section 3).

| measure | weight of edge e into node v, before it is divided by the sum over v's edges |
|---|---|
| l1 | `|z_e|_1`, the paper's |
| ifr | `max(|x_v|_1 - |x_v - z_e|_1, 0)`, the proximity of Information Flow Routes (arXiv:2403.00824) |
| random | nothing of the model: one uniform number per edge, and no division |

An output projection's bias reaches its node whatever edges are cut, so it has no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strace.decoder import Attention, Decoder, DenseAttend, Norm
from strace.edges import PatternAttend, layer_edges, scale_rows, target_scale
from strace.extract import EdgeWeights, Floats, Step, pairs
from strace.families import UnsupportedModel

MEASURES = ("l1", "ifr", "random")
_CHUNK = 1 << 24  # elements of [targets, sources, hidden] held at once by `ifr`


@dataclass(frozen=True)
class FullRun:
    """The float32 states of one prompt of T tokens: `streams[l]` [T, hidden] before layer l; of the last layer also
    `middle`, the stream before its MLP, and `mlp`, what that adds."""

    streams: list[Tensor]
    middle: Tensor
    mlp: Tensor


@torch.inference_mode()
def run_full(decoder: Decoder, tokens: Tensor) -> FullRun:
    """Run int64 `tokens` [T], keeping what edge weights are made from."""
    streams: list[Tensor] = []
    last: dict[str, Tensor] = {}

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        if name == "stream":
            streams.append(value)
        elif layer == len(decoder.layers) - 1:
            last[name] = value
        return value

    device = decoder.embed.device
    decoder.streams(
        tokens.to(device), torch.arange(len(tokens), device=device), DenseAttend(1, len(tokens), device), tap
    )
    return FullRun(streams, last["stream_mid"], last["mlp_out"].float())


def weigh_edges(decoder: Decoder, tokens: Tensor, measure: str = "l1", seed: int = 0) -> EdgeWeights:
    """All edge weights of int64 `tokens` [T] by one of `MEASURES`, in host memory; those into a node sum to 1 (`l1`,
    `ifr`). One layer's attention is on the device at a time.

    Raises:
        ValueError: for an unknown measure or an empty prompt.
        UnsupportedModel: for parallel blocks.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown importance {measure!r}; choose one of {', '.join(MEASURES)}")
    if not len(tokens):
        raise ValueError("an empty prompt has no edges")
    if decoder.spec.parallel:
        raise UnsupportedModel(f"the edges of parallel blocks ({decoder.spec.family}) cannot be weighed yet")
    if measure == "random":
        return draw_weights(decoder.spec.layers, decoder.spec.heads, len(tokens), seed)
    return _measure(decoder, tokens, measure)


@torch.inference_mode()
def _measure(decoder: Decoder, tokens: Tensor, measure: str) -> EdgeWeights:
    run = run_full(decoder, tokens)
    weigh = _layer_l1 if measure == "l1" else _layer_ifr
    steps: list[Step] = []
    for l, stream in enumerate(run.streams):
        positions = torch.arange(len(tokens), device=decoder.embed.device)
        cos, sin = decoder.rotation(positions)
        steps += weigh(decoder, l, stream, (cos.to(stream.device), sin.to(stream.device)))
    # The output is read through the final norm, linear at the full run's statistics: its scale cancels, gamma does not.
    residual, mlp = (_read_out(decoder.final_norm, x[-1]) for x in (run.middle, run.mlp))
    shares = _shares(torch.stack([residual, mlp]), residual + mlp, measure)
    last = steps[-1]
    assert last.mlp is not None
    last.residual[-1], last.mlp[-1] = shares.tolist()
    return EdgeWeights(tuple(steps), len(tokens))


def _read_out(norm: Norm, x: Tensor) -> Tensor:
    """What the final norm's direction makes of a vector [hidden]: LayerNorm takes its mean off, either multiplies by
    gamma."""
    centred = x - x.mean() if norm.kind == "layer" else x
    return centred * norm.weight.to(x.device)


def _shares(vectors: Tensor, node: Tensor, measure: str) -> Tensor:
    """Weights [E] of the vectors [E, hidden] into one node."""
    raw = _l1(vectors) if measure == "l1" else _proximity(vectors, node)
    return raw / raw.sum().clamp_min(torch.finfo(raw.dtype).tiny)


def _l1(x: Tensor) -> Tensor:
    return x.abs().sum(-1)


def _proximity(vectors: Tensor, node: Tensor) -> Tensor:
    return (_l1(node) - _l1(node - vectors)).clamp_min(0)


def _layer_l1(decoder: Decoder, l: int, stream: Tensor, rotation: tuple[Tensor, Tensor]) -> list[Step]:
    edges = layer_edges(decoder, l, stream, rotation, (1, len(stream)))
    assert edges.mlp_residual is not None
    window = decoder.spec.window[l]
    return [
        Step(l, _host(edges.attention_residual[0]), attention=pack_pairs(edges.attention[0], window)),
        Step(l, _host(edges.mlp_residual[0]), mlp=_host(edges.mlp[0])),
    ]


def _layer_ifr(decoder: Decoder, l: int, stream: Tensor, rotation: tuple[Tensor, Tensor]) -> list[Step]:
    seen: dict[str, Tensor] = {}

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    attend = PatternAttend(1, len(stream), device=stream.device)
    decoder.layer(l, stream, rotation, attend, tap)
    part, middle, out = decoder.layers[l].attention, seen["stream_mid"], seen["stream_out"]
    assert part is not None
    alpha = attend.alpha[0] * target_scale(part, seen["z"])[:, None]
    attention = _attention_proximity(middle, alpha, attention_vectors(part, attend.v[0]))
    residual = _proximity(stream, middle)
    total = (residual + attention.sum((0, 2))).clamp_min(torch.finfo(torch.float32).tiny)
    mlp, skipped = _proximity(seen["mlp_out"].float(), out), _proximity(middle, out)
    both = (mlp + skipped).clamp_min(torch.finfo(torch.float32).tiny)
    window = decoder.spec.window[l]
    return [
        Step(l, _host(residual / total), attention=pack_pairs(attention / total[:, None], window)),
        Step(l, _host(skipped / both), mlp=_host(mlp / both)),
    ]


def attention_vectors(attention: Attention, v: Tensor) -> Tensor:
    """float32 [H, T, hidden]: `W_O^h v` of each query head, from the values v [K, T, D]; an edge's vector is alpha
    times this. With a post-norm `gamma * W_O^h v`, and alpha times `target_scale`."""
    per_head = scale_rows(attention.o.dense(), attention.post_norm).view(attention.o.shape[0], attention.heads, -1)
    values = v.float().repeat_interleave(attention.heads // attention.kv_heads, 0)
    return torch.einsum("htd,ohd->hto", values, per_head)


def _attention_proximity(node: Tensor, alpha: Tensor, vectors: Tensor) -> Tensor:
    """[H, T, T]: proximity of `alpha[h, i, j] * vectors[h, j]` to node [T, hidden] i, a few targets at a time."""
    found = torch.zeros_like(alpha)
    few = max(1, _CHUNK // vectors[0].numel())
    for h, per_source in enumerate(vectors):
        for start in range(0, len(node), few):
            end = min(start + few, len(node))
            edges = alpha[h, start:end, :end, None] * per_source[:end]
            found[h, start:end, :end] = _proximity(edges, node[start:end, None])
    return found


def pack_pairs(attention: Tensor, window: int | None = None) -> Floats:
    """[H, T, T] -> float32 [H, T(T+1)/2] over `extract.pairs`, -inf where a sliding window leaves no edge."""
    rows, columns = pairs(attention.shape[-1])
    packed = attention.flatten(1)[:, torch.from_numpy(rows * attention.shape[-1] + columns)]
    values = _host(packed)
    if window is not None:
        values[:, rows - columns >= window] = -np.inf
    return values


def _host(x: Tensor) -> Floats:
    """A writable float32 copy in [0, 1]: the quotient of a part and its sum may round to just above 1."""
    return x.float().clamp(0, 1).cpu().numpy().copy()


def draw_weights(layers: int, heads: int, tokens: int, seed: int | Sequence[int] = 0) -> EdgeWeights:
    """One uniform weight per edge, whatever node it leads to, for random connected growth.

    They are not divided by their sum over a node: that would favour nodes of few edges, which are the early positions.
    """
    generator = np.random.default_rng(seed)
    steps: list[Step] = []
    for l in range(layers):
        attention = generator.random((heads, tokens * (tokens + 1) // 2), np.float32)
        steps.append(Step(l, generator.random(tokens, np.float32), attention=attention))
        steps.append(Step(l, generator.random(tokens, np.float32), mlp=generator.random(tokens, np.float32)))
    return EdgeWeights(tuple(steps), tokens)
