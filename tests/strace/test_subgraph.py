"""The folder on disk: rebuilt bit for bit, and refused by name when anything about it is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint
from strace.decoder import Decoder, DenseAttend
from strace.flow import measure_flow
from strace.keep import Kept, Plan, keep_units
from strace.repair import repair
from strace.subgraph import (
    MANIFEST,
    TENSORS,
    BadSubgraph,
    Base,
    Candidate,
    Data,
    KeptLayer,
    Machine,
    Manifest,
    Measured,
    load_subgraph,
    load_subgraphs,
    pack,
    read_manifest,
    save_subgraph,
    unpack,
)
from strace.texts import batch_texts
from tests.tiny import random_tokens, save_tiny

PLAN = Plan("test", 0.5, 0.5)


def describe(checkpoint: Checkpoint, kept: Kept, subgraph: Decoder, name: str = "code") -> Manifest:
    spec = checkpoint.spec
    return Manifest(
        class_name=name,
        created="2026-01-01T00:00:00+00:00",
        base=Base(
            model=checkpoint.model,
            revision=checkpoint.revision,
            weight_hash=checkpoint.weight_hash,
            tokenizer_hash=checkpoint.tokenizer_hash,
            kv_heads=spec.kv_heads,
            neurons=spec.mlp,
        ),
        seed=0,
        recipe="recipe",
        data={"fit": Data(prompts=1, sources=1, tokens=1, hash="")},
        plan=PLAN,
        why="a test",
        kept=[KeptLayer(groups=g.tolist(), neurons=len(n)) for g, n in zip(kept.groups, kept.neurons, strict=True)],
        head_rows=subgraph.head.shape[0],
        measured=Measured(
            accepted=[0.5] * 8, agreement=[0.5] * 8, positions=8, coverage=0.75, bytes_per_step=1, bytes_share=0.1
        ),
        candidates=[
            Candidate(
                plan=PLAN,
                bytes_share=0.1,
                accepted=[],
                agreement=[],
                c=1,
                v={1: 1.0},
                full_ms=1,
                speedup=1,
                draft_length=1,
            )
        ],
        machine=Machine(device="cpu", processor="", threads=1, runner="torch", torch=""),
    )


Made = tuple[Path, Checkpoint, Decoder, Decoder]


def make(tmp_path: Path, family: str = "llama", dtype: str = "bf16", plan: Plan = PLAN) -> Made:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "model", family)))
    full = load_decoder(checkpoint, dtype)
    texts = batch_texts([random_tokens(40, seed=s).tolist() for s in range(4)])
    kept = keep_units(measure_flow(full, texts), plan, torch.arange(0, 300, 2) if plan.coverage < 1 else None)
    subgraph = repair(full, kept, plan.format, texts, texts)
    save_subgraph(tmp_path / "subgraphs" / "code", describe(checkpoint, kept, subgraph), subgraph, kept)
    return tmp_path / "subgraphs" / "code", checkpoint, full, subgraph


def kept_by(manifest: Manifest, subgraph: Decoder) -> Kept:
    groups = tuple(torch.tensor(layer.groups) for layer in manifest.kept)
    return Kept(groups, tuple(torch.arange(layer.neurons) for layer in manifest.kept), subgraph.token_ids)


def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder.streams(random_tokens(30), torch.arange(30), DenseAttend(1, 30)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One for the tests that only read it."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Made:
    """The same in a folder that a test may damage."""
    folder = tmp_path / "subgraphs" / "code"
    shutil.copytree(made[0], folder)
    return folder, *made[1:]


@pytest.mark.parametrize(
    ("family", "dtype", "format"),
    [
        ("llama", "bf16", "int4"),
        ("llama", "bf16", "int8"),
        ("llama", "bf16", "bf16"),
        ("mistral", "fp32", "int4"),
        ("qwen2", "bf16", "int4"),
        ("qwen2", "fp32", "bf16"),
        ("qwen3", "fp32", "int8"),
        ("olmo2", "bf16", "int4"),
        ("phi3", "bf16", "int4"),
        ("gemma2", "fp32", "int8"),
        ("gemma3_text", "bf16", "int4"),
        ("gpt2", "bf16", "int4"),
        ("gpt_neox", "bf16", "int4"),
    ],
)
def test_a_stored_subgraph_is_rebuilt_bit_for_bit(tmp_path: Path, family: str, dtype: str, format: str) -> None:
    folder, checkpoint, full, subgraph = make(tmp_path, family, dtype, Plan("p", 0.5, 0.5, format=format))
    loaded = load_subgraph(folder, checkpoint, full)
    assert torch.equal(logits(loaded), logits(subgraph))
    assert loaded.bytes_per_step == subgraph.bytes_per_step
    assert loaded.coverage == 0.75
    assert torch.equal(loaded.token_ids, subgraph.token_ids)
    for layer, was in zip(loaded.layers, subgraph.layers, strict=True):
        assert (layer.attention is None) == (was.attention is None)
        assert (layer.mlp is None) == (was.mlp is None)
        if layer.attention is not None:
            assert torch.equal(layer.attention.o.dense(), was.attention.o.dense())
            assert layer.attention.qkv.format == was.attention.qkv.format
    assert loaded.embed is full.embed
    assert loaded.final_norm is full.final_norm


def test_whole_sublayers_and_a_whole_head_survive_the_disk(tmp_path: Path) -> None:
    folder, checkpoint, full, subgraph = make(tmp_path, plan=Plan("p", 1 / 3, 2 / 3, whole=True, coverage=1.0))
    loaded = load_subgraph(folder, checkpoint, full)
    assert loaded.token_ids is None
    assert sum(layer.attention is None for layer in loaded.layers) == 2
    assert next(layer.attention for layer in loaded.layers if layer.attention).kept is None
    assert torch.equal(logits(loaded), logits(subgraph))


def test_a_float32_full_model_runs_a_subgraph_made_in_bf16(made: Made) -> None:
    folder, checkpoint, _, subgraph = made
    loaded = load_subgraph(folder, checkpoint, load_decoder(checkpoint, "fp32"))
    assert loaded.dtype == torch.float32
    near = torch.nn.functional.cosine_similarity(logits(loaded), logits(subgraph), dim=1)
    assert near.min() > 0.99


def test_all_classes_of_a_folder_are_loaded(copied: Made) -> None:
    folder, checkpoint, full, _ = copied
    (folder.parent / ".math.partial").mkdir()
    (folder.parent / ".math.partial" / MANIFEST).write_text("{")
    (folder.parent / "classifier.safetensors").write_bytes(b"")
    assert list(load_subgraphs(folder.parent, checkpoint, full)) == ["code"]


def test_saving_again_replaces_the_folder(copied: Made) -> None:
    folder, checkpoint, full, subgraph = copied
    (folder / "left-over").touch()
    manifest = read_manifest(folder)
    save_subgraph(folder, manifest, subgraph, kept_by(manifest, subgraph))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["code"]
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, TENSORS]
    assert all(p.stat().st_mode & 0o004 for p in folder.iterdir())
    load_subgraph(folder, checkpoint, full)


@given(st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), min_size=1, max_size=5))
def test_packed_codes_come_back(rows: list[list[int]]) -> None:
    codes = torch.tensor(rows, dtype=torch.int8)
    assert pack(codes).shape == (len(rows), 3)
    assert torch.equal(unpack(pack(codes)), codes)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / MANIFEST).read_text())
        change(raw)
        (folder / MANIFEST).write_text(json.dumps(raw))

    return apply


def swap_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors and let the manifest bear their hash, as a bad writer would."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    edit(lambda raw: raw.update(tensors_hash=digest))(folder)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-5] ^= 1
    (folder / TENSORS).write_bytes(content)


def cut_rows(tensors: dict[str, Tensor]) -> None:
    tensors["head.codes"] = tensors["head.codes"][:-1].contiguous()


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"cannot read {MANIFEST}"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"cannot read {TENSORS}"),
    "manifest no JSON": (lambda f: (f / MANIFEST).write_text("{"), f"cannot read {MANIFEST}"),
    "manifest no object": (lambda f: (f / MANIFEST).write_text("[]"), "schema version None is not known"),
    "schema": (edit(lambda r: r.update(schema_version=99)), "schema version 99 is not known; this version reads 1"),
    "unknown field": (edit(lambda r: r.update(colour="red")), "colour: Extra inputs are not permitted"),
    "missing field": (edit(lambda r: r.pop("kept")), "kept: Field required"),
    "class": (edit(lambda r: r.update({"class": "math"})), "is of the class 'math'"),
    "weights": (edit(lambda r: r["base"].update(weight_hash="0")), "was cut from another model"),
    "tokenizer": (edit(lambda r: r["base"].update(tokenizer_hash="0")), "another tokenizer"),
    "layers": (edit(lambda r: r["kept"].pop()), "2 layers, the model has 3"),
    "corrupt tensors": (flip_a_byte, f"{TENSORS} is corrupt"),
    "a matrix of another shape": (lambda f: swap_tensors(f, cut_rows), "does not fit"),
    "scales missing": (lambda f: swap_tensors(f, lambda t: t.pop("head.scales")), "head.scales"),
    "units that are not there": (edit(lambda r: r["kept"][0].update(groups=[7])), "does not fit"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_bad_subgraph_is_refused_by_name(copied: Made, name: str) -> None:
    folder, checkpoint, full, _ = copied
    damage, message = BREAKS[name]
    damage(folder)
    with pytest.raises(BadSubgraph, match=message) as caught:
        load_subgraph(folder, checkpoint, full)
    assert str(folder) in str(caught.value)


def test_a_folder_without_subgraphs_is_refused(made: Made, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadSubgraph, match="no subgraph in"):
            load_subgraphs(folder, made[1], made[2])


def test_a_manifest_reads_back_as_it_was_written(made: Made) -> None:
    folder, checkpoint, _, _ = made
    manifest = read_manifest(folder)
    assert manifest.base.weight_hash == checkpoint.weight_hash
    assert manifest.plan == PLAN
    assert Manifest.model_validate_json(manifest.model_dump_json(by_alias=True)) == manifest
