"""All 27 sizes of one prompt's traces: ours beside a heap over arrays and a networkx graph with a heap.

One process, the same edge weights of a random 32-layer, 32-head model, the forward pass outside every clock. All three
build what they need from the weights and give the edge sets of every size, which are compared. `pip install
networkx` is needed for the third (extra `bench`); without it the script says so and ends.

    python benchmarks/trace.py [--repeats 3] [--lengths 50,200,1000]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from machine import describe, finish, require_idle, spread
from transformers import LlamaConfig

from strace.decoder import MLP, Attention, Decoder, Layer, Norm
from strace.extract import SIZES, EdgeWeights, Traces, pairs
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
    """Ours, up to where every size ends; `numbers` then reads an edge set off."""
    traces = Traces(weights)
    traces.cut([traces.count_of(size) for size in SIZES])
    return traces


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
    import networkx

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
    # Interleaved, so that a drift of the machine's speed falls on all.
    ours: list[float] = []
    arrays: list[float] = []
    networkx: list[float] = []
    trace_ours(weights)
    for _ in range(repeats):
        times, traces = clock(lambda: trace_ours(weights), 3)
        ours += times
        times, order = clock(lambda: trace_arrays(weights), 1)
        arrays += times
        times, other = clock(lambda: trace_networkx(weights), 1)
        networkx += times
    for size in SIZES:
        count = traces.count_of(size)
        found = traces.numbers(count)
        for name, reference in (("heap over arrays", order), ("networkx", other)):
            if not np.array_equal(found, np.sort(np.array(reference[:count], np.int64))):
                sys.exit(f"the trace of size {size} differs from that of the {name}")
    middle = {name: statistics.median(t) for name, t in (("ours", ours), ("arrays", arrays), ("networkx", networkx))}
    return {
        "tokens": COMPARED,
        "edges": traces.total,
        "seconds": middle,
        "noise": {"ours": spread(ours), "arrays": spread(arrays), "networkx": spread(networkx)},
        "over_arrays": middle["arrays"] / middle["ours"],
        "over_networkx": middle["networkx"] / middle["ours"],
        "sets_equal_at": len(SIZES),
    }


def measure_alone(tokens: int) -> dict[str, Any]:
    """Time of ours at a length in this process, and its peak memory with the weights and everything imported."""
    weights = make_weights(tokens)
    times, traces = clock(lambda: trace_ours(weights), 1 if tokens > 500 else 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens": tokens, "edges": traces.total, "seconds": statistics.median(times), "peak_bytes": peak}


def measure_in_process(tokens: int) -> dict[str, Any]:
    """`measure_alone` in a process of its own, whose peak is only its own."""
    command = [sys.executable, __file__, "--alone", str(tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Compare, then measure every length, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", default="50,200,1000")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        finish(measure_alone(options.alone))
        return
    if find_spec("networkx") is None:
        sys.exit("networkx is not installed; pip install 'strace-llm[bench]'")
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
