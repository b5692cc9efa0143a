"""From a model's name to an engine: checkpoint, decoder, drafts, cache, measured costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.cost import measure_costs
from server.engine.engine import Chooser, Engine, Limits
from server.engine.observer import Observer
from server.engine.options import Options
from server.engine.worker import Worker
from strace.checkpoint import (
    EMBEDDED,
    BadCheckpoint,
    Checkpoint,
    embedded_folder,
    load_decoder,
    open_checkpoint,
    quantise_decoder,
)
from strace.classes import POOLED, Classifier
from strace.decoder import Decoder
from strace.kv import BLOCK, block_bytes, make_cache
from strace.runner import FULL, TorchRunner
from strace.subgraph import load_subgraphs

_MEMORY_SHARE = 0.25  # of the memory still free once the weights are loaded: what the cache takes unless told otherwise


@dataclass(frozen=True)
class Placement:
    """Where and how the full model runs.

    dtype: fp32, bf16 or auto, which is bf16 where the device computes in it. kv_memory: of the cache, in bytes.
    """

    device: str = "cpu"
    dtype: str = "auto"
    context: int | None = None
    max_memory: dict[int | str, int | str] | None = None
    kv_memory: int | None = None


def build_engine(
    model: str,
    subgraphs: Path | None = None,
    *,
    placement: Placement | None = None,
    options: Options | None = None,
    observer: Observer | None = None,
    trust_remote_code: bool = False,
    worker: Worker | None = None,
) -> tuple[Engine, Checkpoint]:
    """An engine that is ready to start, and the checkpoint it serves. To be called in the thread of `worker`, where the
    engine will run.

    Raises:
        BadCheckpoint, UnsupportedModel, BadSubgraph: see strace.checkpoint, strace.families, strace.subgraph.
        ValueError: for an unknown dtype, or memory that does not hold one block of the cache.
    """
    where, options = placement or Placement(), options or Options()
    checkpoint = open_checkpoint(model, where.context, trust_remote_code)
    full = load_decoder(checkpoint, choose_dtype(where), where.device, where.max_memory)
    drafts, chooser = _load_drafts(checkpoint, full, _find_subgraphs(model, subgraphs))
    tokenizer = getattr(checkpoint.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise BadCheckpoint(f"model {model!r} has no tokenizer.json; its tokenizer cannot decode token by token")
    blocks = count_blocks(full, where.kv_memory, options.max_running)
    runner = TorchRunner({FULL: full, **drafts}, make_cache(full.spec, blocks, full.dtype, full.devices or None))
    engine = Engine(
        runner,
        tokenizer,
        checkpoint.stop_ids,
        drafts=drafts,
        limits=Limits(full.spec.context, full.spec.vocabulary),
        cost=measure_costs(runner, drafts),
        chooser=chooser,
        observer=observer,
        options=options,
        worker=worker,
    )
    return engine, checkpoint


def choose_dtype(placement: Placement) -> str:
    """The format of the full model's matrices."""
    if placement.dtype != "auto":
        return placement.dtype
    return "bf16" if placement.device not in ("cpu", "auto") or _native_bf16() else "fp32"


def _native_bf16() -> bool:
    """Whether this CPU multiplies in bf16; emulated, it is slower than fp32. /proc/cpuinfo exists on Linux only."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def _find_subgraphs(model: str, subgraphs: Path | None) -> Path | None:
    """The folder asked for; the embedded model brings its own."""
    shipped = embedded_folder() / "subgraphs"
    return shipped if subgraphs is None and model == EMBEDDED and shipped.is_dir() else subgraphs


def _load_drafts(
    checkpoint: Checkpoint, full: Decoder, subgraphs: Path | None
) -> tuple[dict[str, Decoder], Chooser | None]:
    """The graphs that draft, by class, and what chooses among them; `pooled` is the whole model in int4 by default."""
    drafts: dict[str, Decoder] = {}
    chooser: Chooser | None = None
    if subgraphs is not None:
        drafts = load_subgraphs(subgraphs, checkpoint, full)
        chooser = Classifier.load(subgraphs)
    if POOLED not in drafts:
        drafts[POOLED] = quantise_decoder(full, "int4")
    return drafts, chooser


def count_blocks(full: Decoder, kv_memory: int | None, max_running: int) -> int:
    """How many blocks the cache gets: never more than `max_running` whole contexts need.

    Raises:
        ValueError: if the memory does not hold one block.
    """
    memory = int(_free_memory(full.embed.device) * _MEMORY_SHARE) if kv_memory is None else kv_memory
    size = block_bytes(full.spec, full.dtype)
    if memory < size:
        raise ValueError(f"kv_memory of {memory} bytes does not hold one block of {size} bytes")
    return min(memory // size, max_running * -(-full.spec.context // BLOCK))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
