"""From a configuration to a model that the API and the console can ask."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

import torch

from server.api.output import CALL_FORMATS, THINK, find_call_format
from server.api.served import Served
from server.config import EngineConfig, ServeConfig
from server.engine.build import Placement, build_engine
from server.engine.grammar import Grammars
from server.engine.options import Options
from server.engine.worker import Worker
from server.metrics import Metrics
from strace.graphs import choose_dtype


def load_served(config: EngineConfig) -> Served:
    """The configured model with its engine, which is not started yet.

    Raises:
        ValueError: saying what cannot be loaded and why: BadCheckpoint, UnsupportedModel, BadSubgraph, or a device or
            memory that is not there.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r} is not available on this machine")
    metrics = Metrics()
    kv_memory = None if config.kv_memory is None else config.kv_memory * 2**20
    placement = Placement(config.device, config.dtype, config.context, None, kv_memory, config.runner, config.compile)
    worker = Worker()
    build = partial(
        build_engine,
        config.model,
        config.subgraphs,
        placement=placement,
        options=Options(max_waiting=config.max_queue),
        observer=metrics,
        worker=worker,
    )
    engine, checkpoint = worker.submit(build).result()
    name = config.name if isinstance(config, ServeConfig) else config.model
    metrics.watch(engine.stats)
    metrics.info.labels(version("strace-llm"), name, choose_dtype(config.device, config.dtype), config.device).set(1)
    template = str(checkpoint.tokenizer.chat_template or "")
    auto = config.tool_parser == "auto"
    return Served(
        name=name,
        engine=engine,
        tokenizer=checkpoint.tokenizer,
        vocabulary=engine.limits.vocabulary,
        context=engine.limits.context,
        classes=engine.classes,
        metrics=metrics,
        grammars=Grammars(checkpoint.tokenizer.backend_tokenizer, engine.limits.vocabulary, checkpoint.stop_ids),
        mode=config.mode,
        max_queue=config.max_queue,
        max_draft=engine.options.max_draft,
        timeout=config.request_timeout if isinstance(config, ServeConfig) else None,
        calls=find_call_format(template) if auto else CALL_FORMATS.get(config.tool_parser),
        thinks=config.reasoning_parser == "think" or (config.reasoning_parser == "auto" and THINK in template),
    )
