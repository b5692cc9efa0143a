"""How fast we decode beside transformers, llama.cpp and OpenVINO: same weights, prompts, threads and token counts.

Every engine runs in a process of its own (benchmarks/contestants), the peers in .venv-peers, and all take turns: in
each round every engine continues the same prompts, the order rotating, so that noise falls on all alike. Figures are of
decoding, from the first new token to the last; medians over the rounds, spread = half the interquartile range over the
median. GB/s are of weights; the share is of the bandwidth at which all threads read memory, measured in every round.
Where memory does not hold all engines at once, --apart has one engine at a time take turns with ours.

The embedded model continues held-out text of five classes. The other models are random weights in published shapes:
what they cost per step is real, what they write is not, so nothing that guesses tokens runs on them.

`make bench-peers` makes .venv-peers (llama.cpp is compiled for this machine) and runs this.

Examples:
  python benchmarks/peers.py
  python benchmarks/peers.py --models embedded SmolLM2-135M --engines strace llama.cpp --rounds 3 --tokens 32
  python benchmarks/peers.py --models Llama-3.2-1B --apart
  python benchmarks/peers.py --prepare
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lineup import ENGINES, FULL, OURS, REFERENCE, Entry, Model, list_entries, open_model, prepare
from machine import describe, finish, require_idle, show, spread
from rich.console import Console
from shapes import SHAPES
from workers import PEERS_PYTHON, Worker, start

from strace.checkpoint import EMBEDDED
from strace.costs import ReadMeter

PROGRESS = Console(stderr=True)
_READS = 3  # of memory, in each round, of which the best counts
# (sequences, tokens of each, context) of our own passes.
LENGTHS = [(1, 1, 64), (1, 4, 64), (1, 8, 64)]
CONTEXTS = [(1, 1, 256), (1, 1, 1024), (1, 1, 4096)]
SEQUENCES = [(2, 1, 64), (4, 1, 64), (8, 1, 64), (16, 1, 64)]


@dataclass
class Round:
    """One entry's texts in one round, by class."""

    texts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def total(self, name: str) -> float | None:
        """A number summed over the texts; None where the engine does not tell it."""
        values = [text[name] for text in self.texts.values()]
        return None if None in values else sum(values)

    def rate(self, name: str = "decoded") -> float | None:
        """A number per second of decoding; by default tokens."""
        total, seconds = self.total(name), self.total("decode_s")
        return None if total is None else total / seconds if seconds else 0.0


def run_rounds(
    model: Model,
    entries: Sequence[Entry],
    workers: dict[str, Worker],
    arguments: argparse.Namespace,
    temperature: float,
) -> tuple[dict[str, list[Round]], list[float]]:
    """Every entry's rounds, by name, and the read bandwidth in each; the first round, which warms up, is dropped."""
    found: dict[str, list[Round]] = {entry.name: [] for entry in entries}
    meter, bandwidths = ReadMeter(), []
    for turn in range(arguments.rounds + 1):
        PROGRESS.log(f"{model.name}, temperature {temperature}: round {turn} of {arguments.rounds}")
        shift = turn % len(entries)
        bandwidths.append(max(meter.sample() for _ in range(_READS)))
        for entry in (*entries[shift:], *entries[:shift]):
            done = Round()
            for name, prompts in model.prompts.items():
                options = entry.options | ({"class_name": name} if entry.by_class else {})
                done.texts[name] = workers[entry.process].ask(
                    "generate",
                    prompt=prompts[turn % len(prompts)],
                    tokens=arguments.tokens,
                    stop=model.stop,
                    temperature=temperature,
                    seed=turn,
                    **options,
                )
            if turn:
                found[entry.name].append(done)
    return found, bandwidths[1:]


def equal_share(texts: Sequence[Round], reference: Sequence[Round]) -> float:
    """The share of the reference's tokens that stand at the same place."""
    pairs = [
        (done.texts[name]["ids"], right.texts[name]["ids"])
        for done, right in zip(texts, reference, strict=True)
        for name in right.texts
    ]
    return sum(a == b for ids, right in pairs for a, b in zip(ids, right, strict=False)) / sum(len(r) for _, r in pairs)


def repeated_share(rounds: Sequence[Round], n: int = 8) -> float:
    """The share of n-grams that stood in their text before: texts that loop flatter whatever guesses tokens."""
    texts = [text["ids"] for done in rounds for text in done.texts.values()]
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(some)) for some in grams) / total if total else 0.0


def summarise(found: dict[str, list[Round]], name: str, bandwidth: float, judged: bool) -> dict[str, Any]:
    """The figures of one entry. over_full: rate over that of our full mode in the same round. equal: to the reference's
    greedy text, where that is `judged`."""
    rounds = found[name]
    rates = [done.rate() or 0.0 for done in rounds]
    ratios = [done.rate() / full.rate() for done, full in zip(rounds, found.get(FULL, []), strict=False)]
    read = [done.rate("bytes") for done in rounds]
    return {
        "tokens_per_s": round(statistics.median(rates), 2),
        "ms": round(1000 / statistics.median(rates), 3),
        "spread": round(spread(rates), 3),
        "over_full": round(statistics.median(ratios), 3) if ratios else None,
        "prefill_s": round(statistics.median(done.total("prefill_s") or 0 for done in rounds), 4),
        **share_of(None if None in read else statistics.median(read), bandwidth),
        "equal": round(equal_share(rounds, found[REFERENCE]), 3) if judged and REFERENCE in found else None,
    }


def share_of(read: float | None, bandwidth: float) -> dict[str, float | None]:
    """GB/s of weights, and the share of the bandwidth that is; both arguments in bytes/s."""
    return {
        "gb_s": None if read is None else round(read / 1e9, 2),
        "bandwidth_share": None if read is None else round(read / bandwidth, 3),
    }


def list_groups(entries: Sequence[Entry], apart: bool) -> list[list[Entry]]:
    """Entries that take turns: all of them, or ours with one other engine at a time."""
    others = dict.fromkeys(entry.engine for entry in entries if entry.engine != OURS)
    if not apart or len(others) < 2:
        return [list(entries)]
    return [[entry for entry in entries if entry.engine in (OURS, engine)] for engine in others]


class Field:
    """The engines of one model, loaded while they are needed: ours to the end."""

    def __init__(self, model: Model, threads: int, stack: ExitStack) -> None:
        self.workers: dict[str, Worker] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self._model, self._threads, self._stack = model, threads, stack

    def enter(self, entries: Sequence[Entry], group: ExitStack) -> None:
        """Load those that are not there yet; the others' processes end with the group."""
        for entry in entries:
            if entry.process not in self.workers:
                PROGRESS.log(f"{self._model.name}: loading {entry.name}")
                stack = self._stack if entry.engine == OURS else group
                self.workers[entry.process] = stack.enter_context(start(entry.worker, self._threads))
                self.loaded[entry.process] = self.workers[entry.process].ask("load", **entry.load)


def measure_model(
    model: Model, entries: Sequence[Entry], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all engines, and those of our own passes."""
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    ours = [entry for entry in entries if arguments.steps and entry.name.startswith("strace full")]
    with ExitStack() as stack:
        field = Field(model, arguments.threads, stack)
        for group in list_groups(entries, arguments.apart):
            with ExitStack() as processes:
                field.enter(group, processes)
                rows += compare_group(model, group, field, arguments)
        for entry in ours:
            cases = LENGTHS + CONTEXTS + SEQUENCES
            steps += time_passes(model, entry, field.workers[entry.process], cases, arguments.rounds, arguments.threads)
    for entry in ours if arguments.threads > 1 else []:
        with start(entry.worker, 1) as alone:
            alone.ask("load", **entry.load | {"threads": 1})
            steps += time_passes(model, entry, alone, LENGTHS, arguments.rounds, 1)
    return rows, steps


def compare_group(
    model: Model, entries: Sequence[Entry], field: Field, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of engines that take turns."""
    rows = []
    for temperature in arguments.temperatures if model.real else [0.0]:
        found, bandwidths = run_rounds(model, entries, field.workers, arguments, temperature)
        bandwidth = statistics.median(bandwidths)
        for entry in entries:
            loaded = field.loaded[entry.process]
            about = {"model": model.name, "temperature": temperature, "engine": entry.name}
            about |= {"version": loaded["version"], "read_bandwidth_gb_s": round(bandwidth / 1e9, 1)}
            about["mb_per_step"] = round(loaded["bytes_per_step"] / 1e6, 1)
            about["repeated_8grams"] = round(repeated_share(found[entry.name]), 3) if model.real else None
            figures = summarise(found, entry.name, bandwidth, judged=model.real and temperature == 0)
            rows.append(about | figures | field.workers[entry.process].ask("memory"))
    return rows


def time_passes(
    model: Model, entry: Entry, worker: Worker, cases: Sequence[tuple[int, int, int]], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Rows of our full passes in the format served, beside the read bandwidth of as many threads in the same rounds."""
    passes = worker.ask("time_passes", cases=cases, rounds=rounds)["passes"]
    about = {"model": model.name, "format": entry.load["dtype"], "threads": threads}
    return [
        about
        | {name: row[name] for name in ("sequences", "tokens", "context")}
        | {"ms": round(row["seconds"] * 1000, 3)}
        | {"tokens_per_s": round(row["sequences"] * row["tokens"] / row["seconds"], 1)}
        | {"read_bandwidth_gb_s": round(row["bandwidth"] / 1e9, 1)}
        | share_of(row["bytes"] / row["seconds"], row["bandwidth"])
        for row in passes
        if row["graph"] == "full"
    ]


PERCENT = ("bandwidth_share", "equal", "spread")
ENGINE_COLUMNS = {
    "model": "model", "T": "temperature", "engine": "engine", "tokens/s": "tokens_per_s", "ms": "ms",
    "spread": "spread", "x full": "over_full", "MB/step": "mb_per_step", "GB/s": "gb_s",
    "of bandwidth": "bandwidth_share", "equal": "equal", "MB resident": "resident_mb", "MB peak": "peak_mb",
}  # fmt: skip
STEP_COLUMNS = {
    "model": "model", "format": "format", "threads": "threads", "sequences": "sequences", "tokens": "tokens",
    "context": "context", "ms": "ms", "tokens/s": "tokens_per_s", "GB/s": "gb_s", "reads": "read_bandwidth_gb_s",
    "of bandwidth": "bandwidth_share",
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (EMBEDDED, *SHAPES)
    parser.add_argument("--models", nargs="+", default=models, choices=models, metavar="MODEL", help=" ".join(models))
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES, choices=ENGINES, metavar="ENGINE", help=" ".join(ENGINES)
    )
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens per text (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.0], metavar="T", help="of real text")
    parser.add_argument("--no-steps", dest="steps", action="store_false", help="leave out the tables of our own passes")
    parser.add_argument("--apart", action="store_true", help="one other engine at a time beside ours")
    parser.add_argument("--prepare", action="store_true", help="only write the models in every engine's format")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.tokens - 1, arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1, --tokens at least 2")
    if {"llama.cpp", "openvino"} & set(arguments.engines) and not PEERS_PYTHON.exists():
        parser.error(f"no {PEERS_PYTHON}: run `make bench-peers`, or choose --engines strace transformers")
    return arguments


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    models = [open_model(name, arguments.rounds) for name in arguments.models]
    for model in models:
        prepare(model, arguments.engines)
    if arguments.prepare:
        return
    load, rows, steps = require_idle(), [], []
    for model in models:
        entries = [entry for entry in list_entries(model, arguments.threads) if entry.engine in arguments.engines]
        for found, more in zip((rows, steps), measure_model(model, entries, arguments), strict=True):
            found += more
    show(rows, ENGINE_COLUMNS, f"Decoding, {arguments.threads} threads, medians of {arguments.rounds} rounds", PERCENT)
    if steps:
        show(steps, STEP_COLUMNS, "Our full passes, in the alternation of serving", PERCENT)
    finish(
        {
            "benchmark": "peers",
            "machine": describe(),
            "load_before": round(load, 3),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "tokens": arguments.tokens,
            "results": rows,
            "passes": steps,
        }
    )


if __name__ == "__main__":
    main()
