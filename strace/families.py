"""What differs between model families, as data: one table entry per family, read by the one decoder.

An entry names the architectures it covers, the Hugging Face weight names, and the few config fields whose meaning is
the family's own. Everything else (sizes, rope, tied head) is read from the config in the same way for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind that the decoder cannot run; the message names it and lists what is supported."""


@dataclass(frozen=True)
class Family:
    """One model family.

    `names` maps the decoder's weight names to Hugging Face's; `{l}` stands for the layer. A name that a checkpoint may
    lack (a bias, a q/k norm) is optional where `optional` lists it. Weights are looked up by name, so a family whose
    checkpoints have a bias and one whose checkpoints do not differ in nothing. `windowed` and `partial_rotary` say
    whether the family heeds the config fields `sliding_window` and `partial_rotary_factor`, which any config may carry.
    """

    name: str
    architectures: tuple[str, ...]
    names: dict[str, str]
    optional: frozenset[str] = frozenset()
    examples: str = ""
    windowed: bool = False
    partial_rotary: bool = False


@dataclass(frozen=True)
class Spec:
    """The shape and arithmetic of one checkpoint. Sizes in elements, `window` in tokens (None: unbounded), per
    layer."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    norm_eps: float
    activation: str
    tied: bool
    context: int
    window: tuple[int | None, ...]
    rotary_dim: int
    inverse_frequency: Tensor = field(compare=False, repr=False)
    rope_scaling: float = 1.0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


_BIASES = {
    "q.bias": "model.layers.{l}.self_attn.q_proj.bias",
    "k.bias": "model.layers.{l}.self_attn.k_proj.bias",
    "v.bias": "model.layers.{l}.self_attn.v_proj.bias",
    "o.bias": "model.layers.{l}.self_attn.o_proj.bias",
    "gate.bias": "model.layers.{l}.mlp.gate_proj.bias",
    "up.bias": "model.layers.{l}.mlp.up_proj.bias",
    "down.bias": "model.layers.{l}.mlp.down_proj.bias",
}
_LLAMA = {
    "embed.weight": "model.embed_tokens.weight",
    "attention_norm.weight": "model.layers.{l}.input_layernorm.weight",
    "q.weight": "model.layers.{l}.self_attn.q_proj.weight",
    "k.weight": "model.layers.{l}.self_attn.k_proj.weight",
    "v.weight": "model.layers.{l}.self_attn.v_proj.weight",
    "o.weight": "model.layers.{l}.self_attn.o_proj.weight",
    "mlp_norm.weight": "model.layers.{l}.post_attention_layernorm.weight",
    "gate.weight": "model.layers.{l}.mlp.gate_proj.weight",
    "up.weight": "model.layers.{l}.mlp.up_proj.weight",
    "down.weight": "model.layers.{l}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    **_BIASES,
}
_QWEN3 = {
    **_LLAMA,
    "q_norm.weight": "model.layers.{l}.self_attn.q_norm.weight",
    "k_norm.weight": "model.layers.{l}.self_attn.k_norm.weight",
}

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("LlamaForCausalLM",), _LLAMA, frozenset(_BIASES), "Llama, DeepSeek-LLM, SmolLM, Yi, TinyLlama"),
    Family("mistral", ("MistralForCausalLM",), _LLAMA, frozenset(_BIASES), "Mistral 7B, Nemo", windowed=True),
    Family("qwen2", ("Qwen2ForCausalLM",), _LLAMA, frozenset(_BIASES), "Qwen2, Qwen2.5", windowed=True),
    Family("qwen3", ("Qwen3ForCausalLM",), _QWEN3, frozenset(_BIASES), "Qwen3 dense", windowed=True),
)
ACTIVATIONS = frozenset({"silu", "gelu", "gelu_pytorch_tanh"})


def supported() -> str:
    """The supported families, for error messages."""
    return "; ".join(f"{a} ({f.examples})" for f in FAMILIES for a in f.architectures)


def find_family(config: Any) -> Family:
    """The table entry of a transformers config.

    Raises:
        UnsupportedModel: by name, for an unknown architecture, a mixture of experts or a pre-quantised checkpoint.
    """
    architecture = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"{architecture} is a pre-quantised checkpoint; give the unquantised one. Supported: {supported()}"
        )
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise UnsupportedModel(f"{architecture} is a mixture of experts. Supported: {supported()}")
    for family in FAMILIES:
        if architecture in (*family.architectures, family.name):
            return family
    raise UnsupportedModel(f"architecture {architecture} is not supported. Supported: {supported()}")


def _rope(config: Any, family: Family, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] and the factor on cos and sin.

    A cached key keeps the rotation it was written with, so the variants that change with the length (dynamic NTK,
    LongRoPE) are fixed by the context that is served, not by the length of a prompt.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1 and not family.partial_rotary:
        raise UnsupportedModel(f"partial_rotary_factor {partial} has no meaning for {family.name}")
    if kind != "default":
        if kind not in ROPE_INIT_FUNCTIONS:
            raise UnsupportedModel(f"rope type {kind!r} is not known to this transformers version")
        frequency, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context)
        return frequency.float(), float(scaling)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = int(head_dim * partial)
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotary, 2).float() / rotary), 1.0


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    """The sliding window of every layer, in tokens."""
    window = getattr(config, "sliding_window", None) if family.windowed else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_spec(config: Any, context: int | None = None) -> Spec:
    """The `Spec` of a transformers config, served with at most `context` tokens (default: the checkpoint's own limit).

    Raises:
        UnsupportedModel: if the decoder cannot run it.
    """
    family = find_family(config)
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {config.hidden_act!r} of {family.name} is not one of {sorted(ACTIVATIONS)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedModel(
            f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key/value heads evenly"
        )
    limit = context or config.max_position_embeddings
    frequency, scaling = _rope(config, family, limit)
    return Spec(
        family=family.name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        tied=bool(config.tie_word_embeddings),
        context=limit,
        window=_windows(config, family),
        rotary_dim=2 * len(frequency),
        inverse_frequency=frequency,
        rope_scaling=scaling,
    )
