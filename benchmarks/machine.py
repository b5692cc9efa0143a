"""What every benchmark needs to be believed: an idle machine, its description, its read bandwidth, one JSON last
line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from strace.measure import name_processor

BUSY_SHARE = 0.15


def busy_share(seconds: float = 2.0) -> float:
    """The share of this machine's processor time that others use, from /proc/stat over `seconds` of our own sleep."""

    def read() -> tuple[int, int]:
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    (total, idle), _ = read(), time.sleep(seconds)
    now_total, now_idle = read()
    return 1 - (now_idle - idle) / max(1, now_total - total)


def require_idle() -> float:
    """The load found; ends the process where another job would spoil the figures."""
    load = busy_share()
    if load > BUSY_SHARE:
        sys.exit(
            f"refusing to measure: another job uses {load:.0%} of this machine (limit {BUSY_SHARE:.0%}); stop it first"
        )
    return load


def read_bandwidth(megabytes: int = 1024, rounds: int = 5) -> float:
    """bytes/s at which all threads of torch stream memory that no cache holds: the best of a few sums."""
    block = torch.ones(megabytes * 2**20 // 8, dtype=torch.float64)
    block.sum()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.nbytes / min(times)


def describe() -> dict[str, Any]:
    """Device, threads and versions, as they stand in every result."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: list[float]) -> float:
    """Half the interquartile range over the median: the noise of a list of timings."""
    if len(values) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def read_prompts(name: str, count: int) -> list[str]:
    """The first `count` held-out texts of a class (`benchmarks/prompts/`, cut from the valid part)."""
    lines = (Path(__file__).parent / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines[:count] if line]


def finish(result: dict[str, Any]) -> None:
    """Print the result as one JSON document, the last line of stdout."""
    print(json.dumps(result), flush=True)
