"""What speculation costs where it cannot pay: `exact` and `routed`, guarded, beside `full` under adversarial load.

Every round decodes the same batch of prompts to the same length in each mode, by an engine of its own; the three take
turns of a few steps, in rotating order, so that what disturbs the machine falls on all alike. A round's speedup is
`full`'s time over the mode's. The guards start knowing nothing, and the round in which they learn counts.
Loads: `random`, prompts of random tokens; `wrong`, held-out texts; both drafted by the subgraphs of other classes, five
in one batch. `routed` emits from a confidence of .4 on, because nothing is certified for a class that is wrongly named.
Times are whole requests, prefill included, without HTTP.

Examples:
  python benchmarks/guard.py
  python benchmarks/guard.py --load wrong --rounds 30 --batch 32 --tokens 64
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
from server.engine.guard import Mean, Trust
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.checkpoint import Checkpoint
from strace.runner import FULL
from strace.sampling import SamplingParams

MODES = (Mode.FULL, Mode.EXACT, Mode.ROUTED)
LENGTH = 32  # tokens of a random prompt
THRESHOLD = 0.4  # of `routed`
SLICE = 5  # steps of one mode before it is another's turn


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


class Contestant:
    """One mode's engine and a batch of prompts that it decodes, some steps at a time."""

    def __init__(self, engine: Engine, mode: Mode) -> None:
        self.engine, self.mode = engine, mode
        self.seconds: list[float] = []
        self.rans: list[Ran] = []

    def begin(self, prompts: list[tuple[str, list[int]]], tokens: int, temperature: float) -> None:
        """Submit all prompts of a round."""
        begun = time.perf_counter()
        for number, (name, prompt) in enumerate(prompts):
            request = Request(
                str(number),
                prompt,
                SamplingParams(temperature),
                tokens,
                mode=self.mode,
                class_name=name,
                threshold=THRESHOLD if self.mode == Mode.ROUTED else None,
                ignore_eos=True,
            )
            self.engine.submit(request, self._deliver)
        self.seconds.append(time.perf_counter() - begun)

    def go_on(self, steps: int) -> bool:
        """So many steps of the round; False once it is over."""
        begun = time.perf_counter()
        self.engine._marked = None  # what the others took since the last step is none of its time
        for _ in range(steps):
            if self.engine.idle:
                break
            self.engine.step()
        self.seconds[-1] += time.perf_counter() - begun
        return not self.engine.idle

    def _deliver(self, update: Update | Exception) -> None:
        if isinstance(update, Exception):
            raise update
        self.rans.extend([] if update.ran is None else [update.ran])


def run_round(
    contestants: list[Contestant], prompts: list[tuple[str, list[int]]], arguments: argparse.Namespace
) -> None:
    """All decode the prompts, taking turns."""
    for contestant in contestants:
        contestant.begin(prompts, arguments.tokens, arguments.temperature)
    working, turn = list(contestants), 0
    while working:
        turn = (turn + 1) % len(working)
        working = [each for each in working[turn:] + working[:turn] if each.go_on(SLICE)]


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


def describe_trust(trust: Trust, mean: Mean) -> dict[str, Any]:
    """What the guard thinks of what it tracks, and the logarithm of the speedup it saw."""
    return {"trust": trust.name, "mean": round(mean.value, 3)}


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
    built = [build_engine(arguments.model, placement=Placement(), options=options) for _ in MODES]
    engine, checkpoint = built[0]
    contestants = [Contestant(own, mode) for (own, _), mode in zip(built, MODES, strict=True)]
    prompts = make_prompts(arguments.load, checkpoint, engine.limits.vocabulary, arguments.batch)
    warm = Contestant(engine, Mode.FULL)
    run_round([warm], prompts, arguments)
    for number in range(arguments.rounds):
        turn = number % len(MODES)
        run_round(contestants[turn:] + contestants[:turn], prompts, arguments)
    full, *others = contestants
    results = [summarise(each.mode, each.seconds, full.seconds, each.rans) for each in others]
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
            "full_tokens_per_s": round(sum(ran.tokens for ran in full.rans) / sum(full.seconds), 1),
            "results": results,
            "guard": [
                {"mode": mode, "class": name, "batch": size} | describe_trust(track.trust, track.mean)
                for each in others
                for mode, name, size, track in each.engine.guard.states()
                if mode == each.mode
            ],
            "gates": [
                {"class": name, "batch": size} | describe_trust(trust, mean)
                for name, size, trust, mean in others[1].engine.guard.gates()
            ],
        }
    )


if __name__ == "__main__":
    main()
