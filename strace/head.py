"""The short head: the vocabulary rows that a class really uses, and what a subgraph's are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strace.blocks import random_starts
from strace.checkpoint import Checkpoint
from strace.decoder import Decoder, DenseAttend, soft_cap
from strace.keep import take
from strace.linear import Codes, Linear
from strace.measure import block_streams
from strace.texts import LOGITS, Texts, split_rows
from strace.trained import Trained

PASSES = 16  # over the texts that a head is fitted on
ROWS = 2048  # positions of a step, or as many as `LOGITS` allows
RATE = 0.05  # the most that a code changes in a step
LARGEST = 1 << 26  # weights of a head that is fitted: each takes 16 bytes meanwhile


@torch.inference_mode()
def iterate_probabilities(full: Decoder, batches: Sequence[Texts]) -> Iterator[Tensor]:
    """The full model's distributions at every position of the texts, float32, some rows at a time."""
    device = full.embed.device
    for batch in batches:
        attend = DenseAttend(*batch.shape, device=device)
        stream = full.streams(batch.tokens.flatten().to(device), batch.positions.to(device), attend)
        for rows in split_rows(stream[batch.real.flatten().to(stream.device)], full.spec.vocabulary):
            yield full.logits(rows).softmax(-1)


def measure_mass(full: Decoder, batches: Sequence[Texts]) -> Tensor:
    """float64 [V]: the full model's mean probability of each token over the texts."""
    total, rows = torch.zeros(full.spec.vocabulary, dtype=torch.float64), 0
    for p in iterate_probabilities(full, batches):
        total += p.sum(0).double().cpu()
        rows += len(p)
    return total / max(rows, 1)


def count_tokens(batches: Sequence[Texts], vocabulary: int) -> Tensor:
    """float64 [V]: each token's share of the texts."""
    counts = sum(torch.bincount(b.tokens[b.real], minlength=vocabulary) for b in batches)
    shares = torch.as_tensor(counts, dtype=torch.float64)
    return shares / shares.sum().clamp_min(1)


def special_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that every head keeps, because ending and turn-taking hang on them."""
    ids = set(checkpoint.tokenizer.all_special_ids) | checkpoint.stop_ids
    return sorted(i for i in ids if i < checkpoint.spec.vocabulary)


def rank_tokens(mass: Tensor, counts: Tensor, specials: Sequence[int]) -> Tensor:
    """int64 [V], the most used first: by the full model's mass and the text's own counts together; specials lead.

    The counts carry the tokens that the model finds unlikely and the class uses all the same.
    """
    score = mass + counts
    score[list(specials)] = torch.inf
    return score.argsort(descending=True, stable=True)


def short_enough(ranked: Tensor, mass: Tensor, coverage: float, step: int = 32) -> Tensor | None:
    """The fewest rows, a multiple of `step`, that hold `coverage` of the mass: sorted ids, or None when that is all of
    them."""
    held = mass[ranked].cumsum(0) / mass.sum()
    rows = int((held < coverage).sum()) + 1
    rows += -rows % step
    return None if rows >= len(ranked) else ranked[:rows].sort().values


@dataclass(frozen=True)
class Head:
    """What short heads of a class are cut from: ids by use, and the full model's mean probability of each."""

    ranked: Tensor
    mass: Tensor

    def cut(self, coverage: float) -> Tensor | None:
        """The ids that hold `coverage` of the mass; None: all."""
        return short_enough(self.ranked, self.mass, coverage)


def rank_head(full: Decoder, some: Sequence[Texts], fit: Sequence[Texts], specials: Sequence[int]) -> Head:
    """A class's tokens, by the full model's mass on some of its texts and by their counts in all."""
    mass = measure_mass(full, some)
    return Head(rank_tokens(mass, count_tokens(fit, full.spec.vocabulary), specials), mass)


def cut_head(subgraph: Decoder, ids: Tensor | None) -> Decoder:
    """A subgraph that has all head rows, left with those of `ids` (None: all). Rows are rounded independently of each
    other, so this is what rounding the short head alone would have given."""
    if ids is None:
        return subgraph
    ids = ids.to(subgraph.head.dense().device)
    weight, bias = subgraph.head.weight, subgraph.head.bias
    weight = Codes(weight.format, weight.codes[ids], weight.scales[ids]) if isinstance(weight, Codes) else weight[ids]
    head = Linear(weight, None if bias is None else bias[ids], subgraph.dtype)
    return replace(subgraph, head=head, token_ids=ids)


def fit_head(full: Decoder, subgraph: Decoder, batches: Sequence[Texts], seed: int = 0) -> Decoder:
    """The subgraph with its quantised head fitted, by cross-entropy, to the full model's distributions over the head's
    tokens. No linear fit of the layers before (repair.py) sees what the softmax makes of the error they leave.

    The layers stay as they are, so their streams over the texts are computed once. A dense head is left alone, and so
    is one of more than `LARGEST` weights.
    """
    count, hidden = subgraph.head.shape
    if subgraph.head.codes is None or count * hidden > LARGEST:
        return subgraph
    rows = full.head if subgraph.token_ids is None else take(full.head, rows=subgraph.token_ids)
    wanted, own = _read_streams(full, subgraph, batches, seed)
    trained, generator = Trained(subgraph.head, subgraph.dtype), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam([trained.numbers], lr=RATE, betas=(0.9, 0.98))
    size, cap = min(ROWS, len(own), LOGITS // count), full.spec.logit_cap
    steps = round(PASSES * len(own) / size)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(len(own), (size,), generator=generator).to(own.device)
        logits = soft_cap(trained(own[some]).float(), cap)
        with torch.no_grad():  # the gradient of cross-entropy in the logits is how far the two distributions lie apart
            p = soft_cap(rows(wanted[some]).float(), cap)
            gap = logits.softmax(-1).sub_(torch.softmax(p, -1, out=p)).div_(size)
        optimiser.zero_grad()
        logits.backward(gap)
        optimiser.step()
        falling.step()
    return replace(subgraph, head=trained.settle())


@torch.no_grad()
def _read_streams(full: Decoder, subgraph: Decoder, batches: Sequence[Texts], seed: int) -> tuple[Tensor, Tensor]:
    """What the heads of the full model and of the drafting subgraph read of the texts, [R, hidden] each."""
    generator, found = torch.Generator().manual_seed(seed), []
    for batch in batches:
        real = batch.real.flatten()
        streams = block_streams(full, subgraph, batch, random_starts(batch.shape, generator))
        found.append([full.normalise(stream[real.to(stream.device)], full.final_norm) for stream in streams])
    wanted, own = (torch.cat(parts) for parts in zip(*found, strict=True))
    return wanted, own
