"""From a model's name to an engine: checkpoint, decoder, drafts, cache, measured costs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from server.engine.check import Limits
from server.engine.cost import make_model, measure_start
from server.engine.engine import Chooser, Drafts, Engine
from server.engine.observer import Observer
from server.engine.options import Options
from server.engine.worker import Worker
from strace.certificate import Certificate, Setting, load_certificates
from strace.checkpoint import BadCheckpoint, Checkpoint, load_decoder, open_checkpoint
from strace.classes import POOLED
from strace.classifier import Classifier
from strace.costs import describe_setting, load_table
from strace.decoder import Decoder
from strace.graphs import choose_dtype, choose_folder, load_drafts, make_runner
from strace.kv import BLOCK, block_bytes
from strace.memory import give_back
from strace.runner import FULL, Runner
from strace.subgraph import list_unpaying

_MEMORY_SHARE = 0.25  # of the memory still free once the weights are loaded: what the cache takes unless told otherwise


@dataclass(frozen=True)
class Placement:
    """Where and how the full model runs.

    dtype: fp32, bf16 or auto, which is bf16 where the device or the native runner computes in it. kv_memory: of the
    cache, in bytes. runner: native, torch or auto, which is native on the CPU wherever it can be had. compile: whether
    the torch runner's steps are; on, off or auto, which is on on CUDA.
    """

    device: str = "cpu"
    dtype: str = "auto"
    context: int | None = None
    max_memory: dict[int | str, int | str] | None = None
    kv_memory: int | None = None
    runner: str = "auto"
    compile: str = "auto"

    @property
    def format(self) -> str:
        """Of the full model's matrices, once `auto` is decided."""
        return choose_dtype(self.device, self.dtype, self.runner)


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
        BadCheckpoint, UnsupportedModel, BadSubgraph, BadClassifier: see the modules of strace that they are in.
        ValueError: for an unknown dtype, a runner that cannot be had, a device that cannot compile, or memory that does
            not hold one block of the cache.
    """
    where, options = placement or Placement(), options or Options()
    checkpoint = open_checkpoint(model, where.context, trust_remote_code)
    dtype = where.format
    full = load_decoder(checkpoint, dtype, where.device, where.max_memory, streamed=where.device == "cpu")
    folder = choose_folder(model, subgraphs)
    drafts = load_drafts(checkpoint, full, folder)
    tokenizer = getattr(checkpoint.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise BadCheckpoint(f"model {model!r} has no tokenizer.json; its tokenizer cannot decode token by token")
    blocks = count_blocks(full, where.kv_memory, options.max_running)
    runner = make_runner({FULL: full, **drafts}, blocks, where.runner, where.compile)
    chooser, unpaying, certificates = _read_rest(folder, checkpoint, drafts, runner, dtype)
    classes, limits = tuple(drafts), Limits(full.spec.context, full.spec.vocabulary)
    del full, drafts  # the native runner has packed them
    give_back()
    engine = Engine(
        runner,
        tokenizer,
        checkpoint.stop_ids,
        drafts=classes,
        limits=limits,
        cost=measure_start(runner, checkpoint.weight_hash),
        chooser=chooser,
        unpaying=unpaying,
        observer=observer,
        options=options,
        worker=worker,
        certificates=certificates,
    )
    return engine, checkpoint


def reload_drafts(
    engine: Engine,
    checkpoint: Checkpoint,
    subgraphs: Path | None = None,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
) -> Future[None]:
    """Read the subgraphs again and let a built engine draft with them; done once it does. The arguments are those that
    it was built from. To be called in a thread of its own: decoding goes on meanwhile.

    A runner that keeps its weights in a form of its own gets the full model anew with them, so that for a while there
    are two.

    Raises:
        BadCheckpoint: the full model itself has changed.
        And what `build_engine` raises; the engine then keeps what it has.
    """
    where, old = placement or Placement(), engine.runner
    again = open_checkpoint(checkpoint.model, where.context, trust_remote_code)
    if again.weight_hash != checkpoint.weight_hash:
        raise BadCheckpoint(
            f"the weights of model {checkpoint.model!r} have changed; start the server anew to serve them"
        )
    full, dtype = old.graphs[FULL], where.format
    if full.embed.is_meta:
        full = load_decoder(again, dtype, where.device, where.max_memory, streamed=True)
    folder = choose_folder(checkpoint.model, subgraphs)
    drafts = load_drafts(again, full, folder)
    runner = make_runner(
        {FULL: full, **drafts}, old.cache, "native" if old.name == "native" else "torch", where.compile
    )
    pooled = old.graphs[POOLED].bytes_per_step
    cost = engine.cost.estimate({name: graph.bytes_per_step / pooled for name, graph in drafts.items()})
    table = load_table(describe_setting(runner, checkpoint.weight_hash))
    known = cost if table is None else make_model(table.costs)
    return engine.swap(Drafts(runner, tuple(drafts), known, *_read_rest(folder, again, drafts, runner, dtype)))


def _read_rest(
    folder: Path | None, checkpoint: Checkpoint, drafts: Iterable[str], runner: Runner, dtype: str
) -> tuple[Chooser | None, dict[str, str], dict[str, Certificate]]:
    """What a folder of subgraphs has beside them: the classifier, which classes do not pay, the certificates that hold
    for this runner."""
    if folder is None:
        return None, {}, {}
    certificates = load_certificates(folder, drafts, Setting(runner.name, runner.isa, dtype))
    return Classifier.load(folder, checkpoint.tokenizer_hash), list_unpaying(folder), certificates


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
