"""Graphs, runners and passes that the tests of the native runner share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from strace.checkpoint import load_decoder, open_checkpoint
from strace.decoder import Decoder, Layer
from strace.kv import Batch, make_cache
from strace.linear import Linear
from strace.native_runner import NativeRunner
from strace.runner import FULL, Runner
from tests.tiny import keep_heads, save_tiny, scatter_blocks

SUBGRAPH = "code"
BLOCKS = 40
CONTEXT = 1024  # several spans of attention


@cache
def load_tiny(family: str = "llama", format: str = "fp32", **overrides: Any) -> Decoder:
    """A tiny decoder of some context."""
    with TemporaryDirectory() as folder:
        save_tiny(Path(folder), family, **({"max_position_embeddings": CONTEXT} | overrides))
        return load_decoder(open_checkpoint(folder), format)


def cut(full: Decoder, ids: list[int] | None = None) -> Decoder:
    """A subgraph without all of its heads and sublayers, its head short where `ids` are given."""
    graph = keep_heads(full, [[1], None, [0, 1]])
    layers = [graph.layers[0], graph.layers[1], Layer(graph.layers[2].attention, None)]
    if ids is None:
        return replace(graph, layers=layers)
    bias = None if full.head.bias is None else full.head.bias[ids]
    head = Linear(full.head.dense()[ids].to(full.dtype), bias, full.dtype)
    return replace(graph, layers=layers, head=head, token_ids=torch.tensor(ids), coverage=0.5)


def narrow(graph: Decoder, window: int | None) -> Decoder:
    """The same with a sliding window in its first layer."""
    attention = graph.layers[0].attention
    assert attention is not None
    first = replace(graph.layers[0], attention=replace(attention, window=window))
    return replace(graph, layers=[first, *graph.layers[1:]])


def make_native(graphs: dict[str, Decoder], threads: int = 2) -> NativeRunner:
    full = graphs[FULL]
    return NativeRunner(graphs, make_cache(full.spec, BLOCKS, full.dtype), threads)


def fill_cache(*runners: Runner, seed: int = 0) -> None:
    """The same random entries everywhere in all caches."""
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*([*runner.cache.keys, *runner.cache.values] for runner in runners), strict=True):
        tensors[0].normal_(generator=generator)
        for tensor in tensors[1:]:
            tensor.copy_(tensors[0])


def make_batch(counts: list[int], starts: list[int], seed: int = 0, room: int = 0) -> Batch:
    """Random tokens of sequences that lie anywhere in the cache, with room for more of each."""
    ends = [start + count + room for start, count in zip(starts, counts, strict=True)]
    tokens = torch.randint(0, 256, (sum(counts),), generator=torch.Generator().manual_seed(seed)).tolist()
    return Batch(tokens, counts, starts, scatter_blocks(ends, BLOCKS, seed))


def run_all(runner: Runner, graph: str, batch: Batch) -> Tensor:
    """The logits of every token of a pass."""
    return runner.forward(graph, batch, list(range(len(batch.tokens))))


def split(batch: Batch, sizes: list[list[int]]) -> list[tuple[list[int], Batch]]:
    """The batch sequence by sequence in chunks of these sizes, each with the numbers of its tokens in the batch."""
    parts, first = [], 0
    for s, chunks in enumerate(sizes):
        start = batch.starts[s]
        for size in chunks:
            numbers = list(range(first, first + size))
            parts.append((numbers, Batch([batch.tokens[i] for i in numbers], [size], [start], batch.tables[s : s + 1])))
            first, start = first + size, start + size
    return parts
