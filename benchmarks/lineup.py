"""Who competes in benchmarks/peers.py on which model: prompts, the formats each engine reads, and one entry per row."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import read_prompts
from shapes import SHAPES, write_shape
from workers import start

from server.bench import cut_prompt
from strace.checkpoint import open_checkpoint, resolve
from strace.files import cache_folder
from strace.gguf import convert

OURS = "strace"
ENGINES = (OURS, "transformers", "llama.cpp", "openvino")
CLASSES = ("chat", "code", "facts", "math", "stories")
REFERENCE, FULL = "transformers bf16", "strace full bf16"
PROMPT_TOKENS, CONTEXT = 64, 1024  # of a random prompt; of the peers' caches
GGUF, IR = ("bf16", "q8_0", "q4_0"), ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Model:
    """What is measured. name: as given; folder: Hugging Face's; files: the peers' own formats of it."""

    name: str
    folder: str
    files: Path
    stop: tuple[int, ...]
    prompts: dict[str, list[list[int]]]

    @property
    def real(self) -> bool:
        """Whether its text means anything."""
        return self.name not in SHAPES


@dataclass(frozen=True)
class Entry:
    """One row of the table. worker: the module in contestants; entries with the same `load` share a process."""

    name: str
    engine: str
    worker: str
    load: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    by_class: bool = False

    @property
    def process(self) -> str:
        return json.dumps([self.worker, self.load])


def list_entries(model: Model, threads: int) -> list[Entry]:
    """Everything that runs on a model."""

    def ours(name: str, source: str, mode: str, dtype: str = "bf16") -> Entry:
        load = {"model": source, "threads": threads, "dtype": dtype}
        return Entry(f"strace {name}", OURS, "ours", load, {"mode": mode}, by_class=True)

    def llama(format: str, name: str = "", **load: Any) -> Entry:
        load |= {"path": str(model.files / f"{format}.gguf"), "threads": threads, "context": CONTEXT}
        return Entry(f"llama.cpp {format}{name}", "llama.cpp", "llamacpp", load)

    def openvino(format: str) -> Entry:
        load = {"path": str(model.files / format), "threads": threads, "kv_bf16": format == "bf16"}
        return Entry(f"openvino {format}", "openvino", "ov", load)

    hugging = Entry(REFERENCE, "transformers", "huggingface", {"path": model.folder, "threads": threads})
    entries = [ours("full bf16", model.name if model.real else model.folder, "full")]
    entries += [ours("full int4", model.folder, "full", "int4"), hugging]
    entries += [llama(format) for format in GGUF] + [openvino(format) for format in IR]
    if model.real:
        entries += [ours("exact int4 draft", model.folder, "exact")]
        entries += [ours("exact subgraphs", model.name, "exact"), ours("routed subgraphs", model.name, "routed")]
        lookup = Entry("transformers lookup", "transformers", "huggingface", hugging.load, {"lookup": True})
        entries += [lookup, llama("bf16", " lookup", lookup=True)]
    return entries


def open_model(name: str, rounds: int) -> Model:
    """A model with its prompts: of the embedded one real text by class, else random ids."""
    folder = str(write_shape(name)) if name in SHAPES else resolve(name)
    checkpoint = open_checkpoint(folder)
    files = cache_folder() / "peers" / f"{name}-{checkpoint.weight_hash[:12]}"
    if name in SHAPES:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, checkpoint.spec.vocabulary, (rounds + 1, PROMPT_TOKENS), generator=generator)
        prompts = {"random": ids.tolist()}
    else:
        texts = {c: read_prompts(c, rounds + 1) for c in CLASSES}
        prompts = {c: [cut_prompt(checkpoint.tokenizer(t)["input_ids"]) for t in texts[c]] for c in CLASSES}
    return Model(name, folder, files, tuple(sorted(checkpoint.stop_ids)), prompts)


def prepare(model: Model, engines: Sequence[str]) -> None:
    """Write the formats that the peers read; what is there already is kept."""
    model.files.mkdir(parents=True, exist_ok=True)
    if "llama.cpp" in engines:
        if not (model.files / "bf16.gguf").exists():
            convert(model.folder, model.files / "bf16.gguf")
        for format in GGUF[1:]:
            _write(model, "llamacpp", "quantise", str(model.files / "bf16.gguf"), f"{format}.gguf", format)
    if "openvino" in engines:
        for format in IR:
            _write(model, "ov", "export", model.folder, format, format)


def _write(model: Model, worker: str, method: str, source: str, name: str, format: str) -> None:
    """Have a peer write one of its formats, beside its place first."""
    if (model.files / name).exists():
        return
    with tempfile.TemporaryDirectory(dir=model.files) as scratch, start(worker, threads=2) as peer:
        peer.ask(method, source=source, output=f"{scratch}/{name}", format=format)
        os.replace(f"{scratch}/{name}", model.files / name)
