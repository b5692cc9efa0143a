"""Distillation: the loss is the rejected share, it falls, and what comes out is of the same format and size."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.decoder import Decoder
from strace.distill import distill, measure_loss
from strace.keep import Kept, slice_decoder
from strace.measure import measure_acceptance
from strace.texts import Texts, batch_texts
from tests.tiny import random_tokens, save_tiny


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(open_checkpoint(str(save_tiny(tmp_path_factory.mktemp("model")))), "fp32")


def cut(full: Decoder, step: int = 1) -> Decoder:
    kept = Kept((torch.arange(2),) * 3, (torch.arange(64),) * 3, token_ids=torch.arange(0, 300, step))
    return quantise_decoder(slice_decoder(full, kept), "int4")


def make_texts(count: int, seed: int) -> list[Texts]:
    return batch_texts([random_tokens(48, seed=seed + i).tolist() for i in range(count)])


@torch.no_grad()
def test_the_loss_is_the_share_that_is_rejected(full: Decoder) -> None:
    subgraph, texts = cut(full, step=2), make_texts(6, 0)
    loss = float(measure_loss(full, subgraph, texts[0], torch.Generator().manual_seed(0)))
    assert loss == pytest.approx(1 - measure_acceptance(full, subgraph, texts).mean, abs=0.03)


def test_it_learns_within_its_format_and_time(full: Decoder) -> None:
    ticks = count()
    subgraph, texts, shares = cut(full), make_texts(120, 100), []
    found = distill(full, subgraph, texts, 60.0, watch=shares.append, clock=lambda: float(next(ticks)))
    assert found.steps == 59
    assert shares == sorted(shares)
    apart = make_texts(8, 10_000)
    was, now = (measure_acceptance(full, s, apart).mean for s in (subgraph, found.subgraph))
    assert now > was + 0.01
    assert found.subgraph.bytes_per_step == subgraph.bytes_per_step
    before, after = (s.layers[0].mlp.down.codes for s in (subgraph, found.subgraph))
    assert after.format == "int4"
    assert after.codes.dtype == torch.int8
    assert not torch.equal(after.codes, before.codes)
    assert int(after.codes.min()) >= -8
    assert int(after.codes.max()) <= 7


def test_there_must_be_something_to_train(full: Decoder) -> None:
    with pytest.raises(ValueError, match="no matrix is quantised"):
        distill(full, full, make_texts(1, 0), 1.0)
