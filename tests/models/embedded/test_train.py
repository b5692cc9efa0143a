"""The recipe's own arithmetic: the chunked loss, the schedule, and rows that depend on nothing but their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from corpus import GROUP, MIXTURE, TokenStream, as_messages
from train import WARMUP_STEPS, HeadLoss, rate_share


def test_chunked_loss_and_its_gradients_are_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadLoss, "CHUNK", 8)
    torch.manual_seed(0)
    hidden = torch.randn(20, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().float().requires_grad_()
    targets = torch.randint(50, (20,))
    HeadLoss.apply(hidden, weight, targets).backward()
    exact_hidden, exact_weight = hidden.detach().float().requires_grad_(), weight.detach().clone().requires_grad_()
    F.cross_entropy(exact_hidden @ exact_weight.T, targets).backward()
    for ours, exact in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert ours is not None
        assert exact is not None
        assert (ours.float() - exact).norm() < 0.02 * exact.norm()


def test_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [rate_share(step, 1000, 0.35) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / WARMUP_STEPS)
    assert rates[WARMUP_STEPS] == rates[600] == 1.0
    assert rates[825] == pytest.approx(0.5)
    assert rates[1000] == 0.0


def test_rows_follow_from_their_number_and_cover_a_class() -> None:
    tokens = {name: np.arange(i * 1000, i * 1000 + 400, dtype=np.uint16) for i, name in enumerate(MIXTURE)}
    stream = TokenStream(tokens, 16)
    forwards = [stream.row(i) for i in range(3 * GROUP)]
    again = TokenStream(tokens, 16)
    assert all(np.array_equal(again.row(i), forwards[i]) for i in reversed(range(3 * GROUP)))
    stories = [int(row[0]) for row in forwards if row[0] < 1000]
    assert len(stories) == 3 * MIXTURE["stories"]
    assert len(set(stories)) == len(stories), "no window comes twice in one epoch"


def test_dialogues_become_messages_and_prose_none() -> None:
    assert as_messages("User: hi\nthere\nAssistant: hello") == [
        {"role": "user", "content": "hi\nthere"},
        {"role": "assistant", "content": "hello"},
    ]
    assert as_messages("Once upon a time") == []
