"""What differs between model families, as data: one table entry per family, read by the one decoder.

An entry names the architectures it covers, the Hugging Face module names, how weights are laid out, and the config
fields that the family heeds. All sizes are read from the config in the same way for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind that the decoder cannot run; the message names it and lists what is supported."""


_FIELDS = {
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Family:
    """One model family.

    `ends` and `parts` map the decoder's names to Hugging Face modules, `parts` to those inside a `layer` (`{l}` is its
    number). A module that the family lacks is not there. A bias is used where the checkpoint has one, so a family whose
    checkpoints have biases and one whose checkpoints do not differ in nothing.

    fields: the config field behind each choice; any config may carry any field, and one that is not listed is not
        heeded. fixed: fields of which the decoder knows one value.
    qkv, inner: the parts stacked into the decoder's one matrix; a fused weight is one part.
    transposed: the weights inside layers are stored [inputs, outputs]. interleaved: qkv's rows are q, k, v of the first
        head, then of the next.
    one_offset: norm weights are stored less 1. wide_qk_norm: q and k are normalised over all heads at once.
    scaled_embedding: embeddings are multiplied by the root of the hidden size.
    """

    name: str
    architectures: tuple[str, ...]
    examples: str
    ends: Mapping[str, str]
    layer: str
    parts: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=lambda: _FIELDS)
    fixed: Mapping[str, object] = field(default_factory=dict)
    norm: str = "rms"
    qkv: tuple[str, ...] = ("q", "k", "v")
    inner: tuple[str, ...] = ("gate", "up")
    gated: bool = True
    partial_rotary: bool = False
    learned_positions: bool = False
    transposed: bool = False
    interleaved: bool = False
    one_offset: bool = False
    wide_qk_norm: bool = False
    scaled_embedding: bool = False

    def module(self, part: str, layer: int) -> str | None:
        """The Hugging Face module behind a decoder name such as `q`; None where the family has none."""
        if part in self.ends:
            return self.ends[part]
        return f"{self.layer.format(l=layer)}.{self.parts[part]}" if part in self.parts else None

    def read(self, config: Any, choice: str, default: Any) -> Any:
        """What the config says of a choice; the default where the family does not heed it or the field is unset."""
        value = getattr(config, self.fields[choice], None) if choice in self.fields else None
        return default if value is None else value


@dataclass(frozen=True)
class Spec:
    """The shape and arithmetic of one checkpoint. Sizes in elements, `window` in tokens (None: unbounded), per layer.

    norm: `rms` or `layer`. gated: the MLP is `act(gate) * up`, else `act(up)`. parallel: attention and MLP read the
    same stream. inverse_frequencies, rope_scalings: one per rope table, [rotary_dim / 2] and the factor on its cos and
    sin; rope: the table of each layer. A cap bounds attention scores or logits by `cap * tanh(x / cap)`; 0: none.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    parallel: bool
    tied: bool
    context: int
    window: tuple[int | None, ...]
    rotary_dim: int
    inverse_frequencies: tuple[Tensor, ...] = field(compare=False, repr=False)
    rope_scalings: tuple[float, ...]
    rope: tuple[int, ...]
    learned_positions: bool
    attention_scale: float
    attention_cap: float
    logit_cap: float
    embed_scale: float

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def steps(self) -> int:
        """Steps of the residual stream from the embeddings to the output: two per layer, one if blocks are parallel."""
        return self.layers if self.parallel else 2 * self.layers


_ENDS = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LLAMA = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_OLMO2 = {part: module for part, module in _LLAMA.items() if not part.endswith("norm")} | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    **_QK_NORM,
}
_PHI3 = {
    "attention_norm": "input_layernorm",
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
_GEMMA2 = _LLAMA | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_NEOX = {
    "attention_norm": "input_layernorm",
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_WINDOWED = _FIELDS | {"window": "sliding_window"}
_GEMMA_FIELDS = _WINDOWED | {
    "activation": "hidden_activation",
    "attention_scalar": "query_pre_attn_scalar",
    "logit_cap": "final_logit_softcapping",
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        "Llama, DeepSeek-LLM, SmolLM, Yi, TinyLlama",
        _ENDS,
        "model.layers.{l}",
        _LLAMA,
    ),
    Family("mistral", ("MistralForCausalLM",), "Mistral 7B, Nemo", _ENDS, "model.layers.{l}", _LLAMA, _WINDOWED),
    Family("qwen2", ("Qwen2ForCausalLM",), "Qwen2, Qwen2.5", _ENDS, "model.layers.{l}", _LLAMA, _WINDOWED),
    Family("qwen3", ("Qwen3ForCausalLM",), "Qwen3 dense", _ENDS, "model.layers.{l}", _LLAMA | _QK_NORM, _WINDOWED),
    Family("olmo2", ("Olmo2ForCausalLM",), "OLMo-2", _ENDS, "model.layers.{l}", _OLMO2, wide_qk_norm=True),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        _ENDS,
        "model.layers.{l}",
        _PHI3,
        _WINDOWED,
        qkv=("qkv",),
        inner=("gate_up",),
        partial_rotary=True,
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        "Gemma 2",
        _ENDS,
        "model.layers.{l}",
        _GEMMA2,
        _GEMMA_FIELDS | {"attention_cap": "attn_logit_softcapping"},
        {"use_bidirectional_attention": False},
        one_offset=True,
        scaled_embedding=True,
    ),
    Family(
        "gemma3_text",
        ("Gemma3ForCausalLM",),
        "Gemma 3 270M and 1B",
        _ENDS,
        "model.layers.{l}",
        _GEMMA2 | _QK_NORM,
        _GEMMA_FIELDS,
        {"use_bidirectional_attention": False},
        one_offset=True,
        scaled_embedding=True,
    ),
    Family(
        "gpt2",
        ("GPT2LMHeadModel",),
        "GPT-2",
        {
            "embed": "transformer.wte",
            "position_embed": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        "transformer.h.{l}",
        _GPT2,
        {"mlp": "n_inner", "activation": "activation_function", "norm_eps": "layer_norm_epsilon"},
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        norm="layer",
        qkv=("qkv",),
        inner=("up",),
        gated=False,
        learned_positions=True,
        transposed=True,
    ),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        "GPT-NeoX, Pythia",
        {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
        "gpt_neox.layers.{l}",
        _NEOX,
        {
            "mlp": "intermediate_size",
            "activation": "hidden_act",
            "norm_eps": "layer_norm_eps",
            "parallel": "use_parallel_residual",
        },
        norm="layer",
        qkv=("qkv",),
        inner=("up",),
        gated=False,
        partial_rotary=True,
        interleaved=True,
    ),
)
# By the names that configs use; the last three are one function.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
}


def supported() -> str:
    """The supported families, for error messages."""
    return "; ".join(f"{a} ({f.examples})" for f in FAMILIES for a in f.architectures)


def find_family(config: Any) -> Family:
    """The table entry of a transformers config.

    Raises:
        UnsupportedModel: by name, for an unknown architecture, a mixture of experts, a pre-quantised checkpoint or a
            variant of a known family that the decoder cannot run.
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
            return _check_fixed(config, architecture, family)
    raise UnsupportedModel(f"architecture {architecture} is not supported. Supported: {supported()}")


def _check_fixed(config: Any, architecture: str, family: Family) -> Family:
    for name, known in family.fixed.items():
        value = getattr(config, name, known)
        if value is not None and value != known:
            raise UnsupportedModel(f"{architecture} with {name} {value!r} is not supported. Supported: {supported()}")
    return family


def _layer_kinds(config: Any) -> list[str]:
    """`sliding_attention` or `full_attention` of each layer; configs that name none have the same window in all."""
    return getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers


def _rope(config: Any, family: Family, head_dim: int, context: int, kind: str | None) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] and the factor on cos and sin, of the layers of one kind where each has its
    own.

    A cached key keeps the rotation it was written with, so the variants that change with the length (dynamic NTK,
    LongRoPE) are fixed by the context that is served, not by the length of a prompt.
    """
    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    scheme = parameters.get("rope_type", "default")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1 and not family.partial_rotary:
        raise UnsupportedModel(f"partial_rotary_factor {partial} has no meaning for {family.name}")
    if scheme != "default":
        if scheme not in ROPE_INIT_FUNCTIONS:
            raise UnsupportedModel(f"rope type {scheme!r} is not known to this transformers version")
        device = torch.device("cpu")
        frequency, scaling = ROPE_INIT_FUNCTIONS[scheme](config, device, seq_len=context, layer_type=kind)
        return frequency.float(), float(scaling)
    rotary = int(head_dim * partial)
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotary, 2).float() / rotary), 1.0


def _ropes(
    config: Any, family: Family, head_dim: int, context: int
) -> tuple[tuple[Tensor, ...], tuple[float, ...], tuple[int, ...]]:
    """The rope tables, the factors on them, and the table of each layer."""
    if family.learned_positions:
        return (), (), ()
    kinds = _layer_kinds(config)
    by_kind = set(kinds) <= set(config.rope_parameters)
    distinct: list[str | None] = [*sorted(set(kinds))] if by_kind else [None]
    tables = [_rope(config, family, head_dim, context, kind) for kind in distinct]
    frequencies, scalings = (tuple(part) for part in zip(*tables, strict=True))
    return frequencies, scalings, tuple(distinct.index(kind) if by_kind else 0 for kind in kinds)


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    """The sliding window of every layer, in tokens."""
    window = family.read(config, "window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in _layer_kinds(config))


def _context(config: Any, family: Family, asked: int | None) -> int:
    limit: int = config.max_position_embeddings
    if family.learned_positions and asked is not None and asked > limit:
        raise UnsupportedModel(f"{family.name} has learned {limit} positions; it cannot serve a context of {asked}")
    return asked or limit


def read_spec(config: Any, context: int | None = None) -> Spec:
    """The `Spec` of a transformers config, served with at most `context` tokens (default: the checkpoint's own limit).

    Raises:
        UnsupportedModel: if the decoder cannot run it.
    """
    family = find_family(config)
    activation, heads = family.read(config, "activation", None), config.num_attention_heads
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"activation {activation!r} of {family.name} is not one of {sorted(ACTIVATIONS)}")
    kv_heads = family.read(config, "kv_heads", heads)
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    limit = _context(config, family, context)
    head_dim = family.read(config, "head_dim", config.hidden_size // heads)
    frequencies, scalings, rope = _ropes(config, family, head_dim, limit)
    return Spec(
        family=family.name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=family.read(config, "mlp", 4 * config.hidden_size),
        vocabulary=config.vocab_size,
        norm=family.norm,
        norm_eps=family.read(config, "norm_eps", None),
        activation=ACTIVATIONS[activation],
        gated=family.gated,
        parallel=bool(family.read(config, "parallel", False)),
        tied=bool(config.tie_word_embeddings),
        context=limit,
        window=_windows(config, family),
        rotary_dim=2 * len(frequencies[0]) if frequencies else 0,
        inverse_frequencies=frequencies,
        rope_scalings=scalings,
        rope=rope,
        learned_positions=family.learned_positions,
        attention_scale=family.read(config, "attention_scalar", head_dim) ** -0.5,
        attention_cap=family.read(config, "attention_cap", 0.0),
        logit_cap=family.read(config, "logit_cap", 0.0),
        embed_scale=config.hidden_size**0.5 if family.scaled_embedding else 1.0,
    )
