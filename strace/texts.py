"""Tokenised texts in batches, as tracing, repair and measuring read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST, SHORTEST = (
    384,
    16,
)  # tokens of a piece: long enough for context, short enough that attention patterns stay small
BATCH_TOKENS = 4096
ROWS, LOGITS = 1024, 1 << 25  # most rows of logits held at once, and most numbers in them


@dataclass(frozen=True)
class Texts:
    """S texts padded on the right to n tokens: causality keeps the padding from touching what comes before it.

    tokens: int64 [S, n]. lengths: int64 [S].
    """

    tokens: Tensor
    lengths: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def positions(self) -> Tensor:
        """int64 [S * n]."""
        return torch.arange(self.shape[1]).repeat(self.shape[0])

    @property
    def real(self) -> Tensor:
        """bool [S, n]: False on padding."""
        return torch.arange(self.shape[1]) < self.lengths[:, None]


def cut_pieces(texts: Sequence[Sequence[int]], longest: int = LONGEST) -> list[list[int]]:
    """Consecutive pieces of at most `longest` tokens; a rest too short to show anything is left out."""
    pieces = [list(text[i : i + longest]) for text in texts for i in range(0, len(text), longest)]
    return [piece for piece in pieces if len(piece) >= min(SHORTEST, longest)]


def take_pieces(pieces: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The first of the pieces, as many as come up to so many tokens."""
    ends = itertools.accumulate(map(len, pieces))
    return list(pieces[: sum(end < tokens for end in ends) + 1])


def batch_texts(pieces: Sequence[Sequence[int]], tokens: int = BATCH_TOKENS) -> list[Texts]:
    """Batches of at most about `tokens` padded tokens, pieces of like length together."""
    batches: list[list[Sequence[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > tokens:
            batches.append([])
        batches[-1].append(piece)
    return [_pad(batch) for batch in batches]


def split_texts(batch: Texts, most: int) -> list[Texts]:
    """The batch in parts of at most so many texts."""
    parts = zip(batch.tokens.split(most), batch.lengths.split(most), strict=True)
    return [Texts(tokens, lengths) for tokens, lengths in parts]


def split_rows(rows: Tensor, vocabulary: int) -> Sequence[Tensor]:
    """`rows` in parts of which all logits may be held at once."""
    return rows.split(max(1, min(ROWS, LOGITS // vocabulary)))


def _pad(pieces: Sequence[Sequence[int]]) -> Texts:
    padded = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.int64)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = torch.tensor(piece)
    return Texts(padded, torch.tensor([len(p) for p in pieces]))


def count_positions(batches: Sequence[Texts]) -> int:
    """Tokens of some texts."""
    return sum(int(batch.lengths.sum()) for batch in batches)


def take_some(batches: Sequence[Texts], tokens: int) -> list[Texts]:
    """Batches spread evenly over all (they are sorted by length), together about `tokens`."""
    return list(batches[:: max(1, count_positions(batches) // tokens)])
