"""A Llama-type checkpoint as one GGUF file, llama.cpp's format: weights as stored, sizes, rope, tokenizer.

llama.cpp rotates neighbouring pairs of a head in its `llama` architecture, Hugging Face the two halves of it, so the
query and key rows of these families are put in llama.cpp's order; its `qwen2` and `qwen3` rotate halves as well.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor

from strace.checkpoint import Checkpoint, Weights, open_checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter


class NotConvertible(ValueError):
    """A checkpoint that llama.cpp cannot run as it is, or whose tokenizer it does not have; the message says why."""


@dataclass(frozen=True)
class Converted:
    """What was written. pre_tokenizer: llama.cpp's name of the rule that cuts text into words; `same_words`: whether it
    cut all of our probes as the model's own rule does, so that text gets the same ids."""

    path: Path
    architecture: str
    tensors: int
    bytes: int
    pre_tokenizer: str
    same_words: bool


# By family: llama.cpp's architecture, and whether it rotates neighbouring pairs.
_ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False)}
_ARCHITECTURES |= {"qwen3": ("qwen3", False)}

# The decoder's names to GGUF's.
_ONCE = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
_PER_LAYER = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_TEKKEN = (
    _CASED + "|" + _CASED[:-1].replace("]*[", "]+[") + r"*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's rules for byte-level BPE by its names; the first is taken among equals.
_PRE_TOKENIZERS = {
    "qwen2": (_WORDS % r"\p{N}",),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}",),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (_TEKKEN,),
}
_PROBES = (
    "It's what we'll say, isn't it? You'd think they've",
    "'Sunday' IT'S NOT WHAT WE'LL SAY",
    "In 1999, 12345678 of 3.14159 and 1,000,000",
    "def f(x):\n    if x>=10:\n\t\treturn {'a': [1, 2]}\n\n\n# done  \n",
    "  two  spaces   and a tail   ",
    "naïve café, Straße, Привет мир, 你好世界, مرحبا, हिन्दी",
    "camelCase HTTPServer snake_case a/b//c\r\nline\r\n",
    "emoji 👍🏽 and — dashes… “quotes” ¼ x²",
)


def convert(model: str, output: Path) -> Converted:
    """Write `model` (`embedded`, a folder or a hub name) to `output`, which is there whole or not at all.

    Matrices keep the type they are stored in; norms and biases become float32, as llama.cpp asks.

    Raises:
        NotConvertible: a family, rope, window or tokenizer that llama.cpp does not have; no `gguf` package.
        BadCheckpoint, UnsupportedModel: see strace.checkpoint.
    """
    gguf = _import_gguf()
    checkpoint = open_checkpoint(model)
    _check(checkpoint)
    architecture, _ = _ARCHITECTURES[checkpoint.family.name]
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}."))
        part = Path(scratch) / output.name
        writer = stack.enter_context(closing(gguf.GGUFWriter(part, architecture)))
        _write_sizes(writer, checkpoint)
        pre_tokenizer, same_words = _write_tokenizer(writer, checkpoint)
        count = 0
        for name, tensor in _tensors(Weights(checkpoint, stack), checkpoint):
            _add(gguf, writer, name, tensor)
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        size = part.stat().st_size
        os.replace(part, output)
    return Converted(output, architecture, count, size, pre_tokenizer, same_words)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise NotConvertible("the package gguf is not installed; pip install 'strace-llm[gguf]' brings it") from error
    return gguf


def _check(checkpoint: Checkpoint) -> None:
    """Refuse what llama.cpp would run otherwise than we do."""
    spec, name = checkpoint.spec, f"model {checkpoint.model!r}"
    if checkpoint.family.name not in _ARCHITECTURES:
        families = ", ".join(_ARCHITECTURES)
        raise NotConvertible(f"{name} is of the family {checkpoint.family.name}; GGUF is written for {families}")
    if spec.activation != "silu":
        raise NotConvertible(f"{name} has the activation {spec.activation}; llama.cpp runs its family with silu")
    if any(window is not None and window < spec.context for window in spec.window):
        raise NotConvertible(f"{name} has sliding windows; llama.cpp runs its family without")
    _rope_factors(checkpoint)


def _rope_factors(checkpoint: Checkpoint) -> Tensor | None:
    """float32 [rotary_dim / 2]: what llama.cpp divides its rope frequencies by; None where that is 1 throughout."""
    spec, (_, pairs) = checkpoint.spec, _ARCHITECTURES[checkpoint.family.name]
    plain = _rope_base(checkpoint) ** -(torch.arange(0, spec.rotary_dim, 2).double() / spec.rotary_dim)
    factors = (plain / spec.inverse_frequencies[0].double()).float()
    if spec.rope_scalings[0] == 1 and torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return None
    if spec.rope_scalings[0] != 1 or not pairs:
        kind = checkpoint.config.rope_parameters.get("rope_type")
        raise NotConvertible(
            f"model {checkpoint.model!r} has the rope type {kind!r}, which is not written for its family"
        )
    return factors


def _rope_base(checkpoint: Checkpoint) -> float:
    return float(checkpoint.config.rope_parameters["rope_theta"])


def _write_sizes(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    writer.add_name(Path(checkpoint.model).name)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.mlp)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.rotary_dim)
    writer.add_rope_freq_base(_rope_base(checkpoint))
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocabulary)


def _tensors(weights: Weights, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """GGUF's name and the tensor, one after another."""
    spec, (_, pairs) = checkpoint.spec, _ARCHITECTURES[checkpoint.family.name]
    if (factors := _rope_factors(checkpoint)) is not None:
        yield "rope_freqs.weight", factors
    for name, other in _ONCE.items():
        if (tensor := weights.get(f"{name}.weight")) is not None:
            yield f"{other}.weight", tensor
    for l in range(spec.layers):
        for name, other in _PER_LAYER.items():
            for kind in ("weight", "bias"):
                if (tensor := weights.get(f"{name}.{kind}", l)) is None:
                    continue
                if pairs and name in ("q", "k"):
                    tensor = pair_rows(tensor, spec.head_dim)
                yield f"blk.{l}.{other}.{kind}", tensor


def pair_rows(rows: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, ...] with dimensions i and i + head_dim / 2 of each head side by side, as llama.cpp rotates
    them."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _add(gguf: Any, writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:  # numpy has no bf16: its bytes, and the type beside them
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _write_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> tuple[str, bool]:
    """The vocabulary, merges, specials and chat template; the name of the word rule and whether it is the model's own.

    Ids that the model has and its tokenizer lacks are filled with unused tokens.
    """
    backend = getattr(checkpoint.tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())["model"]
    if backend is None or described["type"] != "BPE" or described["byte_fallback"]:
        raise NotConvertible(f"model {checkpoint.model!r}: only byte-level BPE tokenizers are written to GGUF")
    tokens, kinds = _vocabulary(backend, checkpoint.spec.vocabulary)
    name, same_words = find_pre_tokenizer(backend)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(merges))
    tokenizer = checkpoint.tokenizer
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if checkpoint.stop_ids:
        writer.add_eos_token_id(min(checkpoint.stop_ids))
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return name, same_words


def _vocabulary(backend: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Token texts and GGUF token types (1 normal, 3 control, 4 user defined, 5 unused) of the ids 0..size."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, i in backend.get_vocab().items():
        tokens[i], kinds[i] = token, 1
    for i, added in backend.get_added_tokens_decoder().items():
        tokens[i], kinds[i] = added.content, 3 if added.special else 4
    return tokens, kinds


def find_pre_tokenizer(backend: Tokenizer) -> tuple[str, bool]:
    """llama.cpp's word rule that cuts most of a few probes as this tokenizer does, and whether it cuts them all so."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alike = {}
    for name, patterns in _PRE_TOKENIZERS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        rule = pre_tokenizers.Sequence([*splits, byte_level])
        alike[name] = sum(_words(backend.pre_tokenizer, probe) == _words(rule, probe) for probe in _PROBES)
    best = max(alike, key=alike.__getitem__)
    return best, alike[best] == len(_PROBES)


def _words(rule: pre_tokenizers.PreTokenizer | None, text: str) -> list[str]:
    return [word for word, _ in rule.pre_tokenize_str(text)] if rule is not None else [text]
