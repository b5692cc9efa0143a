"""Masked runs: the model with only the edges of a set, many sets of one prompt in one batch (paper, section 4).

An absent edge is cut where its vector arises: attention at its pattern after the softmax, which is not normalised
again; the MLP at its output; the residual at its skip term. All else is recomputed. With `Means` an absent edge carries
what it carries on average instead of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from strace.decoder import Attention, Decoder, DenseAttend, causal_mask
from strace.edges import attention_pattern, split_targets
from strace.extract import Booleans, Integers, StepMask, Traces, pairs

CONTROLS = ("trace", "trace+residuals", "inverse", "inverse+residuals", "random", "random+residuals")
_BATCH_TOKENS = 4096  # positions run at once, over all sets
_CHUNK = 1 << 24  # elements of a pattern [sets, heads, targets, sources] held at once


class Masks(Protocol):
    """Which edges are on in each of `len` sets."""

    def __len__(self) -> int: ...

    def step(self, number: int, rows: slice) -> StepMask:
        """The masks of one step (`extract.Step`) for the sets in `rows`."""


@dataclass(frozen=True)
class Selection:
    """One edge set: a control of `CONTROLS` made from the trace (or the random growth) of `count` edges.

    `inverse` is the complement of the trace; `+residuals` adds every residual edge, as the paper does for its controls,
    which are then larger than the trace.
    """

    control: str
    count: int


@dataclass(frozen=True)
class Selections:
    """The masks of `chosen` sets over one prompt's traces and its random growth."""

    traces: Traces
    random: Traces
    chosen: Sequence[Selection]

    def __len__(self) -> int:
        return len(self.chosen)

    def step(self, number: int, rows: slice) -> StepMask:
        chosen = self.chosen[rows]
        counts = sorted({s.count for s in chosen})
        at = [counts.index(s.count) for s in chosen]
        # The last one is the whole graph: a complement holds no edge from which the output cannot be reached.
        traced, grown = self.traces.masks(number, [*counts, self.traces.total]), self.random.masks(number, counts)
        random, inverse, free = (
            np.array([test(s.control) for s in chosen])
            for test in (
                lambda name: name.startswith("random"),
                lambda name: name.startswith("inverse"),
                lambda name: name.endswith("+residuals"),
            )
        )

        def choose(trace: Booleans | None, growth: Booleans | None) -> Booleans | None:
            if trace is None or growth is None:
                return None
            along = (-1,) + (1,) * (trace.ndim - 1)
            taken: Booleans = np.where(random.reshape(along), growth[at], trace[at])
            return taken ^ (inverse.reshape(along) & trace[-1])

        residual = choose(traced.residual, grown.residual)
        assert residual is not None
        return StepMask(
            residual | free[:, None], choose(traced.attention, grown.attention), choose(traced.mlp, grown.mlp)
        )

    def count(self, counted: dict[str, Composition]) -> list[int]:
        """Edges of every set, from the composition of the traces (`trace`) and the random growth (`random`)."""
        found = []
        for selection in self.chosen:
            name = "random" if selection.control.startswith("random") else "trace"
            composition = counted[name]
            edges, residuals = selection.count, int(composition.residual_of(selection.count))
            if selection.control.startswith("inverse"):
                edges, residuals = self.traces.total - edges, composition.residuals - residuals
            found.append(edges + (composition.residuals - residuals if "+" in selection.control else 0))
        return found


@dataclass(frozen=True)
class Composition:
    """Edges of B traces by component: attention [B, L, H], mlp [B, L], residual [B, steps]; `residuals` of all E."""

    counts: list[int]
    attention: Integers
    mlp: Integers
    residual: Integers
    residuals: int

    def residual_of(self, count: int) -> int:
        """Residual edges in the trace of `count` edges."""
        return int(self.residual[self.counts.index(count)].sum())


def compose(traces: Traces, counts: Sequence[int]) -> Composition:
    """Count the edges of the traces of `counts` edges by component."""
    weights = traces.weights
    asked = [*counts, traces.total]
    attention = np.zeros((len(asked), weights.layers, weights.heads), np.int64)
    mlp = np.zeros((len(asked), weights.layers), np.int64)
    residual = np.zeros((len(asked), len(weights.steps)), np.int64)
    for number, step in enumerate(weights.steps):
        mask = traces.masks(number, asked)
        residual[:, number] = mask.residual.sum(1)
        if mask.attention is not None:
            attention[:, step.layer] = mask.attention.sum(2)
        if mask.mlp is not None:
            mlp[:, step.layer] = mask.mlp.sum(1)
    return Composition(list(counts), attention[:-1], mlp[:-1], residual[:-1], int(residual[-1].sum()))


@dataclass(frozen=True)
class Means:
    """What edges carry on average over positions of full runs, float32: per step the stream [hidden] that the residual
    skips with and the MLP's output; per layer the values [K, D] of its heads."""

    residual: list[Tensor]
    mlp: list[Tensor | None]
    values: list[Tensor]


@dataclass(frozen=True)
class Outcome:
    """Of each of B sets, at the last position, float32 on the CPU: logits [B, V], and states [B, L, hidden], the stream
    after every layer."""

    logits: Tensor
    states: Tensor


class _Masked(DenseAttend):
    """Attention and tap of one batch of masked runs. Steps come in order: the pattern and the MLP are cut in the step
    that is open, which closes where the decoder shows the stream at its end."""

    def __init__(self, masks: Masks | None, rows: slice, shape: tuple[int, int], means: Means | None) -> None:
        super().__init__(*shape)
        self._masks, self._rows, self._means = masks, rows, means
        self._number = -1
        self._mask: StepMask | None = None
        self._added: list[Tensor] = []
        self._on = torch.empty(0)
        self.states: list[Tensor] = []

    def _open(self) -> None:
        self._number += 1
        self._mask = None if self._masks is None else self._masks.step(self._number, self._rows)
        self._added = []

    def __call__(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(*self.shape, *t.shape[1:]) for t in (q, k, v))
        values = v.float().transpose(1, 2).repeat_interleave(attention.heads // attention.kv_heads, 1)
        mask = causal_mask(self._places, self._places, attention.window).to(q.device)
        on = None
        if self._mask is not None and self._mask.attention is not None:
            on = unpack_pairs(self._mask.attention, self.shape[1]).to(q.device)
        mixed = torch.empty_like(q)
        for some in split_targets(self.shape[1], attention.heads * self.shape[0] * self.shape[1], _CHUNK):
            end = some.stop
            alpha = attention_pattern(attention, q[:, some], k[:, :end], mask[some, :end])
            kept = (alpha if on is None else alpha * on[:, :, some, :end]) @ values[:, :, :end]
            if on is not None and self._means is not None:
                mean = self._means.values[layer].to(q.device).repeat_interleave(values.shape[1] // v.shape[2], 0)
                kept += (alpha * ~on[:, :, some, :end]).sum(-1, keepdim=True) * mean[:, None]
            mixed[:, some] = kept.transpose(1, 2).to(mixed.dtype)
        return mixed.flatten(0, 1)

    def tap(self, name: str, layer: int, value: Tensor) -> Tensor:
        """Cuts MLP and residual edges, and leaves the MLP out where its edge is cut; see `decoder.Tap`."""
        if name == "stream":
            self._open()
        elif name == "attention_out":
            self._added.append(value.float())
        elif name == "mlp_in":
            if self._mask is not None and self._mask.mlp is not None:
                self._on = torch.from_numpy(self._mask.mlp).flatten().nonzero()[:, 0].to(value.device)
                value = value[self._on]
        elif name == "mlp_out":
            if self._mask is not None and self._mask.mlp is not None:
                whole = value.new_zeros(self.shape[0] * self.shape[1], value.shape[1])
                mean = None if self._means is None else self._means.mlp[self._number]
                if mean is not None:
                    whole += mean.to(whole.device, whole.dtype)
                value = whole.index_copy_(0, self._on, value)
            self._added.append(value.float())
        elif name in ("stream_mid", "stream_out"):
            if self._mask is not None:
                without = torch.stack(self._added).sum(0)
                if self._means is not None:
                    without = without + self._means.residual[self._number].to(value.device)
                value = _keep(self._mask.residual, value, without)
            if name == "stream_mid":
                self._open()
            else:
                self.states.append(value.view(*self.shape, -1)[:, -1].float().cpu())
        return value


def _keep(mask: Booleans, value: Tensor, otherwise: Tensor) -> Tensor:
    """`value` [B * T, hidden] where its edge is on, else `otherwise`."""
    on = torch.from_numpy(mask).flatten().to(value.device)
    return torch.where(on[:, None], value, otherwise.to(value.device, value.dtype))


def unpack_pairs(packed: Booleans, tokens: int) -> Tensor:
    """bool [B, H, P] over `extract.pairs` -> [B, H, T, T], False above the diagonal."""
    rows, columns = pairs(tokens)
    square = torch.zeros(*packed.shape[:2], tokens * tokens, dtype=torch.bool)
    square[..., torch.from_numpy(rows * tokens + columns)] = torch.from_numpy(packed)
    return square.view(*packed.shape[:2], tokens, tokens)


@torch.inference_mode()
def run_masked(decoder: Decoder, tokens: Tensor, masks: Masks | None, means: Means | None = None) -> Outcome:
    """Run int64 `tokens` [T] once per set of `masks` (None: one full run, through the same arithmetic)."""
    sets = 1 if masks is None else len(masks)
    few = max(1, _BATCH_TOKENS // len(tokens))
    parts = [_run_batch(decoder, tokens, masks, slice(at, min(at + few, sets)), means) for at in range(0, sets, few)]
    return Outcome(torch.cat([p.logits for p in parts]), torch.cat([p.states for p in parts]))


def _run_batch(decoder: Decoder, tokens: Tensor, masks: Masks | None, rows: slice, means: Means | None) -> Outcome:
    shape = (rows.stop - rows.start, len(tokens))
    masked = _Masked(masks, rows, shape, means)
    device = decoder.embed.device
    repeated, positions = tokens.repeat(shape[0]).to(device), torch.arange(shape[1]).repeat(shape[0]).to(device)
    stream = decoder.streams(repeated, positions, masked, masked.tap)
    logits = decoder.logits(stream.view(*shape, -1)[:, -1])
    return Outcome(logits.cpu(), torch.stack(masked.states, 1))


@torch.inference_mode()
def measure_means(decoder: Decoder, prompts: Iterable[Tensor]) -> Means:
    """`Means` over all positions of full runs of `prompts`, int64 [T] each."""
    sums = _Sums()
    for tokens in prompts:
        sums.begin(len(tokens), decoder.embed.device)
        positions = torch.arange(len(tokens), device=decoder.embed.device)
        decoder.streams(tokens.to(decoder.embed.device), positions, sums.attend, sums.tap)
    if not sums.positions:
        raise ValueError("means need at least one prompt")
    n = sums.positions
    return Means(
        [total / n for total in sums.residual],
        [None if total is None else total / n for total in sums.mlp],
        [total / n for total in sums.values],
    )


class _Sums:
    """Running sums for `measure_means`, by step as in `_Masked`."""

    def __init__(self) -> None:
        self.positions = 0
        self.residual: list[Tensor] = []
        self.mlp: list[Tensor | None] = []
        self.values: list[Tensor] = []
        self._stream = torch.zeros(0)
        self._mlp: Tensor | None = None
        self._number = 0

    def begin(self, length: int, device: torch.device) -> None:
        """Start a prompt of `length` tokens."""
        self.positions += length
        self._number = 0
        self._dense = DenseAttend(1, length, device)

    def attend(self, layer: int, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense attention that adds up its values."""
        if layer == len(self.values):
            self.values.append(torch.zeros_like(v[0], dtype=torch.float32))
        self.values[layer] += v.float().sum(0)
        return self._dense(layer, attention, q, k, v)

    def tap(self, name: str, layer: int, value: Tensor) -> Tensor:
        """Adds up the stream at every level and the MLP's output."""
        if name == "stream":
            self._stream = value.float().sum(0)
        elif name == "mlp_out":
            self._mlp = value.float().sum(0)
        elif name in ("stream_mid", "stream_out"):
            if self._number == len(self.residual):
                self.residual.append(torch.zeros_like(self._stream))
                self.mlp.append(None if self._mlp is None else torch.zeros_like(self._mlp))
            self.residual[self._number] += self._stream
            sums = self.mlp[self._number]
            if sums is not None and self._mlp is not None:
                sums += self._mlp
            self._stream, self._mlp = value.float().sum(0), None
            self._number += 1
        return value
