"""What speculation costs where it cannot pay: `exact` and `routed`, guarded, beside `full` under adversarial load.

Every round decodes the same batch of prompts to the same length in each mode, the order rotating; the speedup of a
round is `full`'s time over the mode's. The guard starts knowing nothing, and the round in which it learns counts.
Loads: `random`, prompts of random tokens; `wrong`, held-out texts; both drafted by the subgraphs of other classes, five
in one batch. `routed` emits from a confidence of .4 on, because nothing is certified for a class that is wrongly named.
Times are whole requests, prefill included, without HTTP.

Examples:
  python benchmarks/guard.py
  python benchmarks/guard.py --load wrong --rounds 20 --batch 32 --tokens 64
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from typing import Any

from machine import describe, finish, read_prompts, require_idle
from modes import CLASSES, cut_prompt
from rich.console import Console
from rich.table import Table
from scipy import stats

from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.checkpoint import Checkpoint
from strace.runner import FULL
from strace.sampling import SamplingParams

MODES = (Mode.FULL, Mode.EXACT, Mode.ROUTED)
LENGTH = 32  # tokens of a random prompt
THRESHOLD = 0.4  # of `routed`


def make_prompts(load: str, checkpoint: Checkpoint, vocabulary: int, count: int) -> list[tuple[str, list[int]]]:
    """So many prompts, each with the class that is wrongly said of it."""
    source = random.Random(3)
    if load == "random":
        return [(CLASSES[i % 5], [source.randrange(vocabulary) for _ in range(LENGTH)]) for i in range(count)]
    texts = {name: read_prompts(name, count) for name in CLASSES}
    return [
        (CLASSES[(i + 1) % 5], cut_prompt(checkpoint.tokenizer(texts[CLASSES[i % 5]][i // 5])["input_ids"]))
        for i in range(count)
    ]


def run_batch(
    engine: Engine, prompts: list[tuple[str, list[int]]], mode: Mode, tokens: int, temperature: float
) -> tuple[float, list[Ran]]:
    """Decode all prompts side by side; the seconds it took and what ran."""
    rans: list[Ran] = []

    def deliver(update: Update | Exception) -> None:
        if isinstance(update, Exception):
            raise update
        rans.extend([] if update.ran is None else [update.ran])

    begun = time.perf_counter()
    for number, (name, prompt) in enumerate(prompts):
        request = Request(
            str(number),
            prompt,
            SamplingParams(temperature),
            tokens,
            mode=mode,
            class_name=name,
            threshold=THRESHOLD if mode == Mode.ROUTED else None,
            ignore_eos=True,
        )
        engine.submit(request, deliver)
    while len(rans) < len(prompts):
        engine.step()
    return time.perf_counter() - begun, rans


def summarise(mode: Mode, seconds: list[float], full: list[float], rans: list[Ran]) -> dict[str, Any]:
    """One row of the result: realised speedups of the rounds, their geometric mean and its 95 % bound from below."""
    logs = [math.log(f / s) for f, s in zip(full, seconds, strict=True)]
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "mode": mode.value,
        "rounds": len(logs),
        "speedup": round(math.exp(mean), 4),
        "lower_95": round(math.exp(mean - float(stats.t.ppf(0.95, len(logs) - 1)) * error), 4),
        "least": round(math.exp(min(logs)), 4),
        "first": round(math.exp(logs[0]), 4),
        "tokens_per_s": round(sum(ran.tokens for ran in rans) / sum(seconds), 1),
        "drafted_per_token": round(sum(ran.drafted for ran in rans) / sum(ran.tokens for ran in rans), 4),
        "acceptance": round(sum(ran.accepted for ran in rans) / max(sum(ran.drafted for ran in rans), 1), 4),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--load", default="random", choices=("random", "wrong"))
    parser.add_argument("--batch", type=int, default=32, help="prompts side by side (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="paired blocks (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per prompt (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default %(default)s)")
    arguments = parser.parse_args()
    load = require_idle()
    options = Options(max_running=arguments.batch, max_waiting=arguments.batch, prefix_cache=False, seed=1)
    engine, checkpoint = build_engine(arguments.model, placement=Placement(), options=options)
    prompts = make_prompts(arguments.load, checkpoint, engine.limits.vocabulary, arguments.batch)
    run_batch(engine, prompts, Mode.FULL, arguments.tokens, arguments.temperature)
    seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
    rans: dict[Mode, list[Ran]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds):
        turn = number % len(MODES)
        for mode in MODES[turn:] + MODES[:turn]:
            took, ran = run_batch(engine, prompts, mode, arguments.tokens, arguments.temperature)
            seconds[mode].append(took)
            rans[mode] += ran
    results = [summarise(mode, seconds[mode], seconds[Mode.FULL], rans[mode]) for mode in MODES[1:]]
    table = Table("mode", "rounds", "speedup", "95 % at least", "least", "first", "drafted per token", "acceptance")
    for row in results:
        names = ("mode", "rounds", "speedup", "lower_95", "least", "first", "drafted_per_token", "acceptance")
        table.add_row(*(str(row[name]) for name in names))
    Console(width=120).print(table)
    finish(
        {
            "benchmark": "guard",
            "machine": describe(),
            "load_before": round(load, 3),
            "model": arguments.model,
            "runner": engine.runner.name,
            "dtype": str(engine.runner.graphs[FULL].dtype),
            "load": arguments.load,
            "batch": arguments.batch,
            "tokens": arguments.tokens,
            "temperature": arguments.temperature,
            "full_tokens_per_s": round(sum(r.tokens for r in rans[Mode.FULL]) / sum(seconds[Mode.FULL]), 1),
            "results": results,
            "guard": [
                {"mode": mode, "class": name, "batch": size, "trust": track.trust.name, "mean": round(track.mean, 3)}
                for mode, name, size, track in engine.guard.states()
            ],
        }
    )


if __name__ == "__main__":
    main()
