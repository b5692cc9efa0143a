"""Edge weights of one prompt from one full run: what each edge brings to the node that it leads to (paper, section 3).

| measure | weight of edge e into node v, before it is divided by the sum over v's edges |
|---|---|
| l1 | `|z_e|_1`, the paper's |
| ifr | `max(|x_v|_1 - |x_v - z_e|_1, 0)`, the proximity of Information Flow Routes (arXiv:2403.00824) |
| random | nothing of the model: one uniform number per edge, and no division |
| flow | l1's, divided, times the flow that reaches v from the output: what all paths through e carry together |

An output projection's bias reaches its node whatever edges are cut, so it has no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from strace.decoder import Attention, Decoder, DenseAttend, Norm, causal_mask, mix
from strace.edges import attention_pattern, scale_rows, split_targets, target_scale
from strace.extract import EdgeWeights, Floats, Step, pairs
from strace.families import Spec

MEASURES = ("l1", "ifr", "random", "flow")
_CHUNK = 1 << 22  # elements of [heads, targets, sources], or for `ifr` [targets, sources, hidden], held at once
_TINY = torch.finfo(torch.float32).tiny


def weigh_edges(decoder: Decoder, tokens: Tensor, measure: str = "l1", seed: int = 0) -> EdgeWeights:
    """All edge weights of int64 `tokens` [T] by one of `MEASURES`, float32 in host memory; those into a node sum to 1
    (`l1`, `ifr`). On the device only a few targets' patterns are held at a time, so that memory beside the weights
    grows with T, not its square. Those of `flow` sum to 1 over each step instead.

    Raises:
        ValueError: for an unknown measure or an empty prompt.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown importance {measure!r}; choose one of {', '.join(MEASURES)}")
    if not len(tokens):
        raise ValueError("an empty prompt has no edges")
    if measure == "random":
        return draw_weights(decoder.spec, len(tokens), seed)
    if measure == "flow":
        return carry_flow(_measure(decoder, tokens.to(decoder.embed.device), "l1"))
    return _measure(decoder, tokens.to(decoder.embed.device), measure)


@torch.inference_mode()
def _measure(decoder: Decoder, tokens: Tensor, measure: str) -> EdgeWeights:
    steps: list[Step] = []
    positions = torch.arange(len(tokens), device=tokens.device)
    rotation = decoder.rotation(positions)
    stream = decoder.embedded(tokens, positions)
    for l, layer in enumerate(decoder.layers):
        stream, rotation = stream.to(layer.device), (rotation[0].to(layer.device), rotation[1].to(layer.device))
        made, stream = _weigh_layer(decoder, l, stream, rotation, measure)
        steps += made
    return EdgeWeights(tuple(steps), len(tokens))


def _weigh_layer(
    decoder: Decoder, l: int, stream: Tensor, rotation: tuple[Tensor, Tensor], measure: str
) -> tuple[list[Step], Tensor]:
    """The steps of layer `l`, whose input is the float32 stream [T, hidden], and the stream after it."""
    seen: dict[str, Tensor] = {}

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    attend = _KeepAttend(1, len(stream), stream.device)
    after = decoder.layer(l, stream, rotation, attend, tap)
    part = decoder.layers[l].attention
    assert part is not None, "edges are weighed of full models"
    # The last level is read through the final norm, linear at the full run's statistics: its scale cancels in the
    # weights, its direction does not.
    read = partial(_read_out, decoder.final_norm) if l == decoder.spec.layers - 1 else _read_plainly
    out, mlp = read(after), read(seen["mlp_out"].float())
    if decoder.spec.parallel:
        heads = _Heads(part, attend, seen["z"], read)
        (residual, added), attention = _weigh_level(measure, out, [read(stream), mlp], heads)
        return [Step(l, residual, attention, added)], after
    middle, heads = seen["stream_mid"], _Heads(part, attend, seen["z"], _read_plainly)
    (residual,), attention = _weigh_level(measure, middle, [stream], heads)
    (skipped, added), _ = _weigh_level(measure, out, [read(middle), mlp])
    return [Step(l, residual, attention), Step(l, skipped, mlp=added)], after


def _read_out(norm: Norm, x: Tensor) -> Tensor:
    """What the final norm's direction makes of vectors [..., hidden]: LayerNorm takes their mean off, either multiplies
    by gamma."""
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    return centred * norm.weight.to(x.device)


def _read_plainly(x: Tensor) -> Tensor:
    return x


class _KeepAttend(DenseAttend):
    """As `DenseAttend` for one text, a few targets at a time, keeping q, k and v [T, heads, D] of the latest layer."""

    q: Tensor
    k: Tensor
    v: Tensor

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.q, self.k, self.v = q, k, v
        mixed = torch.empty_like(q)
        for some in split_targets(len(q), len(q) * attention.heads, _CHUNK):
            mask = self._mask(attention, some)[None]
            keys, values = (x[None, : some.stop].transpose(1, 2) for x in (k, v))
            mixed[some] = mix(q[None, some], keys, values, mask, attention)[0]
        return mixed

    def pattern(self, attention: Attention, some: slice) -> Tensor:
        """float32 [H, n, end]: the pattern of the n targets `some`, over the sources up to the last of them."""
        q, k = self.q[None, some], self.k[None, : some.stop]
        return attention_pattern(attention, q, k, self._mask(attention, some))[0]

    def _mask(self, attention: Attention, some: slice) -> Tensor:
        return causal_mask(self._places[some], self._places[: some.stop], attention.window)


class _Heads:
    """The attention edges of one layer: their vectors are `alpha * vectors(h)`, as `read` sees them."""

    def __init__(self, part: Attention, attend: _KeepAttend, z: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        self.part, self.attend = part, attend
        self._scale = target_scale(part, z)[:, None]
        self._rows = read(scale_rows(part.o.dense(), part.post_norm).T).unflatten(0, (part.heads, -1))

    def vectors(self, h: int) -> Tensor:
        """float32 [T, hidden]: `W_O^h v` of query head h; with a post-norm `gamma * W_O^h v`."""
        return self.attend.v[:, h * self.part.kv_heads // self.part.heads].float() @ self._rows[h]

    def raw_weights(self, measure: str, nodes: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """A few targets at a time with the weights [H, n, end] of their edges, not yet divided; `nodes` [T, hidden]."""
        if measure == "l1":  # exact, alpha being a number that is not negative
            norms = torch.stack([_l1(self.vectors(h)) for h in range(self.part.heads)])
        for some in split_targets(len(nodes), len(nodes) * self.part.heads, _CHUNK):
            alpha = self.attend.pattern(self.part, some) * self._scale[some]
            if measure == "l1":
                yield some, alpha * norms[:, None, : some.stop]
            else:
                yield some, self._proximity(alpha, nodes[some])

    def _proximity(self, alpha: Tensor, nodes: Tensor) -> Tensor:
        """[H, n, end], like alpha, for the nodes [n, hidden]."""
        found = torch.empty_like(alpha)
        for h in range(self.part.heads):
            vectors = self.vectors(h)[: alpha.shape[2]]
            for few in split_targets(len(nodes), vectors.numel(), _CHUNK):
                found[h, few] = _proximity(alpha[h, few, :, None] * vectors, nodes[few, None])
        return found


def _weigh_level(
    measure: str, nodes: Tensor, singles: Sequence[Tensor], heads: _Heads | None = None
) -> tuple[list[Floats], Floats | None]:
    """Weights of all edges into the nodes [T, hidden] of one level: those [T] of each of `singles` [T, hidden], and
    those [H, P] of attention, -inf where a sliding window leaves no edge."""
    raw = [_l1(vectors) if measure == "l1" else _proximity(vectors, nodes) for vectors in singles]
    total, packed = torch.stack(raw).sum(0), None
    if heads is not None:
        rows, columns = pairs(len(nodes))
        packed = np.empty((heads.part.heads, len(rows)), np.float32)
        for some, weights in heads.raw_weights(measure, nodes):
            total[some] += weights.sum((0, 2))
            weights /= total[some].clamp_min(_TINY)[:, None]
            here = slice(*np.searchsorted(rows, [some.start, some.stop]))
            places = torch.from_numpy((rows[here] - some.start) * some.stop + columns[here])
            packed[:, here] = _host(weights.flatten(1)[:, places.to(weights.device)])
        if heads.part.window is not None:
            packed[:, rows - columns >= heads.part.window] = -np.inf
    return [_host(x / total.clamp_min(_TINY)) for x in raw], packed


def _l1(x: Tensor) -> Tensor:
    return x.abs().sum(-1)


def _proximity(vectors: Tensor, node: Tensor) -> Tensor:
    """`max(|x|_1 - |x - z|_1, 0)`, element by element and without x - z, in which a small z would drown."""
    along = torch.where(node < 0, -vectors, vectors)
    return torch.minimum(along, 2 * node.abs() - along).sum(-1).clamp_min(0)


def _host(x: Tensor) -> Floats:
    """float32 in [0, 1]: the quotient of a part and its sum may round to just above 1."""
    return x.clamp(0, 1).cpu().numpy()


def draw_weights(spec: Spec, tokens: int, seed: int | Sequence[int] = 0) -> EdgeWeights:
    """One uniform weight per edge, whatever node it leads to, for random connected growth.

    They are not divided by their sum over a node: that would favour nodes of few edges, which are the early positions.
    """
    generator = np.random.default_rng(seed)
    rows, columns = pairs(tokens)

    def draw(*shape: int) -> Floats:
        return generator.random(shape, np.float32)

    steps: list[Step] = []
    for l, window in enumerate(spec.window):
        residual, attention = draw(tokens), draw(spec.heads, len(rows))
        if window is not None:
            attention[:, rows - columns >= window] = -np.inf
        if spec.parallel:
            steps.append(Step(l, residual, attention, draw(tokens)))
        else:
            steps += [Step(l, residual, attention), Step(l, draw(tokens), mlp=draw(tokens))]
    return EdgeWeights(tuple(steps), tokens)


def carry_flow(weights: EdgeWeights) -> EdgeWeights:
    """The same edges by the share of the output that passes them: 1 starts at the output node and divides by the
    weights into each node, so that an edge holds the sum over all paths through it of the products of their weights.

    The paper grows traces by local weights, which know no distance from the output; these are held against them.
    """
    rows, columns = pairs(weights.tokens)
    flow = np.zeros(weights.tokens)
    flow[-1] = 1
    steps: list[Step] = []
    for step in reversed(weights.steps):
        residual, attention, mlp = flow * step.residual, None, None
        below = residual.copy()
        if step.mlp is not None:
            mlp = (flow * step.mlp).astype(np.float32)
            below += mlp
        if step.attention is not None:
            attention = np.maximum(step.attention, 0) * flow[rows].astype(np.float32)
            below += np.bincount(columns, attention.sum(0, dtype=np.float64), weights.tokens)
            attention[np.isneginf(step.attention)] = -np.inf  # outside a sliding window there is no edge
        steps.append(Step(step.layer, residual.astype(np.float32), attention, mlp))
        flow = below
    return EdgeWeights(tuple(reversed(steps)), weights.tokens)
