"""What a config becomes, and what is refused by name. Parity of each family with transformers is in test_decoder.py."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from strace.families import FAMILIES, UnsupportedModel, find_family, read_spec, supported

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_that_names_no_architecture_goes_by_its_model_type(architectures: list[str] | None) -> None:
    assert find_family(Qwen3Config(architectures=architectures)).name == "qwen3"


def test_every_architecture_finds_its_family() -> None:
    for family in FAMILIES:
        for architecture in family.architectures:
            assert find_family(LlamaConfig(architectures=[architecture])) is family


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BloomConfig(architectures=["BloomForCausalLM"]), "BloomForCausalLM"),
        (MptConfig(architectures=["MPTForCausalLM"]), "MPTForCausalLM"),
        (Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]), "Gemma3ForConditionalGeneration"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "gpt2 with scale_attn_by_inverse_layer_idx True"),
        (GPT2Config(scale_attn_weights=False), "gpt2 with scale_attn_weights False"),
        (GPT2Config(reorder_and_upcast_attn=True), "gpt2 with reorder_and_upcast_attn True"),
        (GPT2Config(add_cross_attention=True), "gpt2 with add_cross_attention True"),
        (Gemma2Config(use_bidirectional_attention=True), "gemma2 with use_bidirectional_attention True"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "gemma3_text with use_bidirectional_attention True"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (MixtralConfig(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM is a mixture of experts"),
        (Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM is a mixture of experts"),
        (
            LlamaConfig(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4}),
            "LlamaForCausalLM is a pre-quantised checkpoint",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name_with_what_is(config: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_spec(config)
    assert named in str(caught.value)
    assert supported() in str(caught.value)
    assert all(architecture in supported() for family in FAMILIES for architecture in family.architectures)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"hidden_act": "relu"}, "'relu'.*silu"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type 'spiral'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    ],
)
def test_arithmetic_that_the_decoder_lacks_is_refused(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        read_spec(LlamaConfig(**SMALL | overrides))


def test_windows_are_per_layer_and_only_where_the_family_heeds_them() -> None:
    qwen2 = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert read_spec(qwen2).window == (None, 8, 8)
    assert read_spec(Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8)).window == (None,) * 3
    assert read_spec(MistralConfig(**SMALL, sliding_window=8)).window == (8,) * 3
    assert read_spec(LlamaConfig(**SMALL, sliding_window=8)).window == (None,) * 3


def test_sizes_come_from_the_config() -> None:
    spec = read_spec(Qwen3Config(**SMALL, head_dim=24, intermediate_size=96, vocab_size=300, tie_word_embeddings=True))
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (3, 64, 4, 2, 24)
    assert (spec.mlp, spec.vocabulary, spec.group, spec.rotary_dim, spec.tied) == (96, 300, 2, 24, True)


def test_served_context_defaults_to_the_checkpoints() -> None:
    config = LlamaConfig(**SMALL, max_position_embeddings=512)
    assert read_spec(config).context == 512
    assert read_spec(config, 100).context == 100


def test_learned_positions_bound_the_context() -> None:
    config = GPT2Config(n_embd=64, n_head=2, n_positions=64)
    assert read_spec(config, 50).context == 50
    with pytest.raises(UnsupportedModel, match="gpt2 has learned 64 positions; it cannot serve a context of 65"):
        read_spec(config, 65)


def test_each_kind_of_layer_has_its_window_and_its_rope() -> None:
    small = SMALL | {"head_dim": 16, "sliding_window": 8}
    gemma2, gemma3 = read_spec(Gemma2Config(**small)), read_spec(Gemma3TextConfig(**small, sliding_window_pattern=2))
    assert gemma2.window == gemma3.window == (8, None, 8)
    assert gemma2.rope == (0, 0, 0)
    assert gemma3.rope == (1, 0, 1)
    thetas = [1 / float(frequency[1]) ** 8 for frequency in gemma3.inverse_frequencies]
    assert thetas == pytest.approx([1e6, 1e4], rel=1e-3)


def test_what_a_family_does_not_say_is_as_in_the_first_ones() -> None:
    llama = read_spec(LlamaConfig(**SMALL))
    assert (llama.norm, llama.gated, llama.parallel, llama.learned_positions) == ("rms", True, False, False)
    assert (llama.attention_scale, llama.attention_cap, llama.logit_cap, llama.embed_scale) == (0.25, 0.0, 0.0, 1.0)


def test_what_sets_the_new_families_apart() -> None:
    gemma2 = read_spec(Gemma2Config(**SMALL, head_dim=16, query_pre_attn_scalar=64))
    assert (gemma2.attention_scale, gemma2.attention_cap, gemma2.logit_cap, gemma2.embed_scale) == (1 / 8, 50, 30, 8)
    gpt2 = read_spec(GPT2Config(n_embd=64, n_head=2, n_layer=3))
    assert (gpt2.norm, gpt2.gated, gpt2.mlp, gpt2.activation) == ("layer", False, 256, "gelu_pytorch_tanh")
    assert (gpt2.rotary_dim, gpt2.inverse_frequencies, gpt2.rope, gpt2.learned_positions) == (0, (), (), True)
    neox = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    assert [read_spec(GPTNeoXConfig(**neox, use_parallel_residual=p)).parallel for p in (True, False)] == [True, False]
    assert read_spec(GPTNeoXConfig(**neox)).rotary_dim == 8
    assert read_spec(Phi3Config(**SMALL, partial_rotary_factor=0.75)).rotary_dim == 12
