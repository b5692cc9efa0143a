"""All 27 sizes of one prompt's traces: ours beside a heap over arrays and a networkx graph with a heap.

One process, the same edge weights of a random 32-layer, 32-head model, the forward pass outside every clock. All three
build what they need from the weights, and their edge sets of every size are compared. The heaps give one list, of which
a size is the beginning; ours gives where each size ends, and `masks` adds writing out every size as masks.

    python benchmarks/trace.py [--repeats 5] [--lengths 50,200,1000]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import torch
from machine import describe, finish, require_idle, spread
from transformers import LlamaConfig

from strace.decoder import MLP, Attention, Decoder, Layer, Norm
from strace.extract import SIZES, EdgeWeights, StepMask, Traces, pairs
from strace.families import read_spec
from strace.importance import weigh_edges
from strace.linear import Linear

LAYERS, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 32, 32, 4, 128, 1024
COMPARED = 50  # tokens at which all three are timed
ARRAYS_BAR, NETWORKX_BAR, SECONDS_BAR, MEMORY_BAR = 20, 100, 60, 4 * 2**30


def make_decoder(seed: int = 0) -> Decoder:
    """A random model of the compared shape, its hidden size small."""
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
    )

    def draw(rows: int, columns: int) -> Linear:
        return Linear(torch.randn(rows, columns, generator=generator) * columns**-0.5, None, torch.float32)

    width, spec = HEADS * HEAD_DIM, read_spec(config)
    norm = Norm(torch.ones(HIDDEN), None, spec.norm_eps, spec.norm)
    layers = [
        Layer(
            Attention(norm, None, draw(3 * width, HIDDEN), draw(HIDDEN, width), HEADS, HEADS, spec.attention_scale),
            MLP(norm, None, draw(4 * HIDDEN, HIDDEN), draw(HIDDEN, 2 * HIDDEN)),
        )
        for _ in range(LAYERS)
    ]
    embed = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    return Decoder(spec, embed, layers, norm, draw(VOCABULARY, HIDDEN), torch.float32)


def make_weights(tokens: int) -> EdgeWeights:
    """The edge weights of a random prompt."""
    prompt = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return weigh_edges(make_decoder(), prompt)


def trace_ours(weights: EdgeWeights) -> Traces:
    """Ours, up to where every size ends."""
    traces = Traces(weights)
    traces.cut([traces.count_of(size) for size in SIZES])
    return traces


def write_masks(weights: EdgeWeights) -> list[StepMask]:
    """Ours, and the masks of every size."""
    traces = trace_ours(weights)
    counts = [traces.count_of(size) for size in SIZES]
    return [traces.masks(number, counts) for number in range(len(weights.steps))]


def _single(weights: EdgeWeights, number: int) -> list[tuple[np.ndarray[Any, Any], int]]:
    """The edges of a step that keep their position, with the offset of their numbers."""
    step, tokens = weights.steps[number], weights.tokens
    stride = 2 * tokens + len(pairs(tokens)[0]) * weights.heads
    parts = [(step.residual, number * stride)]
    return parts if step.mlp is None else [*parts, (step.mlp, (number + 1) * stride - tokens)]


def trace_arrays(weights: EdgeWeights) -> list[int]:
    """The edges in the order of a heap, from flat arrays: a node's edges are found by slicing."""
    tokens, heads = weights.tokens, weights.heads
    stride = 2 * tokens + len(pairs(tokens)[0]) * heads
    singles = [[(part.tolist(), base) for part, base in _single(weights, g)] for g in range(len(weights.steps))]
    attention = [None if s.attention is None else s.attention.T.ravel().tolist() for s in weights.steps]

    def enter(level: int, place: int) -> None:
        """Push the edges into a node, as (-weight, number)."""
        step = level - 1
        for part, base in singles[step]:
            heapq.heappush(heap, (-part[place], base + place))
        rows = attention[step]
        if rows is not None:
            start, base = place * (place + 1) // 2 * heads, step * stride + tokens
            for at in range(start, start + (place + 1) * heads):
                heapq.heappush(heap, (-rows[at], base + at))

    heap: list[tuple[float, int]] = []
    seen = {len(weights.steps) * tokens + tokens - 1}
    enter(len(weights.steps), tokens - 1)
    order = []
    while heap:
        _, number = heapq.heappop(heap)
        order.append(number)
        step, offset = divmod(number, stride)
        if offset < tokens:
            place = offset
        elif offset >= stride - tokens:
            place = offset - (stride - tokens)
        else:
            pair = (offset - tokens) // heads
            row = (math.isqrt(8 * pair + 1) - 1) // 2
            place = pair - row * (row + 1) // 2
        node = step * tokens + place
        if node not in seen:
            seen.add(node)
            if step:
                enter(step, place)
    return order


def trace_networkx(weights: EdgeWeights) -> list[int]:
    """The same from a networkx multigraph with one dict per edge, as the paper's authors build it."""
    tokens, heads = weights.tokens, weights.heads
    rows, columns = (x.tolist() for x in pairs(tokens))
    stride = 2 * tokens + len(rows) * heads
    graph = networkx.MultiDiGraph()
    for g, step in enumerate(weights.steps):
        for part, base in _single(weights, g):
            for t, weight in enumerate(part.tolist()):
                graph.add_edge((g, t), (g + 1, t), key=base + t, weight=weight)
        if step.attention is not None:
            for head, values in enumerate(step.attention.tolist()):
                for pair, (i, j, weight) in enumerate(zip(rows, columns, values, strict=True)):
                    key = g * stride + tokens + pair * heads + head
                    graph.add_edge((g, j), (g + 1, i), key=key, weight=weight)
    out = (len(weights.steps), tokens - 1)
    seen, heap, order = {out}, [], []

    def enter(node: tuple[int, int]) -> None:
        for source, _, key, weight in graph.in_edges(node, keys=True, data="weight"):
            heapq.heappush(heap, (-weight, key, source))

    enter(out)
    while heap:
        _, key, source = heapq.heappop(heap)
        order.append(key)
        if source not in seen:
            seen.add(source)
            enter(source)
    return order


def clock(call: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each of `repeats` calls, and what the last gave."""
    times, result = [], None
    for _ in range(repeats):
        result = None
        started = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - started)
    return times, result


def compare(repeats: int) -> dict[str, Any]:
    """Times of all three at `COMPARED` tokens; ends the process if their edge sets differ at any size."""
    weights = make_weights(COMPARED)
    calls: dict[str, Callable[[EdgeWeights], Any]] = {
        "ours": trace_ours,
        "masks": write_masks,
        "arrays": trace_arrays,
        "networkx": trace_networkx,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {}
    for name in ("ours", "masks"):
        calls[name](weights)
    # Interleaved, so that a drift of the machine's speed falls on all.
    for _ in range(repeats):
        for name, call in calls.items():
            some, found[name] = clock(partial(call, weights), 3 if name in ("ours", "masks") else 1)
            times[name] += some
    traces = found["ours"]
    check_sets(traces, found)
    seconds = {name: statistics.median(some) for name, some in times.items()}
    return {
        "tokens": COMPARED,
        "edges": traces.total,
        "repeats": {name: len(some) for name, some in times.items()},
        "seconds": seconds,
        "noise": {name: spread(some) for name, some in times.items()},
        "over_arrays": seconds["arrays"] / seconds["ours"],
        "over_networkx": seconds["networkx"] / seconds["ours"],
        "masks_over_arrays": seconds["arrays"] / seconds["masks"],
        "masks_over_networkx": seconds["networkx"] / seconds["masks"],
        "sets_equal_at": len(SIZES),
    }


def check_sets(traces: Traces, found: dict[str, Any]) -> None:
    """End the process if a heap's edge set differs from ours at any size."""
    for size in SIZES:
        count = traces.count_of(size)
        ours = traces.numbers(count)
        for name in ("arrays", "networkx"):
            if not np.array_equal(ours, np.sort(np.array(found[name][:count], np.int64))):
                sys.exit(f"the trace of size {size} differs from that of the heap over {name}")


def measure_alone(tokens: int) -> dict[str, Any]:
    """Time of ours at a length in this process, and its peak memory with the weights and everything imported."""
    weights = make_weights(tokens)
    times, traces = clock(lambda: trace_ours(weights), 3)
    return {
        "tokens": tokens,
        "edges": traces.total,
        "seconds": statistics.median(times),
        "peak_bytes": read_peak(),
        "weights_bytes": sum(
            part.nbytes
            for step in weights.steps
            for part in (step.residual, step.attention, step.mlp)
            if part is not None
        ),
    }


def read_peak() -> int:
    """The most memory that this process has held. Not `ru_maxrss`, which a process inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure_in_process(tokens: int) -> dict[str, Any]:
    """`measure_alone` in a process of its own, whose peak is only its own."""
    command = [sys.executable, __file__, "--alone", str(tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Compare, then measure every length, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", default="50,200,1000")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        finish(measure_alone(options.alone))
        return
    load = require_idle()
    compared = compare(options.repeats)
    lengths = [measure_in_process(int(length)) for length in options.lengths.split(",")]
    longest = lengths[-1]
    bars = {
        f"over_arrays >= {ARRAYS_BAR}": compared["over_arrays"] >= ARRAYS_BAR,
        f"over_networkx >= {NETWORKX_BAR}": compared["over_networkx"] >= NETWORKX_BAR,
        f"{longest['tokens']} tokens <= {SECONDS_BAR} s": longest["seconds"] <= SECONDS_BAR,
        f"{longest['tokens']} tokens <= {MEMORY_BAR} bytes": longest["peak_bytes"] <= MEMORY_BAR,
    }
    finish(
        {
            "benchmark": "trace",
            "machine": describe() | {"load": load},
            "shape": {"layers": LAYERS, "heads": HEADS, "hidden": HIDDEN, "sizes": len(SIZES)},
            "compared": compared,
            "lengths": lengths,
            "bars": bars,
        }
    )


if __name__ == "__main__":
    main()
