"""Distillation: the codes, scales and biases of a rounded subgraph, trained so that its drafts are accepted more often.

The loss is the rejected share itself, the total variation to the full model's distributions at temperature 1, in the
regime of serving (blocks.py). Codes are trained as real numbers that every pass rounds, with the gradient carried
through as if it did not (straight-through, arXiv:1308.3432): the kept weights keep their format, and no byte is added.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from strace.blocks import BlockAttend, RecordAttend, random_starts
from strace.decoder import Decoder, Layer
from strace.linear import Codes, Linear
from strace.sampling import total_variation
from strace.texts import Texts

ROWS = 2048  # positions of a step; more are drawn from
RANGES = {"int4": (-8, 7), "int8": (-127, 127)}
# Most change per step: of a code, of the logarithm of a scale, of a bias.
RATES = {"codes": 0.02, "scales": 3e-4, "biases": 3e-4}


class Trained(Linear):
    """A quantised matrix whose codes, scales and bias learn."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        assert linear.codes is not None
        super().__init__(linear.codes, linear.bias, dtype)
        self.numbers = linear.codes.codes.float().requires_grad_()
        self.growth = torch.zeros_like(linear.codes.scales, dtype=torch.float32).requires_grad_()
        self.added = None if linear.bias is None else linear.bias.float().clone().requires_grad_()
        self._start = linear.codes.scales.float().clone()

    @property
    def scales(self) -> Tensor:
        return self._start * self.growth.exp()

    def __call__(self, x: Tensor) -> Tensor:
        assert self.codes is not None
        bounded = self.numbers.clamp(*RANGES[self.codes.format])
        codes = bounded + (bounded.round() - bounded).detach()
        n, groups = self.growth.shape
        weight = (codes.view(n, groups, -1) * self.scales[..., None]).view(self.numbers.shape)
        return F.linear(x, weight.to(x.dtype), None if self.added is None else self.added.to(x.dtype))

    def settle(self) -> Linear:
        """As it is served."""
        assert self.codes is not None
        with torch.no_grad():
            codes = self.numbers.clamp(*RANGES[self.codes.format]).round().to(torch.int8)
            bias = None if self.added is None or self.bias is None else self.added.to(self.bias.dtype)
            return Linear(Codes(self.codes.format, codes, self.scales.to(torch.bfloat16)), bias, self._dtype)


def map_linears(decoder: Decoder, change: Callable[[Linear], Linear]) -> Decoder:
    """A decoder with every matrix product but the embedding changed."""
    layers = []
    for layer in decoder.layers:
        a, m = layer.attention, layer.mlp
        attention = None if a is None else replace(a, qkv=change(a.qkv), o=change(a.o))
        layers.append(Layer(attention, None if m is None else replace(m, inner=change(m.inner), down=change(m.down))))
    return replace(decoder, layers=layers, head=change(decoder.head))


@dataclass(frozen=True)
class Distilled:
    """The trained subgraph, how many steps it took, and the loss of each."""

    subgraph: Decoder
    steps: int
    losses: list[float]


def distill(
    full: Decoder,
    subgraph: Decoder,
    batches: Sequence[Texts],
    seconds: float,
    seed: int = 0,
    watch: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.monotonic,
) -> Distilled:
    """Train for about so many seconds on texts, which shall be the full model's own; rates fall to nothing by then.

    `subgraph` must hold no inference tensor outside its matrices (one that was loaded holds none). watch: hears the
    share of the time that is gone.

    Raises:
        ValueError: where no matrix is quantised.
    """
    trained: list[Trained] = []

    def start(linear: Linear) -> Linear:
        if linear.codes is None:
            return linear
        trained.append(Trained(linear, full.dtype))
        return trained[-1]

    student = map_linears(subgraph, start)
    if not trained:
        raise ValueError("nothing to distill: no matrix is quantised")
    optimiser = torch.optim.Adam(_group_parameters(trained), betas=(0.9, 0.98))
    rates = [group["lr"] for group in optimiser.param_groups]
    generator, begun, losses = torch.Generator().manual_seed(seed), clock(), []
    while (gone := (clock() - begun) / seconds) < 1:
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * gone))
        texts = _draw_texts(batches, generator)
        optimiser.zero_grad()
        loss = measure_loss(full, student, texts, generator)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        watch(gone)
    settled = map_linears(student, lambda linear: linear.settle() if isinstance(linear, Trained) else linear)
    return Distilled(settled, len(losses), losses)


def _group_parameters(trained: Sequence[Trained]) -> list[dict[str, object]]:
    biases = [t.added for t in trained if t.added is not None]
    kinds = {"codes": [t.numbers for t in trained], "scales": [t.growth for t in trained], "biases": biases}
    return [{"params": tensors, "lr": RATES[kind]} for kind, tensors in kinds.items() if tensors]


def _draw_texts(batches: Sequence[Texts], generator: torch.Generator) -> Texts:
    """Some texts of one batch, about `ROWS` positions."""
    sizes = torch.tensor([float(batch.lengths.sum()) for batch in batches])
    batch = batches[int(torch.multinomial(sizes, 1, generator=generator))]
    count = max(1, ROWS // batch.shape[1])
    chosen = torch.randperm(batch.shape[0], generator=generator)[:count]
    return Texts(batch.tokens[chosen], batch.lengths[chosen])


def measure_loss(full: Decoder, student: Decoder, texts: Texts, generator: torch.Generator) -> Tensor:
    """The mean total variation over the texts' positions, drafting in random blocks."""
    device = full.embed.device
    tokens, positions = texts.tokens.flatten().to(device), texts.positions.to(device)
    real = texts.real.flatten().to(device)
    with torch.no_grad():
        record = RecordAttend(*texts.shape, device=device)
        p = full.logits(full.streams(tokens, positions, record)[real]).softmax(-1)
    attend = BlockAttend(random_starts(texts.shape, generator), record.entries)
    q = student.logits(student.streams(tokens, positions, attend)[real]).softmax(-1)
    if student.token_ids is None:
        return total_variation(p, q).mean()
    near = p[:, student.token_ids]
    return (total_variation(near, q) + 0.5 * (1 - near.sum(-1))).mean()
