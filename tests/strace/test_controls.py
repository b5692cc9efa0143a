"""Scores of units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strace.checkpoint import load_decoder, open_checkpoint
from strace.controls import UNITS, drop_in_turn, score_units
from strace.flow import measure_flow
from strace.texts import batch_texts
from tests.tiny import random_tokens, save_tiny


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_scores_every_unit_in_its_own_way(tmp_path: Path, family: str) -> None:
    full = load_decoder(open_checkpoint(str(save_tiny(tmp_path, family))), "fp32")
    fit = batch_texts([random_tokens(40, seed=s).tolist() for s in range(3)])
    flow = measure_flow(full, fit)
    orders = set()
    for units in UNITS:
        scores = score_units(units, flow, full, fit)
        assert scores.groups.shape == flow.groups.shape
        assert scores.neurons.shape == flow.neurons.shape
        assert scores.neurons.min() >= 0
        orders.add(tuple(scores.neurons.flatten().argsort(stable=True).tolist()))
    assert len(orders) == len(UNITS)
    first = score_units("first", flow, full, fit)
    assert first.neurons[0].min() > first.neurons[1].max()
    with pytest.raises(ValueError, match="unknown units 'none'"):
        score_units("none", flow, full, fit)


@given(st.integers(0, 100))
def test_a_neuron_that_others_can_stand_in_for_goes_first(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    x[:, 5] = x[:, 0] + 0.01 * x[:, 5]  # large, and a copy
    weight = torch.randn(4, 6, generator=g, dtype=torch.float64)
    weight *= 6 / weight.norm(dim=0)
    scores = drop_in_turn(weight, x.T @ x / 200)
    assert int(scores.argmin()) in (0, 5)
