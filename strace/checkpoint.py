"""Hugging Face checkpoints in: config, safetensors (single or sharded), tokenizer, generation config.

transformers resolves hub names and reads configs and tokenizers; safetensors gives the weights one at a time, so that nothing
is held twice; accelerate decides which layers go where when one device is too small.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from strace.decoder import MLP, Attention, Decoder, Layer
from strace.families import Family, Spec, find_family, read_spec
from strace.linear import DENSE, FORMATS, Linear, make_linear

EMBEDDED = "embedded"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class BadCheckpoint(ValueError):
    """A model folder or hub name that cannot be read; the message names it and the reason."""


def embedded_folder() -> Path:
    """The embedded model's folder: inside an installed package, else in the checkout."""
    installed = Path(str(files("strace"))) / "embedded"
    return installed if installed.exists() else Path(__file__).parents[1] / "models" / "embedded"


def resolve(model: str) -> str:
    """`embedded`, a folder or a hub name -> what transformers loads."""
    return str(embedded_folder() / "model") if model == EMBEDDED else model


@dataclass
class Checkpoint:
    """A model that has been found and described, its weights not yet read.

    Raises (from `open_checkpoint`):
        BadCheckpoint: no such folder, no config, no or corrupt weights.
        UnsupportedModel: an architecture, quantisation or rope type the decoder does not run.
    """

    model: str
    config: Any
    spec: Spec
    family: Family
    shards: list[Path]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or `local`."""
        return str(getattr(self.config, "_commit_hash", None) or "local")

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 over the weight files, in name order: what a subgraph says it was cut from."""
        digest = hashlib.sha256()
        for shard in sorted(self.shards):
            with shard.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary with its ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def open_checkpoint(model: str, context: int | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Find and describe `model`: `embedded`, a folder, or a hub name."""
    source = resolve(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        family, spec = find_family(config), read_spec(config, context)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        shards = _find_shards(source)
    except (OSError, json.JSONDecodeError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise BadCheckpoint(f"cannot read model {model!r}: {_first_line(error)}") from error
    return Checkpoint(model, config, spec, family, shards, tokenizer, _stop_ids(source, config, tokenizer))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _find_shards(source: str) -> list[Path]:
    index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(source, SINGLE, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise OSError(f"no {SINGLE} and no {INDEX}; only safetensors weights are read")
        return [Path(single)]
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(str(cached_file(source, name))) for name in names]


def _stop_ids(source: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every end-of-text id that the generation config, the config or the tokenizer names."""
    try:
        generation = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        generation = None
    found: set[int] = set()
    for ids in (generation, config.eos_token_id, tokenizer.eos_token_id):
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


class Weights:
    """The checkpoint's tensors by the decoder's names, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._holders: dict[str, Any] = {}
        for shard in checkpoint.shards:
            try:
                opened = stack.enter_context(safe_open(shard, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"cannot read weights {shard}: {_first_line(error)}") from error
            self._holders |= dict.fromkeys(opened.keys(), opened)

    def get(self, name: str, layer: int = 0) -> Tensor | None:
        """The tensor of a decoder name such as `q.weight`; None where the family lets it be absent."""
        family = self._checkpoint.family
        full = family.names.get(name)
        if full is None:
            return None
        full = full.format(l=layer)
        if full in self._holders:
            return self._holders[full].get_tensor(full)
        if name in family.optional or (name == "head.weight" and self._checkpoint.spec.tied):
            return None
        raise BadCheckpoint(f"model {self._checkpoint.model!r} lacks the weight {full}")

    def need(self, name: str, layer: int = 0) -> Tensor:
        """As `get`, for a name that every checkpoint has."""
        tensor = self.get(name, layer)
        assert tensor is not None
        return tensor


def place_layers(
    checkpoint: Checkpoint, dtype: torch.dtype, max_memory: dict[int | str, int | str] | None
) -> list[torch.device]:
    """The device of every layer by accelerate's plan: fill the first device, go on with the next, last the CPU.

    Raises:
        BadCheckpoint: if all devices together are too small (this decoder does not run from disk).
    """
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    plan = infer_auto_device_map(skeleton, max_memory, no_split_module_classes=skeleton._no_split_modules, dtype=dtype)
    places = []
    for l in range(checkpoint.spec.layers):
        name = f"model.layers.{l}"
        place = next(device for prefix, device in plan.items() if prefix == "" or f"{name}.".startswith(f"{prefix}."))
        if place == "disk":
            raise BadCheckpoint(
                f"model {checkpoint.model!r} does not fit the devices' memory {max_memory or ''}".rstrip()
            )
        places.append(torch.device(place))
    return places


def load_decoder(
    checkpoint: Checkpoint,
    format: str = "bf16",
    device: str = "cpu",
    max_memory: dict[int | str, int | str] | None = None,
) -> Decoder:
    """The full model with every matrix in `format`, on `device`, or spread by accelerate for `device="auto"`.

    Norms stay float32; embeddings are kept in the compute dtype (fp32 for format fp32, else bf16).
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    spec, dtype = checkpoint.spec, DENSE.get(format, torch.bfloat16)
    devices = [torch.device(device)] * spec.layers if device != "auto" else place_layers(checkpoint, dtype, max_memory)
    with ExitStack() as stack:
        weights = Weights(checkpoint, stack)
        layers = [_load_layer(weights, spec, l, format, dtype, devices[l]) for l in range(spec.layers)]
        embed = weights.need("embed.weight").to(devices[0], dtype)
        stored = weights.get("head.weight")
        head = embed.to(devices[-1]) if stored is None else stored.to(devices[-1], dtype)
        norm = weights.need("final_norm.weight").to(devices[-1], torch.float32)
    spread = devices if len(set(devices)) > 1 else []
    return Decoder(spec, embed, layers, norm, make_linear(head, None, format), dtype, devices=spread)


def _load_layer(weights: Weights, spec: Spec, l: int, format: str, dtype: torch.dtype, device: torch.device) -> Layer:
    def stack(*names: str) -> tuple[Tensor, Tensor | None]:
        parts = [weights.need(f"{n}.weight", l) for n in names]
        biases = [weights.get(f"{n}.bias", l) for n in names]
        filled = [p.new_zeros(len(p)) if b is None else b for p, b in zip(parts, biases, strict=True)]
        bias = None if all(b is None for b in biases) else torch.cat(filled).to(device, dtype)
        return torch.cat(parts).to(device, dtype), bias

    def norm(name: str) -> Tensor | None:
        tensor = weights.get(name, l)
        return None if tensor is None else tensor.to(device, torch.float32)

    attention_norm, mlp_norm = norm("attention_norm.weight"), norm("mlp_norm.weight")
    assert attention_norm is not None and mlp_norm is not None
    attention = Attention(
        norm=attention_norm,
        qkv=make_linear(*stack("q", "k", "v"), format),
        o=make_linear(*stack("o"), format),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        window=spec.window[l],
        q_norm=norm("q_norm.weight"),
        k_norm=norm("k_norm.weight"),
    )
    mlp = MLP(mlp_norm, make_linear(*stack("gate", "up"), format), make_linear(*stack("down"), format))
    return Layer(attention, mlp)


def quantise_decoder(decoder: Decoder, format: str) -> Decoder:
    """A whole-model copy of `decoder` in `format`, made in seconds: the draft that needs no trace.

    Embeddings, norms and everything else that is not a matrix product are shared, not copied.
    """

    def convert(linear: Linear) -> Linear:
        return make_linear(linear.dense().to(decoder.dtype), linear.bias, format)

    layers = []
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        assert attention is not None and mlp is not None
        attention = replace(attention, qkv=convert(attention.qkv), o=convert(attention.o))
        layers.append(Layer(attention, replace(mlp, gate_up=convert(mlp.gate_up), down=convert(mlp.down))))
    return replace(decoder, layers=layers, head=convert(decoder.head))
