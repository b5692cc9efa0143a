"""`strace-llm bench`: how fast a model decodes on this machine in every mode, interleaved in one run, and how much of
the memory's read bandwidth that is.

Times are whole texts without HTTP; the prompt's own pass is told apart from decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from server.config import EngineConfig
from server.engine.build import Placement, build_engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.classes import POOLED, read_prompts
from strace.costs import Case, ReadMeter, measure_costs, name_processor, read_bandwidth
from strace.runner import FULL
from strace.sampling import SamplingParams

BUSY_SHARE = 0.15
SURE = 0.9  # confidence from which the bench's routed emits: the same for every class, whatever is certified
_PROMPT_TOKENS = 256  # of a text, given; the rest is for the model to write


class Busy(RuntimeError):
    """Another job uses this machine, so figures would be of both."""


@dataclass(frozen=True)
class Timed:
    """A text: its ids, the time (`perf_counter`) at which each was there, and what ran."""

    ids: list[int]
    times: list[float]
    ran: Ran

    @property
    def decoded(self) -> int:
        """Tokens after the pass that read the prompt."""
        return sum(t > self.times[0] for t in self.times)

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return self.times[-1] - self.times[0]


@dataclass
class Row:
    """The rounds of one mode: tokens per second of each, and all that was drafted, accepted and read."""

    rates: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


class Bench:
    """One engine, driven in this thread. A request that another mode would serve is still what was asked for: `ran`
    tells."""

    def __init__(self, model: str, subgraphs: Path | None = None, placement: Placement | None = None) -> None:
        """Raises what `build_engine` does."""
        self.engine, self.checkpoint = build_engine(
            model, subgraphs, placement=placement, options=Options(prefix_cache=False)
        )

    def generate(
        self, prompt: list[int], tokens: int, mode: Mode, params: SamplingParams, class_name: str | None = None
    ) -> Timed:
        """Continue one prompt to its end, or by `tokens`."""
        ids: list[int] = []
        times: list[float] = []
        rans: list[Ran] = []

        def deliver(update: Update | Exception) -> None:
            if isinstance(update, Exception):
                raise update
            ids.extend(update.ids)
            times.extend([time.perf_counter()] * len(update.ids))
            if update.ran is not None:
                rans.append(update.ran)

        threshold = SURE if mode == Mode.ROUTED else None
        request = Request("bench", prompt, params, tokens, mode=mode, class_name=class_name, threshold=threshold)
        self.engine.submit(request, deliver)
        while not rans:
            self.engine.step()
        return Timed(ids, times, rans[0])

    def bytes_read(self, text: Timed) -> float:
        """Of weights, by the full passes and draft steps after the first token."""
        ran, graphs = text.ran, self.engine.runner.graphs
        passes = ran.tokens - ran.accepted - 1
        draft = graphs[ran.class_name].bytes_per_step if ran.drafted else 0
        return passes * graphs[FULL].bytes_per_step + ran.drafted * draft

    def time_passes(self, cases: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
        """Rows of seconds per full pass, and per draft step of the whole model in int4, in the alternation of serving,
        with the best read bandwidth of the same rounds; the cache is written over."""
        graphs, meter = self.engine.runner.graphs, ReadMeter()
        costs = measure_costs(self.engine.runner, [POOLED], cases, rounds, meter=meter)
        about = {"bandwidth": meter.best}
        passes = [cost for cost in costs if cost.graph in graphs]
        return [vars(cost) | about | {"bytes": graphs[cost.graph].bytes_per_step} for cost in passes]


def busy_share(seconds: float = 2.0) -> float:
    """The share of this machine's processor time that others use, from /proc/stat over `seconds` of our own sleep; 0
    where there is no such file."""
    stat = Path("/proc/stat")

    def read() -> tuple[int, int]:
        fields = [int(f) for f in stat.read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    if not stat.exists():
        return 0.0
    total, idle = read()
    time.sleep(seconds)
    now_total, now_idle = read()
    return 1 - (now_idle - idle) / max(1, now_total - total)


def require_idle() -> float:
    """The load found.

    Raises:
        Busy: where another job would spoil the figures.
    """
    load = busy_share()
    if load > BUSY_SHARE:
        raise Busy(
            f"refusing to measure: another job uses {load:.0%} of this machine (limit {BUSY_SHARE:.0%}); stop it first"
        )
    return load


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range over the median: the noise of a list of timings; 0 of fewer than 4."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def cut_prompt(ids: list[int]) -> list[int]:
    """The part of a text that is given: its first third."""
    return ids[: min(_PROMPT_TOKENS, max(16, len(ids) // 3))]


def measure(config: EngineConfig, prompts: Path, rounds: int, tokens: int, temperature: float) -> dict[str, Any]:
    """All of `strace-llm bench`. prompts: a folder of classes as `strace-llm trace` reads it.

    Raises:
        Busy: beside another job.
        ValueError: BadPrompts, and what `build_engine` raises.
    """
    texts = read_prompts(prompts)
    load = require_idle()
    bench = Bench(config.model, config.subgraphs, Placement(config.device, config.dtype, config.context))
    encode, room = bench.checkpoint.tokenizer, bench.engine.limits.context - tokens
    ids = {
        name: [cut_prompt(encode(text.text)["input_ids"])[:room] for text in some[: rounds + 1]]
        for name, some in texts.items()
    }
    rows = compare_modes(bench, ids, rounds, tokens, SamplingParams(temperature))
    bandwidth = read_bandwidth(config.device)
    return {
        "benchmark": "bench",
        "model": config.model,
        "processor": name_processor(config.device),
        "runner": f"{bench.engine.runner.name} {bench.engine.runner.isa}",
        "threads": torch.get_num_threads(),
        "load_before": round(load, 3),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "temperature": temperature,
        "rounds": rounds,
        "tokens": tokens,
        "results": summarise(rows, bandwidth),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The result as a table."""
    about = f"{result['model']} on {result['processor']}, {result['threads']} threads, {result['runner']}"
    table = Table("mode", "tokens/s", "ms", "spread", "speedup", "accepted", "GB/s", "of bandwidth", title=about)
    for row in result["results"]:
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.1%}"
        cells = row["mode"], row["tokens_per_s"], row["ms"], f"{row['spread']:.1%}", row["speedup"], accepted
        table.add_row(*map(str, (*cells, row["gb_s"], f"{row['bandwidth_share']:.1%}")))
    console.print(table)


def compare_modes(
    bench: Bench, prompts: dict[str, list[list[int]]], rounds: int, tokens: int, params: SamplingParams
) -> dict[Mode, Row]:
    """Every mode on one prompt of every class in each round, in rotating order, after a round of warm-up."""
    modes = [Mode.FULL, Mode.EXACT, Mode.ROUTED]
    rows = {mode: Row() for mode in modes}
    for turn in range(rounds + 1):
        texts: dict[Mode, list[Timed]] = {mode: [] for mode in modes}
        for name, ids in prompts.items():
            known = name if name in bench.engine.classes else None
            for shift in range(len(modes)):
                mode = modes[(turn + shift) % len(modes)]
                texts[mode].append(bench.generate(ids[turn % len(ids)], tokens, mode, params, known))
        if turn:
            for mode, found in texts.items():
                _add(rows[mode], found, bench)
    return rows


def _add(row: Row, texts: list[Timed], bench: Bench) -> None:
    seconds = sum(text.seconds for text in texts)
    row.rates.append(sum(text.decoded for text in texts) / seconds)
    row.seconds += seconds
    row.bytes += sum(bench.bytes_read(text) for text in texts)
    row.drafted += sum(text.ran.drafted for text in texts)
    row.accepted += sum(text.ran.accepted for text in texts)


def summarise(rows: dict[Mode, Row], bandwidth: float) -> list[dict[str, Any]]:
    """One row of figures per mode. bandwidth: of reading, in bytes/s. speedup: median over the rounds of the ratio to
    `full`."""
    full, found = rows[Mode.FULL].rates, []
    for mode, row in rows.items():
        rate = statistics.median(row.rates)
        found.append(
            {
                "mode": str(mode),
                "tokens_per_s": round(rate, 1),
                "ms": round(1000 / rate, 3),
                "spread": round(spread(row.rates), 3),
                "speedup": round(statistics.median(a / b for a, b in zip(row.rates, full, strict=True)), 3),
                "acceptance": round(row.accepted / row.drafted, 3) if row.drafted else None,
                "gb_s": round(row.bytes / row.seconds / 1e9, 2),
                "bandwidth_share": round(row.bytes / row.seconds / bandwidth, 3),
            }
        )
    return found
