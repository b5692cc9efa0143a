"""Tiny random models in Hugging Face folders, a byte-level tokenizer, and runners of them, all made in-process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from strace.decoder import Decoder, Layer, Norm
from strace.kv import BLOCK, make_cache
from strace.linear import Linear
from strace.runner import FULL, TorchRunner

BOS, EOS, END = "<|begin|>", "<|end_of_text|>", "<|end_of_turn|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end_of_turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
_KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
# Two heads on two key/value heads where a family has no grouped queries, so that its groups number the same.
_MULTI_HEAD: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": None, "head_dim": None}
_OWN: dict[str, dict[str, Any]] = {
    "phi3": {"sliding_window": 11, "partial_rotary_factor": 0.75},
    # Caps as small as tiny scores and logits, else they would change nothing; sliding, full, sliding layers.
    "gemma2": {
        "sliding_window": 11,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 11, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    "gpt2": {**_MULTI_HEAD, "n_inner": 96, "intermediate_size": None},
    "gpt_neox": _MULTI_HEAD,
}
KINDS = tuple(_KINDS)
# Every family as its edges are checked: also with a bias after the heads, and parallel blocks in turn.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in KINDS} | {
    "llama_bias": ("llama", {"attention_bias": True}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
}
_UNSET = frozenset({"pad_token_id", "sliding_window"})  # settings of which None is a value of its own


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """256 byte tokens (ids 0..255), no merges, and three specials (256..258): any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, additional_special_tokens=[END]
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_tiny(family: str = "llama", seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A random float32 model of 3 layers, 4 query (GPT: 2) and 2 key/value heads, in eval mode, attention eager, biases
    and norms random too."""
    config_type, model_type = _KINDS[family]
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
        "architectures": [model_type.__name__],
    }
    torch.manual_seed(seed)
    settings |= _OWN.get(family, {}) | config_overrides
    config = config_type(**{name: value for name, value in settings.items() if value is not None or name in _UNSET})
    model = model_type._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts biases at 0 and norms at 1, and weights so small that no attention is ever sharp.
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif is_norm(name):
                parameter.uniform_(0.5, 1.5)
                parameter -= 1 if family.startswith("gemma") else 0
            else:
                inputs = parameter.shape[0] if ".h." in name else parameter.shape[-1]
                parameter.normal_(0, inputs**-0.5)
    return model


def is_norm(name: str) -> bool:
    """Whether a transformers parameter is a norm's."""
    return "norm" in name or ".ln_" in name


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **config_overrides: Any) -> Path:
    """Save `make_tiny`'s model and `make_tokenizer`'s tokenizer, and give the folder."""
    make_tiny(family, seed, **config_overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_variant(folder: Path, variant: str) -> Path:
    """`save_tiny` of one of `VARIANTS`."""
    family, options = VARIANTS[variant]
    return save_tiny(folder, family, **options)


def scatter_blocks(lengths: list[int], blocks: int, seed: int = 0) -> torch.Tensor:
    """Block tables [S, B] for sequences of up to `lengths` tokens: disjoint, in random order, out of `blocks`."""
    needed = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[: sum(needed)]
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int64)
    for row, part in zip(tables, order.split(needed), strict=True):
        row[: len(part)] = part
    return tables


def make_runner(graphs: dict[str, Decoder], blocks: int = 32) -> TorchRunner:
    """A runner of `graphs`, the one named `full` among them, over an empty cache."""
    full = graphs[FULL]
    return TorchRunner(graphs, make_cache(full.spec, blocks, full.dtype))


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    """int64 [count] ids that every tiny model has."""
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def keep_heads(decoder: Decoder, kept: list[list[int] | None]) -> Decoder:
    """A subgraph of dense `decoder` with the key/value heads `kept` of each layer (None: no attention there at all)."""
    group, d = decoder.spec.group, decoder.spec.head_dim
    layers = []
    for layer, heads in zip(decoder.layers, kept, strict=True):
        whole = layer.attention
        assert whole is not None
        if heads is None:
            layers.append(Layer(None, layer.mlp))
            continue
        queries = [head * group + i for head in heads for i in range(group)]
        columns = torch.tensor([head * d + i for head in queries for i in range(d)])
        key_rows = torch.tensor([(whole.heads + head) * d + i for head in heads for i in range(d)])
        rows = torch.cat([columns, key_rows, key_rows + whole.kv_heads * d])
        bias = None if whole.qkv.bias is None else whole.qkv.bias[rows]
        attention = replace(
            whole,
            qkv=Linear(whole.qkv.dense()[rows].to(decoder.dtype), bias, decoder.dtype),
            o=Linear(whole.o.dense()[:, columns].contiguous().to(decoder.dtype), whole.o.bias, decoder.dtype),
            heads=len(queries),
            kv_heads=len(heads),
            q_norm=_cut_norm(whole.q_norm, queries, d),
            k_norm=_cut_norm(whole.k_norm, heads, d),
            kept=torch.tensor(heads),
        )
        layers.append(Layer(attention, layer.mlp))
    return replace(decoder, layers=layers)


def _cut_norm(norm: Norm | None, heads: list[int], head_dim: int) -> Norm | None:
    """Some heads of a norm over all of them; a norm of single heads as it is."""
    if norm is None or len(norm.weight) == head_dim:
        return norm
    return replace(norm, weight=norm.weight.view(-1, head_dim)[heads].flatten())
