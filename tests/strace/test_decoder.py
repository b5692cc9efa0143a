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

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend, Layer
from strace.families import FAMILIES
from strace.kv import Batch
from strace.runner import FULL
from tests.tiny import is_norm, make_runner, make_tiny, make_tokenizer, random_tokens, scatter_blocks

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
    "olmo2": ("olmo2", {}),
    "olmo2-tied-multi-head": ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "olmo2-attention-bias": ("olmo2", {"attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3-tied-whole-rotary": (
        "phi3",
        {"tie_word_embeddings": True, "partial_rotary_factor": 1.0, "sliding_window": None},
    ),
    "gemma2": ("gemma2", {}),
    "gemma2-tied-uncapped": (
        "gemma2",
        {"tie_word_embeddings": True, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2-attention-bias": ("gemma2", {"attention_bias": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-tied-capped": ("gemma3_text", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    "gpt2": ("gpt2", {}),
    "gpt2-tied": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2-exact-gelu-default-width": ("gpt2", {"activation_function": "gelu", "n_inner": None}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-tied-sequential": ("gpt_neox", {"tie_word_embeddings": True, "use_parallel_residual": False}),
    "gpt_neox-no-bias-fast-gelu": ("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_fast"}),
}
# transformers stretches none of these: Phi-3 knows LongRoPE alone, and GPT-2 has no rope.
ROTARY = [family.name for family in FAMILIES if family.name not in ("phi3", "gpt2")]
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
        batch = Batch(tokens.tolist(), [counts[s] for s in present], [done[s] for s in present], tables[present])
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
@pytest.mark.parametrize("family", ROTARY)
def test_rope_equals_transformers(family: str, kind: str, tmp_path: Path) -> None:
    """transformers switches dynamic NTK and LongRoPE with the length of the running pass; a cached key cannot follow,
    so the decoder fixes them by the served context. They coincide for dynamic NTK within max_position_embeddings (here
    256) and for LongRoPE where pass and context lie on the same side of the original context (here 32, and every text
    is longer)."""
    own = {"mistral": {"sliding_window": None}}.get(family, {})
    stretched = rope(kind, partial_rotary_factor=0.5) if family == "gpt_neox" else rope(kind)
    if family == "gemma3_text":
        kinds = {"full_attention": stretched["rope_parameters"], "sliding_attention": {"rope_theta": 100.0}}
        stretched = {"rope_parameters": kinds}
    model = make_tiny(family, **own, **stretched)
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


@torch.inference_mode()
def dense_logits(decoder: Decoder, texts: Tensor, tap: Callable[[str, int, Tensor], Tensor]) -> Tensor:
    """Logits of texts [S, T] by the cacheless attention used in tracing."""
    positions = torch.arange(texts.shape[1]).repeat(len(texts))
    attend = DenseAttend(len(texts), texts.shape[1])
    return decoder.logits(decoder.streams(texts.flatten(), positions, attend, tap), tap).view(*texts.shape, -1)


@pytest.mark.parametrize("case", ["qwen2-window-in-some-layers", *(family.name for family in FAMILIES)])
def test_dense_attention_equals_transformers_and_names_its_activations(case: str, tmp_path: Path) -> None:
    family, overrides = SHAPES.get(case, (case, {}))
    model = make_tiny(family, **overrides)
    texts, seen = torch.stack([random_tokens(50, seed) for seed in range(3)]), []

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        seen.append((name, layer))
        return value

    logits = dense_logits(load(model, tmp_path), texts, tap)
    assert (logits - model(texts).logits).abs().max() <= TOLERANCE
    names = ["stream", "z", "attention_out", "stream_mid", "mlp_in", "act", "mlp_out", "stream_out"]
    if family == "gpt_neox":
        names.remove("stream_mid")
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


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_equal_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(family, tie_word_embeddings=tied)
    text, streams = random_tokens(50), []

    def tap(name: str, layer: int, value: Tensor) -> Tensor:
        if name in ("stream", "final"):
            streams.append(value)
        return value

    dense_logits(load(model, tmp_path), text[None], tap)
    # transformers gives the stream before each layer, then the normalised one.
    wanted = model(text[None], output_hidden_states=True).hidden_states
    assert len(streams) == len(wanted) == 4
    for ours, theirs in zip(streams, wanted, strict=True):
        assert ((ours - theirs[0]).norm(dim=-1) <= 1e-5 * theirs[0].norm(dim=-1)).all()


def test_phi3_long_rope_equals_transformers(tmp_path: Path) -> None:
    """As in `test_rope_equals_transformers`, with the factor on cos and sin from the ratio of the contexts."""
    factors = {name: values[:6] for name, values in _FACTORS.items()}
    parameters = {"rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75, **factors}
    model = make_tiny("phi3", original_max_position_embeddings=32, rope_parameters=parameters)
    decoder = load(model, tmp_path)
    assert decoder.spec.rope_scalings[0] > 1
    assert_parity(decoder, model)


def test_each_kind_of_layer_turns_by_its_own_rope(tmp_path: Path) -> None:
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    model = make_tiny("gemma3_text", rope_parameters=kinds)
    assert_parity(load(model, tmp_path), model)


@pytest.mark.parametrize("case", ["llama-tied", "llama-mlp-bias", *(family.name for family in FAMILIES)])
def test_bytes_per_step_count_every_parameter_once(case: str, tmp_path: Path) -> None:
    """Of the embedding one row is read; a tied one is read whole, as the head. Norms and
    learned positions, of which one row is read, are float32, all else bf16."""
    family, overrides = SHAPES.get(case, (case, {}))
    model = make_tiny(family, **overrides)
    wide = [name for name, _ in model.named_parameters() if is_norm(name) or "wpe" in name]
    stored = sum(p.numel() * (4 if name in wide else 2) for name, p in model.named_parameters())
    embedding = model.get_input_embeddings().weight
    whole = 0 if model.config.tie_word_embeddings else embedding.numel() * 2
    expected = stored - whole + embedding.shape[1] * 2
    if family == "gpt2":
        expected -= 255 * 64 * 4
    assert load(model, tmp_path, "bf16").bytes_per_step == expected
