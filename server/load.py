"""From a configuration to a model that the API and the console can ask."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

from server.api.output import CALL_FORMATS, THINK, find_call_format
from server.api.served import Served
from server.config import EngineConfig, ServeConfig
from server.engine.build import Placement, build_engine, reload_drafts
from server.engine.engine import Engine
from server.engine.grammar import Grammars
from server.engine.options import Options
from server.engine.request import Mode
from server.engine.worker import Worker
from server.metrics import Metrics
from strace.checkpoint import Checkpoint
from strace.kv import BLOCK


def make_options(config: EngineConfig) -> Options:
    """The engine's settings: `auto` is exact unless the operator allows a risk."""
    options = Options(max_running=config.max_running, max_waiting=config.max_queue, prefix_cache=config.prefix_cache)
    return options if config.risk is None else replace(options, auto=Mode.ROUTED, risk=config.risk)


def load_served(config: EngineConfig) -> Served:
    """The configured model with its engine, which is not started yet.

    Raises:
        ValueError: saying what cannot be loaded and why: BadCheckpoint, UnsupportedModel, BadSubgraph, or a device or
            memory that is not there.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r} is not available on this machine")
    metrics = Metrics()
    worker, placement = Worker(), _place(config)
    build = partial(
        build_engine,
        config.model,
        config.subgraphs,
        placement=placement,
        options=make_options(config),
        observer=metrics,
        worker=worker,
    )
    engine, checkpoint = worker.submit(build).result()
    name = config.name if isinstance(config, ServeConfig) else config.model
    metrics.watch(engine.stats)
    metrics.watch_judges(engine.guard, engine.auditor)
    metrics.info.labels(version("strace-llm"), name, placement.format, config.device).set(1)
    template = str(checkpoint.tokenizer.chat_template or "")
    auto = config.tool_parser == "auto"
    return Served(
        name=name,
        engine=engine,
        tokenizer=checkpoint.tokenizer,
        vocabulary=engine.limits.vocabulary,
        context=engine.limits.context,
        cache=engine.pool.total * BLOCK,
        classes=(*engine.classes, *engine.unpaying),
        metrics=metrics,
        grammars=Grammars(checkpoint.tokenizer.backend_tokenizer, engine.limits.vocabulary, checkpoint.stop_ids),
        mode=config.mode,
        max_queue=config.max_queue,
        max_draft=engine.options.max_draft,
        timeout=config.request_timeout if isinstance(config, ServeConfig) else None,
        calls=find_call_format(template) if auto else CALL_FORMATS.get(config.tool_parser),
        thinks=config.reasoning_parser == "think" or (config.reasoning_parser == "auto" and THINK in template),
        reload=partial(_reload, engine, checkpoint, config),
    )


def _place(config: EngineConfig) -> Placement:
    """Where and how the configured model runs."""
    return Placement(config.device, config.dtype, config.context, None, config.kv_memory, config.runner, config.compile)


def _reload(engine: Engine, checkpoint: Checkpoint, config: EngineConfig) -> tuple[str, ...]:
    """See `Served.reload`."""
    reload_drafts(engine, checkpoint, config.subgraphs, _place(config)).result()
    return (*engine.classes, *engine.unpaying)
