"""A subgraph on disk: one folder per class with `subgraph.json` and `subgraph.safetensors`.

The tensors are what the base model does not have: codes and scales, fitted output projections and biases, numbers of
kept neurons and head rows. Everything else is taken from the base at load, so a folder belongs to exactly one base
model, known by its weight hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from strace.checkpoint import Checkpoint
from strace.classes import POOLED
from strace.decoder import Decoder, Layer
from strace.files import file_beside, folder_beside, write_beside
from strace.keep import Kept, Plan, slice_layer, take
from strace.layers import map_layers
from strace.linear import Codes, Linear
from strace.onpolicy import Positions

SCHEMA = 1
MANIFEST, TENSORS = "subgraph.json", "subgraph.safetensors"


class BadSubgraph(ValueError):
    """A subgraph folder that cannot be used; the message names the folder and the reason."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Base(_Record):
    """The model that the subgraph was cut from; kv_heads and neurons are those of a layer."""

    model: str
    revision: str
    weight_hash: str
    tokenizer_hash: str
    kv_heads: int
    neurons: int


class Data(_Record):
    """The texts of one use (fit, choose, report): counts, and the SHA-256 of their tokens. repeats: prompts left out
    because an earlier use has most of their words in the same order."""

    prompts: int
    sources: int
    tokens: int
    hash: str
    repeats: int = 0


class KeptLayer(_Record):
    """Numbers of the kept key/value groups, and how many neurons are kept."""

    groups: list[int]
    neurons: int


class Machine(_Record):
    """Where costs and acceptance were measured."""

    device: str
    processor: str
    threads: int
    runner: str
    torch: str
    isa: str = ""
    dtype: str = ""


class Candidate(_Record):
    """A plan that was tried. accepted and agreement at draft positions 1..8 on the full model's own continuations of
    the prompts to choose by, at temperature 1 and greedy, where all drafts before stood; c and v in full steps. speedup
    and greedy: predicted, at temperature 1 and 0. best: no other candidate is both smaller and faster."""

    plan: Plan
    bytes_share: float
    accepted: list[float]
    agreement: list[float]
    c: float
    v: dict[int, float]
    full_ms: float
    speedup: float
    draft_length: int
    greedy: float = 0.0
    head_rows: int = 0
    best: bool = False


class OnPolicy(_Record):
    """One temperature of positions.safetensors, of the prompts to report. accepted, agreement: at draft positions 1..8,
    accepted where all drafts before stood. tv: mean. curve, reliability, ece: `strace.onpolicy.Calibrated`."""

    accepted: list[float]
    agreement: list[float]
    tv: float
    positions: int
    curve: list[float]
    reliability: list[tuple[float, float, float]]
    ece: float


class Measured(_Record):
    """On the texts to report, which nothing was fitted on or chosen by. accepted is 1 - TV at temperature 1."""

    accepted: list[float]
    agreement: list[float]
    positions: int
    coverage: float
    bytes_per_step: int
    bytes_share: float
    on_policy: dict[str, OnPolicy] = {}


class Beside(_Record):
    """A class beside `pooled`, whose subgraph has the tensors of the hash `pooled`: what is predicted to be gained at
    temperature 1, the middle 95 % of draws of the sources (strace.beside), and how many sources those are."""

    pooled: str
    gain: float
    interval: tuple[float, float]
    sources: int


class Manifest(_Record):
    """All that `subgraph.json` says. `recipe` is the hash of everything that the tensors depend on. A subgraph that
    does not pay where it was traced, or does not surely gain `beside` pooled, is not served: `why` says so, and
    `pooled` drafts for the class. distilled: minutes of training that the subgraph went through; 0 also where training
    did not pay."""

    schema_version: Literal[1] = 1
    class_name: str = Field(alias="class")
    created: str
    base: Base
    seed: int
    recipe: str
    data: dict[str, Data]
    plan: Plan
    why: str
    pays: bool = True
    distilled: float = 0.0
    kept: list[KeptLayer]
    head_rows: int
    measured: Measured
    candidates: list[Candidate]
    machine: Machine
    beside: Beside | None = None
    tensors_hash: str = ""


def pack(codes: Tensor) -> Tensor:
    """int4 codes int8 [N, K] -> uint8 [N, K / 2]: code + 8, the even input in the low half."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | shifted[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8) - 8


def _list_linears(decoder: Decoder) -> Iterator[tuple[str, Linear, bool]]:
    """Every matrix by its stored name, and whether repair fitted it (then it is stored even when dense)."""
    for l, layer in enumerate(decoder.layers):
        if layer.attention is not None:
            yield f"layers.{l}.qkv", layer.attention.qkv, False
            yield f"layers.{l}.o", layer.attention.o, True
        if layer.mlp is not None:
            yield f"layers.{l}.gate_up", layer.mlp.inner, False  # schema 1's name, whether there is a gate or not
            yield f"layers.{l}.down", layer.mlp.down, True
    yield "head", decoder.head, False


def collect_tensors(subgraph: Decoder, kept: Kept) -> dict[str, Tensor]:
    """What is stored of a subgraph."""
    tensors: dict[str, Tensor] = {}
    for name, linear, fitted in _list_linears(subgraph):
        if linear.codes is not None:
            codes = linear.codes.codes
            tensors[f"{name}.codes"] = pack(codes) if linear.format == "int4" else codes
            tensors[f"{name}.scales"] = linear.codes.scales
        elif fitted:
            tensors[f"{name}.weight"] = linear.dense().to(subgraph.dtype)
        if fitted and linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias
    for l, neurons in enumerate(kept.neurons):
        if 0 < len(neurons) < subgraph.spec.mlp:
            tensors[f"layers.{l}.neurons"] = neurons.to(torch.int32)
    if kept.token_ids is not None:
        tensors["head.ids"] = kept.token_ids.to(torch.int32)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def save_tensors(path: Path, subgraph: Decoder, kept: Kept) -> None:
    """Write a subgraph's tensors alone: what `restore_tensors` needs beside `kept`."""
    with file_beside(path) as file:
        save_file(collect_tensors(subgraph, kept), file)


def restore_tensors(path: Path, kept: Kept, full: Decoder) -> Decoder | None:
    """The subgraph whose tensors `save_tensors` wrote; None where there are none that can be read. Its layers are made
    when asked for where those of `full` are."""
    try:
        subgraph = _fill(kept, load_file(path), full)
        for _ in subgraph.layers:  # so that what is missing is told now
            pass
        return subgraph
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None


def save_subgraph(
    folder: Path, manifest: Manifest, subgraph: Decoder, kept: Kept, positions: Positions | None = None
) -> Manifest:
    """Write a subgraph's folder beside `folder`, then put it in its place; the manifest with the tensors' hash is given
    back."""
    with folder_beside(folder) as beside:
        save_tensors(beside / TENSORS, subgraph, kept)
        if positions is not None:
            positions.save(beside)
        manifest = manifest.model_copy(update={"tensors_hash": _hash_file(beside / TENSORS)})
        (beside / MANIFEST).write_text(_format(manifest), encoding="utf-8")
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a subgraph that is there, in place of its old one."""
    write_beside(folder / MANIFEST, _format(manifest))


def _format(manifest: Manifest) -> str:
    return manifest.model_dump_json(by_alias=True, indent=1) + "\n"


def _hash_file(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """`subgraph.json` of a class's folder.

    Raises:
        BadSubgraph: if it is missing, no JSON, of another schema version, or has missing or unknown fields.
    """
    try:
        raw: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadSubgraph(f"subgraph {folder}: cannot read {MANIFEST}: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise BadSubgraph(f"subgraph {folder}: schema version {version!r} is not known; this version reads {SCHEMA}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadSubgraph(f"subgraph {folder}: {MANIFEST}: {place}: {first['msg']}") from error


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """`subgraph.safetensors`, once its hash is the manifest's.

    Raises:
        BadSubgraph: if it is missing, corrupt or not the file that the manifest describes.
    """
    path = folder / TENSORS
    try:
        if _hash_file(path) != manifest.tensors_hash:
            raise BadSubgraph(f"subgraph {folder}: {TENSORS} is corrupt: its hash is not the one in {MANIFEST}")
        # Cloned: in the file tensors lie at any multiple of 8 bytes, and torch's int8 kernel crashes below 64.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise BadSubgraph(f"subgraph {folder}: cannot read {TENSORS}: {error}") from error


def check_base(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Refuse a subgraph of another model.

    Raises:
        BadSubgraph: if the weight or tokenizer hash differs.
    """
    if manifest.base.weight_hash != checkpoint.weight_hash:
        raise BadSubgraph(
            f"subgraph {folder} was cut from another model ({manifest.base.model}, revision {manifest.base.revision}); "
            f"the weights of {checkpoint.model} differ"
        )
    if manifest.base.tokenizer_hash != checkpoint.tokenizer_hash:
        raise BadSubgraph(f"subgraph {folder} was made with another tokenizer than that of {checkpoint.model}")


def load_subgraph(folder: Path, checkpoint: Checkpoint, full: Decoder) -> Decoder:
    """The subgraph of one class's folder, sharing with `full` every tensor that it did not change.

    Raises:
        BadSubgraph: naming the folder and the reason.
    """
    manifest = read_manifest(folder)
    if manifest.class_name != folder.name:
        raise BadSubgraph(f"subgraph {folder} is of the class {manifest.class_name!r}; the folder must bear its name")
    check_base(folder, manifest, checkpoint)
    tensors = read_tensors(folder, manifest)
    try:
        subgraph = _build(manifest, tensors, full)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise BadSubgraph(f"subgraph {folder}: {TENSORS} does not fit {MANIFEST}: {error}") from error
    return replace(subgraph, coverage=manifest.measured.coverage)


def _build(manifest: Manifest, tensors: dict[str, Tensor], full: Decoder) -> Decoder:
    return _fill(_read_kept(manifest, tensors, full), tensors, full)


def _fill(kept: Kept, tensors: dict[str, Tensor], full: Decoder) -> Decoder:
    def read(name: str, sliced: Linear) -> Linear:
        return _read_linear(tensors, name, sliced, full.dtype)

    def fill(l: int, whole: Layer) -> Layer:
        layer = slice_layer(whole, kept.groups[l], kept.neurons[l], full.spec)
        a, m, at = layer.attention, layer.mlp, f"layers.{l}"
        a = None if a is None else replace(a, qkv=read(f"{at}.qkv", a.qkv), o=read(f"{at}.o", a.o))
        m = None if m is None else replace(m, inner=read(f"{at}.gate_up", m.inner), down=read(f"{at}.down", m.down))
        return Layer(a, m)

    ids = None if kept.token_ids is None else kept.token_ids.to(full.embed.device)
    head = read("head", full.head if ids is None else take(full.head, rows=ids))
    return replace(full, layers=map_layers(full.layers, fill), head=head, token_ids=ids)


def _read_kept(manifest: Manifest, tensors: dict[str, Tensor], full: Decoder) -> Kept:
    if len(manifest.kept) != full.spec.layers:
        raise ValueError(f"{len(manifest.kept)} layers, the model has {full.spec.layers}")
    groups = tuple(torch.tensor(layer.groups, dtype=torch.int64) for layer in manifest.kept)
    neurons = tuple(
        tensors[f"layers.{l}.neurons"].long() if 0 < layer.neurons < full.spec.mlp else torch.arange(layer.neurons)
        for l, layer in enumerate(manifest.kept)
    )
    ids = tensors.get("head.ids")
    return Kept(groups, neurons, None if ids is None else ids.long())


def _read_linear(tensors: dict[str, Tensor], name: str, sliced: Linear, dtype: torch.dtype) -> Linear:
    """The stored matrix in place of the sliced one; its bias too, where one is stored."""
    device = sliced.dense().device
    bias = tensors.get(f"{name}.bias")
    bias = sliced.bias if bias is None else bias.to(device, dtype)
    weight: Tensor | Codes
    if f"{name}.codes" in tensors:
        codes = tensors[f"{name}.codes"]
        four = codes.dtype == torch.uint8
        scales = tensors[f"{name}.scales"].to(device)
        weight = Codes("int4" if four else "int8", (unpack(codes) if four else codes).to(device), scales)
    elif f"{name}.weight" in tensors:
        weight = tensors[f"{name}.weight"].to(device, dtype)
    else:
        return sliced
    linear = Linear(weight, bias, dtype)
    if linear.shape != sliced.shape:
        raise ValueError(f"{name} is {linear.shape}, expected {sliced.shape}")
    return linear


def find_subgraphs(folder: Path) -> dict[str, Path]:
    """The class folders inside `folder`, by class.

    Raises:
        BadSubgraph: if there is none.
    """
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise BadSubgraph(f"no subgraph in {folder}: expected CLASS/{MANIFEST}")
    return {path.name: path for path in found}


def load_subgraphs(folder: Path, checkpoint: Checkpoint, full: Decoder) -> dict[str, Decoder]:
    """Every subgraph in `folder` that pays, by class.

    Raises:
        BadSubgraph: naming the folder and the reason.
    """
    paying = {name: path for name, path in find_subgraphs(folder).items() if read_manifest(path).pays}
    return {name: load_subgraph(path, checkpoint, full) for name, path in paying.items()}


def list_unpaying(folder: Path) -> dict[str, str]:
    """The classes of `folder` that no subgraph pays for, and why not; `pooled`, which always drafts, is not of them.

    Raises:
        BadSubgraph: naming the folder and the reason.
    """
    manifests = {name: read_manifest(path) for name, path in find_subgraphs(folder).items() if name != POOLED}
    return {name: manifest.why for name, manifest in manifests.items() if not manifest.pays}
