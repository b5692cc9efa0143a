"""The short head: the vocabulary rows that a class really uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strace.checkpoint import Checkpoint
from strace.decoder import Decoder, DenseAttend
from strace.linear import Codes, Linear
from strace.texts import Texts, split_rows


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
