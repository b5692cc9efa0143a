"""The decoder against transformers: logits of tiny random models, fp32 within 1e-4, bf16 no noisier than theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend, Layer, rotate
from strace.families import FAMILIES
from strace.kv import Batch
from strace.runner import FULL
from tests.tiny import make_runner, make_tiny, make_tokenizer, random_tokens, scatter_blocks

LENGTHS = [70, 45, 33]
TOLERANCE = 1e-4

# Every way in which published checkpoints of a family differ. `context` is what is served, where it matters.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-head": ("llama", {"head_dim": 24}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "mistral-wide-head": ("mistral", {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-in-some-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-wide-head": ("qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-window-in-some-layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
}
_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 32, **_FACTORS},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {},
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """The config override for a rope type."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0} | ROPES[kind] | parameters}


def load(model: Any, folder: Path, format: str = "fp32", context: int | None = None) -> Decoder:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_decoder(open_checkpoint(str(folder), context), format)


@torch.inference_mode()
def reference(model: Any, tokens: Tensor) -> Tensor:
    """transformers' logits [N, V] of one text, in one pass without a cache."""
    return model(tokens[None], use_cache=False).logits[0].float()


def run_in_passes(decoder: Decoder, texts: list[Tensor], passes: list[list[int]]) -> list[Tensor]:
    """The logits of every token of `texts`, where pass i takes the next passes[i][s] tokens of text s (0: not in
    it)."""
    runner = make_runner({FULL: decoder})
    tables = scatter_blocks([len(t) for t in texts], runner.cache.blocks)
    done, found = [0] * len(texts), [[] for _ in texts]
    for counts in passes:
        present = [s for s, n in enumerate(counts) if n]
        tokens = torch.cat([texts[s][done[s] : done[s] + counts[s]] for s in present])
        batch = Batch(tokens, [counts[s] for s in present], [done[s] for s in present], tables[present])
        rows = runner.forward(FULL, batch, list(range(len(tokens)))).split([counts[s] for s in present])
        for s, part in zip(present, rows, strict=True):
            found[s].append(part)
            done[s] += len(part)
    assert done == [len(t) for t in texts]
    return [torch.cat(parts) for parts in found]


PLANS: dict[str, list[list[int]]] = {
    "prefill": [[70, 0, 0], [0, 45, 0], [0, 0, 33]],
    "token by token": [[40, 45, 33], *[[1, 0, 0]] * 30],
    "batched token by token": [[50, 25, 13], *[[1, 1, 1]] * 20],
    "chunks": [[1, 0, 0], [31, 0, 0], [7, 0, 0], [31, 45, 33]],
    "ragged": [[40, 38, 1], [1, 6, 2], [29, 1, 30]],
}


def assert_parity(decoder: Decoder, model: Any, lengths: list[int] = LENGTHS) -> None:
    texts = [random_tokens(n, seed=n) for n in lengths]
    expected = [reference(model, text) for text in texts]
    for name, plan in PLANS.items():
        for got, wanted in zip(run_in_passes(decoder, texts, plan), expected, strict=True):
            error = (got - wanted).abs().max().item()
            assert error <= TOLERANCE, f"{name}: max abs logit error {error:.2e}"


def test_every_architecture_has_a_parity_case() -> None:
    assert {family for family, _ in SHAPES.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("case", SHAPES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = SHAPES[case]
    model = make_tiny(family, **overrides)
    assert_parity(load(model, tmp_path), model)


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_rope_equals_transformers(family: str, kind: str, tmp_path: Path) -> None:
    """transformers switches dynamic NTK and LongRoPE with the length of the running pass; a cached key cannot follow,
    so the decoder fixes them by the served context. They coincide for dynamic NTK within max_position_embeddings (here
    256) and for LongRoPE where pass and context lie on the same side of the original context (here 32, and every text
    is longer)."""
    model = (
        make_tiny(family, sliding_window=None, **rope(kind)) if family == "mistral" else make_tiny(family, **rope(kind))
    )
    assert_parity(load(model, tmp_path), model)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_rope_types_differ_from_the_default(kind: str) -> None:
    """Else the parity of a rope type would prove nothing; dynamic NTK is the default until it is stretched."""
    plain, scaled = make_tiny(**rope("default")), make_tiny(**rope(kind))
    text = random_tokens(70)
    differs = not torch.allclose(reference(plain, text), reference(scaled, text), atol=TOLERANCE)
    assert differs == (kind not in {"dynamic", "proportional"})


def test_longrope_within_its_original_context(tmp_path: Path) -> None:
    """Served with a context no longer than the original one, the short factors hold, as in transformers' short
    passes."""
    model = make_tiny(**rope("longrope", original_max_position_embeddings=128))
    assert_parity(load(model, tmp_path, context=128), model)
    long = load(model, tmp_path, context=129)
    text = random_tokens(70)
    assert (run_in_passes(long, [text], [[70]])[0] - reference(model, text)).abs().max() > 100 * TOLERANCE


def test_dynamic_ntk_beyond_the_trained_length(tmp_path: Path) -> None:
    """transformers stretches by the running pass; it equals the served context where the pass fills the context."""
    model = make_tiny(max_position_embeddings=32, **rope("dynamic"))
    decoder = load(model, tmp_path, context=70)
    text = random_tokens(70)
    expected = reference(model, text)
    for plan in ([[70]], [[33], *[[1]] * 37]):
        assert (run_in_passes(decoder, [text], plan)[0] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_bf16_is_no_noisier_than_transformers(family: str, tmp_path: Path) -> None:
    model = make_tiny(family)
    decoder = load(model, tmp_path, "bf16")
    texts = [random_tokens(64, seed) for seed in range(4)]
    exact = torch.cat([reference(model, text) for text in texts])
    model.bfloat16()
    theirs = torch.cat([reference(model, text) for text in texts]) - exact
    ours = torch.cat([run_in_passes(decoder, [text], [[40], [1], [23]])[0] for text in texts]) - exact
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * theirs.abs().max()


def test_partial_rotation_equals_transformers() -> None:
    """No family of the table turns a part of its heads only; the arithmetic is held against Phi-3's, whose turn is
    next."""
    q = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3, 0.1]))
    cos, sin = angles.cos(), angles.sin()
    got = rotate(q, torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])
    both = q.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb(both, both, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])
    assert torch.allclose(got, wanted[0].transpose(0, 1), atol=1e-6)
    assert torch.equal(got[..., 6:], q[..., 6:])


@torch.inference_mode()
def dense_logits(decoder: Decoder, texts: Tensor, tap: Callable[[str, int, Tensor], Tensor]) -> Tensor:
    """Logits of texts [S, T] by the cacheless attention used in tracing."""
    positions = torch.arange(texts.shape[1]).repeat(len(texts))
    attend = DenseAttend(len(texts), texts.shape[1])
    return decoder.logits(decoder.streams(texts.flatten(), positions, attend, tap), tap).view(*texts.shape, -1)


@pytest.mark.parametrize("case", ["llama", "qwen2-window-in-some-layers", "qwen3"])
def test_dense_attention_equals_transformers_and_names_its_activations(case: str, tmp_path: Path) -> None:
    family, overrides = SHAPES[case]
    model = make_tiny(family, **overrides)
    texts, seen = torch.stack([random_tokens(50, seed) for seed in range(3)]), []

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen.append((name, layer))
        return value

    logits = dense_logits(load(model, tmp_path), texts, tap)
    assert (logits - model(texts).logits).abs().max() <= TOLERANCE
    names = ["stream", "z", "attention_out", "stream_mid", "act", "mlp_out", "stream_out"]
    assert seen == [(name, layer) for layer in range(3) for name in names] + [("final", 3)]


def test_a_dropped_sublayer_is_one_that_adds_nothing(tmp_path: Path) -> None:
    decoder = load(make_tiny(), tmp_path)
    texts = random_tokens(30)[None]
    whole = decoder.layers

    def silence(name: str, layer: int, value: Tensor) -> Tensor:
        return value * 0 if (name, layer) in {("attention_out", 0), ("mlp_out", 2)} else value

    dropped = [Layer(None, whole[0].mlp), whole[1], Layer(whole[2].attention, None)]
    lesser = replace(decoder, layers=dropped)
    assert torch.equal(
        dense_logits(decoder, texts, silence), dense_logits(lesser, texts, lambda name, layer, value: value)
    )
    lost = [part.bytes for part in (whole[0].attention, whole[2].mlp) if part is not None]
    assert decoder.bytes_per_step - lesser.bytes_per_step == sum(lost)


@pytest.mark.parametrize("case", ["llama-tied", "llama-mlp-bias", "qwen2", "qwen3"])
def test_bytes_per_step_count_every_parameter_once(case: str, tmp_path: Path) -> None:
    """Of the embedding one row is read; a tied one is read whole, as the head. Norms are float32, all else bf16."""
    family, overrides = SHAPES[case]
    model = make_tiny(family, **overrides)
    stored = sum(p.numel() * (4 if "norm" in name else 2) for name, p in model.named_parameters())
    embedding = model.get_input_embeddings().weight
    whole = 0 if model.config.tie_word_embeddings else embedding.numel() * 2
    expected = stored - whole + embedding.shape[1] * 2
    assert load(model, tmp_path, "bf16").bytes_per_step == expected
