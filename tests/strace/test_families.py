"""What a config becomes, and what is refused by name. Parity of each family with transformers is in test_decoder.py."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
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
        (GPT2Config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (MixtralConfig(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM is a mixture of experts"),
        (Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM is a mixture of experts"),
        (
            LlamaConfig(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4}),
            "LlamaForCausalLM is a pre-quantised checkpoint",
        ),
    ],
    ids=["gpt2", "classifier", "mixtral", "qwen3-moe", "gptq"],
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
