"""Which graphs of a model are served, the full model at its dtype and its drafts by class, and what runs them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from strace import native
from strace.checkpoint import EMBEDDED, Checkpoint, embedded_folder, load_decoder, open_checkpoint, quantise_decoder
from strace.classes import POOLED
from strace.compiled import CompiledRunner
from strace.decoder import Decoder
from strace.kv import KVCache, make_cache
from strace.native import NativeError
from strace.native_runner import NativeRunner
from strace.runner import FULL, Runner, TorchRunner
from strace.subgraph import load_subgraphs

logger = logging.getLogger(__name__)

RUNNERS = ("auto", "native", "torch")
COMPILE = ("auto", "on", "off")


def choose_dtype(device: str, dtype: str = "auto", runner: str = "auto") -> str:
    """The format of the full model's matrices; `auto` is bf16 where the device computes in it, or where the native
    runner does, which widens weights on any CPU faster than twice their bytes could be read; else fp32.

    runner: that of `RUNNERS` which is asked for.
    """
    if dtype != "auto":
        return dtype
    widened = device == "cpu" and runner != "torch" and native.why_unavailable() is None
    return "bf16" if device not in ("cpu", "auto") or widened or cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; in torch, emulated, it is slower than fp32. /proc/cpuinfo exists on Linux
    only."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def choose_folder(model: str, subgraphs: Path | None) -> Path | None:
    """The folder of subgraphs asked for; the embedded model brings its own."""
    shipped = embedded_folder() / "subgraphs"
    return shipped if subgraphs is None and model == EMBEDDED and shipped.is_dir() else subgraphs


def load_drafts(checkpoint: Checkpoint, full: Decoder, folder: Path | None) -> dict[str, Decoder]:
    """The graphs that draft, by class; `pooled` is the whole model in int4, itself if it is, unless the folder has one.

    Raises:
        BadSubgraph: see strace.subgraph.
    """
    drafts = {} if folder is None else load_subgraphs(folder, checkpoint, full)
    if POOLED not in drafts:
        drafts[POOLED] = full if full.head.format == "int4" else quantise_decoder(full, "int4")
    return drafts


def open_graphs(
    model: str, subgraphs: Path | None = None, device: str = "cpu", dtype: str = "auto", runner: str = "auto"
) -> tuple[Checkpoint, dict[str, Decoder]]:
    """A model's checkpoint and all its graphs, on one device, for the runner that is asked for.

    Raises:
        BadCheckpoint, UnsupportedModel, BadSubgraph: see strace.checkpoint, strace.families, strace.subgraph.
    """
    checkpoint = open_checkpoint(model)
    full = load_decoder(checkpoint, choose_dtype(device, dtype, runner), device)
    return checkpoint, {FULL: full} | load_drafts(checkpoint, full, choose_folder(model, subgraphs))


def make_runner(graphs: dict[str, Decoder], blocks: int | KVCache, kind: str = "auto", compile: str = "auto") -> Runner:
    """The runner of `RUNNERS` that is asked for, or the fastest there is, over an empty cache of so many blocks, or
    over one that is in use.

    compile: whether the torch runner's steps are; `auto` on CUDA.

    Raises:
        ValueError: for a value that is not known, or cannot be had on this device.
    """
    for name, value, known in (("runner", kind, RUNNERS), ("compile", compile, COMPILE)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    full = graphs[FULL]
    device = full.embed.device
    if compile == "on" and device.type != "cuda":
        raise ValueError(f"the torch runner compiles on cuda only, not on {device.type}")
    places = full.devices or [device] * full.spec.layers
    cache = make_cache(full.spec, blocks, full.dtype, places) if isinstance(blocks, int) else blocks
    if kind == "native" or (kind == "auto" and device.type == "cpu"):
        try:
            return NativeRunner(graphs, cache)
        except NativeError as error:
            if kind == "native":
                raise ValueError(str(error)) from error
            logger.warning("%s; torch serves, slower", error)
    # Torch would make layers anew at every token.
    graphs = {name: replace(graph, layers=list(graph.layers)) for name, graph in graphs.items()}
    compiled = device.type == "cuda" and compile != "off"
    return CompiledRunner(graphs, cache) if compiled else TorchRunner(graphs, cache)
