"""Distillation: the codes, scales and biases of a rounded subgraph, trained so that its drafts are accepted more often.

The loss is the rejected share itself, the total variation to the full model's distributions at temperature 1, in the
regime of serving (blocks.py). What learns, and that no byte is added, is said in trained.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strace.blocks import BlockAttend, RecordAttend, random_starts
from strace.decoder import Decoder, Layer
from strace.linear import Linear
from strace.sampling import total_variation
from strace.texts import Texts
from strace.trained import Trained

ROWS = 2048  # positions of a step; more are drawn from
# Most change per step: of a code, of the logarithm of a scale, of a bias.
RATES = {"codes": 0.02, "scales": 3e-4, "biases": 3e-4}


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
