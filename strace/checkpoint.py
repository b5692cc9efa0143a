"""Hugging Face checkpoints in: config, safetensors (single or sharded), tokenizer, generation config.

transformers resolves hub names and reads configs and tokenizers; safetensors gives the weights one at a time, so that
nothing is held twice; accelerate decides which layers go where when one device is too small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from strace.decoder import MLP, Attention, Decoder, Layer, Norm
from strace.families import Family, Spec, UnsupportedModel, find_family, read_spec, supported
from strace.layers import Layers, map_layers
from strace.linear import DENSE, FORMATS, Linear, make_linear

EMBEDDED = "embedded"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
GENERATION = "generation_config.json"


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
    _check_place(model, source)
    try:
        config = _read_config(source, trust_remote_code)
        family, spec = find_family(config), read_spec(config, context)
        tokenizer = _read_tokenizer(source, trust_remote_code)
        shards = _find_shards(source)
        stop_ids = _stop_ids(source, config, tokenizer)
    except (OSError, json.JSONDecodeError, HfHubHTTPError, StrictDataclassError) as error:
        raise BadCheckpoint(f"cannot read model {model!r}: {_first_line(error)}") from error
    return Checkpoint(model, config, spec, family, shards, tokenizer, stop_ids)


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])


def _check_place(model: str, source: str) -> None:
    """Refuse what can be neither a folder nor a hub name, before the hub is asked for it."""
    if Path(source).is_dir():
        if not (Path(source) / "config.json").exists():
            raise BadCheckpoint(f"cannot read model {model!r}: the folder has no config.json")
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise BadCheckpoint(f"cannot read model {model!r}: no such folder")


def _read_config(source: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a model type that transformers does not know, or one that brings its own code
        raise UnsupportedModel(f"{_first_line(error)} Supported: {supported()}") from error


def _read_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except HfHubHTTPError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise OSError(f"its tokenizer cannot be read: {_first_line(error)}") from error


def _find_shards(source: str) -> list[Path]:
    index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(source, SINGLE, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise OSError(f"no {SINGLE} and no {INDEX}; other formats are not read (pickled .bin files can run code)")
        return [Path(single)]
    places = json.loads(Path(index).read_text()).get("weight_map")
    if not places:
        raise OSError(f"{INDEX} has no weight_map")
    return [Path(str(cached_file(source, name))) for name in sorted(set(places.values()))]


def _stop_ids(source: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every end-of-text id that the generation config, the config or the tokenizer names."""
    there = cached_file(source, GENERATION, _raise_exceptions_for_missing_entries=False)
    generation = GenerationConfig.from_pretrained(source).eos_token_id if there else None
    found: set[int] = set()
    for ids in (generation, config.eos_token_id, tokenizer.eos_token_id):
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


def expected_shape(family: Family, spec: Spec, name: str) -> tuple[int, ...]:
    """The shape in the decoder that `spec` asks of the weight with this decoder name."""
    part, kind = name.split(".")
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if part in ("q_norm", "k_norm"):
        return ((q if part == "q_norm" else kv) if family.wide_qk_norm else spec.head_dim,)
    if part.endswith("norm"):
        return (spec.hidden,)
    rows = {"q": q, "k": kv, "v": kv, "qkv": q + 2 * kv, "o": spec.hidden}
    rows |= {"gate": spec.mlp, "up": spec.mlp, "gate_up": 2 * spec.mlp, "down": spec.hidden}
    columns = {"o": q, "down": spec.mlp}
    n = rows.get(part, spec.vocabulary)
    return (n,) if kind == "bias" else (n, columns.get(part, spec.hidden))


class Weights:
    """The checkpoint's tensors by the decoder's names, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.family = checkpoint.family
        self._checkpoint, self._spec = checkpoint, checkpoint.spec
        self._holders: dict[str, Any] = {}
        for shard in checkpoint.shards:
            try:
                opened = stack.enter_context(safe_open(shard, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"cannot read weights {shard}: {_first_line(error)}") from error
            self._holders |= dict.fromkeys(opened.keys(), opened)

    def get(self, name: str, layer: int = 0) -> Tensor | None:
        """The tensor of a decoder name such as `q.weight`, in the decoder's layout; None where it may be absent: a
        module that the family lacks, a bias, a tied head."""
        part, kind = name.split(".")
        module = self.family.module(part, layer)
        if module is None:
            return None
        # A checkpoint saved without its head lacks the outermost module's name, as GPT-2's on the hub do.
        for stored in (f"{module}.{kind}", f"{module}.{kind}".partition(".")[2]):
            if stored in self._holders:
                return self._arrange(stored, name)
        if kind == "bias" or (part == "head" and self._spec.tied):
            return None
        raise BadCheckpoint(f"model {self._checkpoint.model!r} lacks the weight {module}.{kind}")

    def _arrange(self, stored: str, name: str) -> Tensor:
        """The tensor stored under a name, checked and brought into the decoder's layout."""
        tensor, part = self._holders[stored].get_tensor(stored), name.split(".")[0]
        shape = self._shape(name)
        transposed = self.family.transposed and part in self.family.parts
        wanted = list(shape[::-1] if transposed else shape)
        if list(tensor.shape) != wanted:
            found = list(tensor.shape)
            raise BadCheckpoint(
                f"model {self._checkpoint.model!r}: weight {stored} is {found}, its config asks for {wanted}"
            )
        if transposed and tensor.ndim == 2:
            tensor = tensor.T
        if part == "qkv" and self.family.interleaved:
            return tensor.view(self._spec.heads, 3, self._spec.head_dim, -1).transpose(0, 1).reshape(shape)
        return tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        if name == "position_embed.weight":  # all that were learned, however few are served
            return (self._checkpoint.config.max_position_embeddings, self._spec.hidden)
        return expected_shape(self.family, self._spec, name)

    def need(self, name: str, layer: int = 0) -> Tensor:
        """As `get`, for a name that every checkpoint has."""
        tensor = self.get(name, layer)
        assert tensor is not None
        return tensor

    def norm(self, part: str, device: torch.device, layer: int = 0) -> Norm | None:
        """A norm in float32; None where the family has none."""
        weight, bias = self.get(f"{part}.weight", layer), self.get(f"{part}.bias", layer)
        if weight is None:
            return None
        # Copies: a view of a mapped file would keep all that was read of it.
        weight = weight.to(device, torch.float32, copy=True)
        weight = weight + 1 if self.family.one_offset else weight
        bias = None if bias is None else bias.to(device, torch.float32, copy=True)
        return Norm(weight, bias, self._spec.norm_eps, self._spec.norm)

    def linear(self, parts: tuple[str, ...], layer: int, format: str, dtype: torch.dtype, at: torch.device) -> Linear:
        """The matrices of `parts`, one over the other, in `format`."""
        weights = [self.need(f"{part}.weight", layer) for part in parts]
        biases = [self.get(f"{part}.bias", layer) for part in parts]
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        bias = None if all(b is None for b in biases) else torch.cat(filled).to(at, dtype)
        return make_linear(torch.cat(weights).to(at, dtype), bias, format)


def place_layers(
    checkpoint: Checkpoint, dtype: torch.dtype, max_memory: dict[int | str, int | str] | None
) -> list[torch.device]:
    """The device of every layer, then that of the head, by accelerate's plan: fill the first device, then the next,
    last the CPU.

    Raises:
        BadCheckpoint: if all devices together are too small (this decoder does not run from disk).
    """
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)
    skeleton.tie_weights()
    memory = None if max_memory is None else dict(max_memory)  # accelerate rewrites its argument
    plan = infer_auto_device_map(skeleton, memory, no_split_module_classes=skeleton._no_split_modules, dtype=dtype)
    # The head's module is asked for: GPT-NeoX's has another name in transformers than in its checkpoints.
    head = next(name for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings())
    layers = [checkpoint.family.layer.format(l=l) for l in range(checkpoint.spec.layers)]
    places = []
    for name in (*layers, head):
        place = next(device for prefix, device in plan.items() if prefix == "" or f"{name}.".startswith(f"{prefix}."))
        if place == "disk":
            raise BadCheckpoint(
                f"model {checkpoint.model!r} does not fit the devices' memory {max_memory or ''}".rstrip()
            )
        places.append(torch.device("cuda", place) if isinstance(place, int) else torch.device(place))
    return places


def load_decoder(
    checkpoint: Checkpoint,
    format: str = "bf16",
    device: str = "cpu",
    max_memory: dict[int | str, int | str] | None = None,
    streamed: bool = False,
) -> Decoder:
    """The full model with every matrix in `format`, on `device`, or spread by accelerate for `device="auto"`. Where it
    is `streamed`, a layer is read when it is asked for (`strace.layers`).

    Norms stay float32; embeddings are kept in the compute dtype (fp32 for format fp32, else bf16).
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    dtype = DENSE.get(format, torch.bfloat16)
    spec = _round_embed_scale(checkpoint.spec, dtype)
    everywhere = [torch.device(device)] * (spec.layers + 1) if device != "auto" else []
    *devices, last = everywhere or place_layers(checkpoint, dtype, max_memory)

    def read(l: int) -> Layer:
        """A layer from files opened for it alone: what a mapped file has shown stays in memory until it is closed."""
        with ExitStack() as stack:
            return _load_layer(Weights(checkpoint, stack), spec, l, format, dtype, devices[l])

    with ExitStack() as stack:
        weights = Weights(checkpoint, stack)
        embed = weights.need("embed.weight").to(devices[0], dtype)
        stored, bias = weights.get("head.weight"), weights.get("head.bias")
        head = embed.to(last) if stored is None else stored.to(last, dtype)
        bias = None if bias is None else bias.to(last, dtype)
        norm, positions = weights.norm("final_norm", last), weights.get("position_embed.weight")
        layers: Sequence[Layer] = Layers(spec.layers, read)
        if not streamed:
            layers = [_load_layer(weights, spec, l, format, dtype, devices[l]) for l in range(spec.layers)]
    assert norm is not None
    return Decoder(
        spec=spec,
        embed=embed,
        layers=layers,
        final_norm=norm,
        head=make_linear(head, bias, format),
        dtype=dtype,
        position_embed=None if positions is None else positions[: spec.context].to(devices[0], torch.float32),
        devices=devices if len({*devices, last}) > 1 else [],
    )


def _round_embed_scale(spec: Spec, dtype: torch.dtype) -> Spec:
    """transformers multiplies by the scale as the compute dtype has it, and so did the model's training."""
    return replace(spec, embed_scale=torch.tensor(spec.embed_scale).to(dtype).item())


def _load_layer(weights: Weights, spec: Spec, l: int, format: str, dtype: torch.dtype, device: torch.device) -> Layer:
    def linear(*parts: str) -> Linear:
        return weights.linear(parts, l, format, dtype, device)

    def norm(part: str) -> Norm | None:
        return weights.norm(part, device, l)

    attention = Attention(
        norm=norm("attention_norm"),
        post_norm=norm("attention_post_norm"),
        qkv=linear(*weights.family.qkv),
        o=linear("o"),
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        scale=spec.attention_scale,
        cap=spec.attention_cap,
        window=spec.window[l],
        rope=spec.rope[l] if spec.rope else 0,
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
    )
    inner = linear(*weights.family.inner)
    return Layer(attention, MLP(norm("mlp_norm"), norm("mlp_post_norm"), inner, linear("down"), spec.gated))


def quantise_decoder(decoder: Decoder, format: str) -> Decoder:
    """A whole-model copy of `decoder` in `format`, made in seconds: the draft that needs no trace.

    Embeddings, norms and everything else that is not a matrix product are shared, not copied.
    """

    layers = map_layers(decoder.layers, lambda _, layer: quantise_layer(layer, format, decoder.dtype))
    return replace(decoder, layers=layers, head=quantise_linear(decoder.head, format, decoder.dtype))


def quantise_layer(layer: Layer, format: str, dtype: torch.dtype) -> Layer:
    """A copy of a layer with every matrix in `format`."""

    def convert(linear: Linear) -> Linear:
        return quantise_linear(linear, format, dtype)

    a, m = layer.attention, layer.mlp
    attention = None if a is None else replace(a, qkv=convert(a.qkv), o=convert(a.o))
    return Layer(attention, None if m is None else replace(m, inner=convert(m.inner), down=convert(m.down)))


def quantise_linear(linear: Linear, format: str, dtype: torch.dtype) -> Linear:
    """A copy of a matrix in `format`."""
    weight = linear.weight if isinstance(linear.weight, Tensor) else linear.weight.dense()
    return make_linear(weight.to(dtype), linear.bias, format)
