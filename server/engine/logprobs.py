"""What the full model thought of a token: its log-probabilities before temperature, penalties and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token's own log-probability, and the best ones at its place as (token, log-probability)."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


def read_logprobs(rows: Tensor, tokens: Sequence[int], best: int) -> list[TokenLogprob]:
    """Of each token by its row. rows: the full model's logits, float32 [n or more, V]; best: how many alternatives."""
    logprobs = rows[: len(tokens)].log_softmax(1)
    values, ids = logprobs.topk(min(best, rows.shape[1]), dim=1)
    return [
        TokenLogprob(token, float(own[token]), tuple(zip(places, top, strict=True)))
        for token, own, places, top in zip(tokens, logprobs, ids.tolist(), values.tolist(), strict=True)
    ]
