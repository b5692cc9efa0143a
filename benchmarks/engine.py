"""Many users at once, over HTTP: full, exact and routed beside transformers' continuous batching, on the same weights.

So many clients at a time stream continuations of held-out texts of all classes (their first thirds), each asking again
as soon as it is answered. The servers take turns within a round, in rotating order: transformers' is
`transformers serve --continuous-batching`, bf16, with as many threads. Prompts are not shared between requests.
Clients run on the same machine. Given are medians over the rounds; times are of all rounds together. `outside` is the
share of our engine's steps that its runner did not take, `bandwidth` that of the memory's read bandwidth taken by
weights (transformers': at least one pass for as many tokens as there are clients).

Examples:
  python benchmarks/engine.py
  python benchmarks/engine.py --batches 1 16 --rounds 3 --modes full exact
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from clients import Answer, load
from machine import describe, finish, read_prompts, require_idle, spread
from modes import cut_prompt
from rich.console import Console
from rich.table import Table
from servers import start_ours, start_transformers

from strace.checkpoint import Checkpoint, load_decoder, open_checkpoint, resolve
from strace.costs import read_bandwidth
from strace.graphs import choose_dtype, choose_folder, load_drafts
from strace.runner import FULL

CLASSES = ("chat", "code", "facts", "math", "stories")
MODES = ("full", "exact", "routed")
PEER = "transformers"
LEAST, TURNS = 5, 2  # requests of a cell: so many at least, so many per client
# As much as our server reads in one step; room for every text of the largest batch.
PEER_FLAGS = {"cb-block-size": 32, "cb-num-blocks": 1024, "cb-max-batch-tokens": 512}
PERCENTILES = (50, 90, 99)


@dataclass
class Cell:
    """The rounds of one contestant at one batch: tokens per second of each, all answers, and our server's counters."""

    rates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)


def read_counters(address: str) -> Counter[str]:
    """Our server's seconds by part of a step, and passes by graph."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as page:
        text = page.read().decode()
    found = re.findall(r'^strace_llm_(?:step_seconds|passes)_total\{\w+="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return Counter({name: float(value) for name, value in found})


def weigh(model: str, checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of weights that a pass of each graph reads."""
    full = load_decoder(checkpoint, choose_dtype("cpu"))
    drafts = load_drafts(checkpoint, full, choose_folder(model, None))
    return {name: decoder.bytes_per_step for name, decoder in {FULL: full, **drafts}.items()}


def write_prompts(checkpoint: Checkpoint, count: int) -> list[str]:
    """So many beginnings of texts, the classes in turns."""
    encode, per_class = checkpoint.tokenizer, -(-count // len(CLASSES))
    texts = zip(*(read_prompts(name, per_class) for name in CLASSES), strict=True)
    cut = [encode.decode(cut_prompt(encode(text)["input_ids"])) for some in texts for text in some]
    return [cut[i % len(cut)] for i in range(count)]


def make_bodies(
    arguments: argparse.Namespace, checkpoint: Checkpoint, folder: str
) -> dict[str, Callable[[str], dict[str, Any]]]:
    """Per contestant, the request for a prompt."""
    asked = {"max_tokens": arguments.tokens, "stream": True}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    stop = sorted(checkpoint.stop_ids)
    config = {"max_new_tokens": arguments.tokens, "eos_token_id": stop, "pad_token_id": stop[0], **sampling}

    def ours(mode: str) -> Callable[[str], dict[str, Any]]:
        options = {"temperature": 1, "stream_options": {"include_usage": True}, "strace": {"mode": mode}}
        return lambda prompt: {"model": "bench", "prompt": prompt, **asked, **options}

    def theirs(prompt: str) -> dict[str, Any]:
        return {"model": folder, "prompt": prompt, **asked, "generation_config": json.dumps(config)}

    bodies = {mode: ours(mode) for mode in arguments.modes}
    return bodies if arguments.no_peer else bodies | {PEER: theirs}


def measure(
    arguments: argparse.Namespace,
    addresses: dict[str, str],
    bodies: dict[str, Callable[[str], dict[str, Any]]],
    prompts: list[str],
) -> dict[tuple[int, str], Cell]:
    """Every contestant at every batch in each round, in rotating order, after a round of warm-up."""
    cells = {(batch, name): Cell() for batch in arguments.batches for name in bodies}
    names = list(bodies)
    for turn in range(arguments.rounds + 1):
        for batch in arguments.batches:
            some = prompts[: max(LEAST, TURNS * batch) if turn else batch]
            for shift in range(len(names)):
                name = names[(turn + shift) % len(names)]
                before = Counter[str]() if name == PEER else read_counters(addresses[name])
                answers, seconds = load(addresses[name], map(bodies[name], some), batch)
                print(f"round {turn}: {batch} clients, {name}: {seconds:.1f} s", file=sys.stderr)
                if turn:
                    after = Counter[str]() if name == PEER else read_counters(addresses[name])
                    _add(cells[batch, name], answers, seconds, after - before)
    return cells


def _add(cell: Cell, answers: list[Answer], seconds: float, counted: Counter[str]) -> None:
    cell.rates.append(sum(answer.tokens for answer in answers) / seconds)
    cell.seconds += seconds
    cell.answers += answers
    cell.counted += counted


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Milliseconds below which 50, 90 and 99 of a hundred lie."""
    cuts = np.percentile(seconds, PERCENTILES)
    return [round(1000 * float(cut), 2) for cut in cuts]


def summarise(cells: dict[tuple[int, str], Cell], sizes: dict[str, int], bandwidth: float) -> list[dict[str, Any]]:
    """One row of figures per batch and contestant."""
    rows = []
    for (batch, name), cell in cells.items():
        tokens = sum(answer.tokens for answer in cell.answers)
        counted = cell.counted or Counter({FULL: tokens / batch})
        read = sum(counted[graph] * size for graph, size in sizes.items())
        row: dict[str, Any] = {"batch": batch, "mode": name, "requests": len(cell.answers), "tokens": tokens}
        row |= {"tokens_per_s": round(statistics.median(cell.rates), 1), "spread": round(spread(cell.rates), 3)}
        for peer in (PEER, FULL):
            if (batch, peer) in cells:
                ratios = [a / b for a, b in zip(cell.rates, cells[batch, peer].rates, strict=True)]
                row[f"over_{peer}"] = round(statistics.median(ratios), 2)
        row |= {"ttft_ms": percentiles([answer.first for answer in cell.answers])}
        row |= {"itl_ms": percentiles([gap for answer in cell.answers for gap in answer.gaps])}
        row |= {"bandwidth_share": round(read / cell.seconds / bandwidth, 3)}
        if steps := cell.counted["runner"] + cell.counted["engine"]:
            row["outside"] = round(cell.counted["engine"] / steps, 3)
            unverified = sum(answer.ran.get("unverified", 0) for answer in cell.answers)
            row["unverified"] = round(unverified / tokens, 3)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """What was measured, as a table."""
    names = (
        "batch",
        "mode",
        "tokens_per_s",
        "spread",
        "over_transformers",
        "over_full",
        "ttft_ms",
        "itl_ms",
        "outside",
    )
    names += ("bandwidth_share", "unverified")
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    Console(width=180).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 32], help="clients at a time")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    arguments = parser.parse_args()
    idle, threads, folder = require_idle(), torch.get_num_threads(), resolve(arguments.model)
    checkpoint, bandwidth = open_checkpoint(arguments.model), read_bandwidth()
    prompts = write_prompts(checkpoint, max(LEAST, TURNS * max(arguments.batches)))
    bodies = make_bodies(arguments, checkpoint, folder)
    flags = {"served-model-name": "bench", "max-running": max(arguments.batches), "prefix-cache": False}
    with ExitStack() as servers:
        ours, _ = servers.enter_context(start_ours(arguments.model, flags))
        addresses = dict.fromkeys(arguments.modes, ours)
        if not arguments.no_peer:
            addresses[PEER] = servers.enter_context(start_transformers(folder, threads, PEER_FLAGS))
        cells = measure(arguments, addresses, bodies, prompts)
    rows = summarise(cells, weigh(arguments.model, checkpoint), bandwidth)
    show(rows)
    finish(
        {
            "benchmark": "engine",
            "machine": describe(),
            "load_before": round(idle, 3),
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "model": arguments.model,
            "temperature": 1,
            "rounds": arguments.rounds,
            "results": rows,
        }
    )


if __name__ == "__main__":
    main()
