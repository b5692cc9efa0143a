"""Bits of the neural model: every token once, with the context it is due."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
from evaluate import Text, batch_windows, cached_baseline, cut_windows, measure_model

CONTEXT, END = 16, 0


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@given(st.integers(0, 70), st.integers(2, 17))
def test_windows_score_each_token_once_with_half_a_context(length: int, context: int) -> None:
    unit = np.arange(1, length + 1)
    tokens = [END, *unit.tolist(), END]
    windows = list(cut_windows(unit, END, context))
    assert [t for w in windows for t in w.targets.tolist()] == tokens[1:]
    at = 0
    for window in windows:
        at += len(window.targets)
        assert len(window.inputs) <= context
        assert window.inputs.tolist() == tokens[at - len(window.inputs) : at]
    for window in windows[1:]:
        assert len(window.inputs) - len(window.targets) == context // 2


@torch.inference_mode()
def test_bits_are_those_of_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of many lengths share padded batches; none may see its neighbours or its padding."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 40)
    model, rng = tiny_model(), np.random.default_rng(0)
    units = [rng.integers(1, 32, n) for n in (0, 3, 15, 16, 40, 7, 7)]
    expected = 0.0
    for unit in units:
        for window in cut_windows(unit, END, CONTEXT):
            first = len(window.inputs) - len(window.targets)
            for place, target in enumerate(window.targets, first):
                logits = model(input_ids=torch.tensor(window.inputs[None, : place + 1])).logits[0, -1]
                expected -= logits.log_softmax(-1)[target].item() / math.log(2)
    assert measure_model(model, END, {"all": Text(units, 10)})["all"] == pytest.approx(expected / 10, rel=1e-5)


def test_batches_keep_every_window_within_the_bound() -> None:
    windows = [w for n in (9000, 3, 900, 30, 400) for w in cut_windows(np.ones(n, np.int64), END, 1024)]
    batches = list(batch_windows(windows))
    assert sum(map(len, batches)) == len(windows)
    assert all(len(b) * max(len(w.inputs) for w in b) <= evaluate.BATCH_TOKENS for b in batches)


def test_a_cached_baseline_is_read_for_the_same_tokens_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, texts = tmp_path / "kn.json", {"code": Text([np.array([1, 2])], 3)}
    measured = {"code": {"pooled": 7.0, "class": 6.0}}
    monkeypatch.setattr(evaluate, "measure_baseline", lambda *_: measured)
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    assert cached_baseline(cache, tmp_path, tokenizer, texts) == measured
    monkeypatch.setattr(evaluate, "measure_baseline", None)
    assert cached_baseline(cache, tmp_path, tokenizer, texts) == measured
    with pytest.raises(SystemExit, match="other units"):
        cached_baseline(cache, tmp_path, tokenizer, {"code": Text([np.array([1, 3])], 3)})
