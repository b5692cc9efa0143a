"""What every benchmark needs to be believed: an idle machine, its description, its read bandwidth, one JSON last
line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from server import bench
from server.bench import spread
from strace.costs import name_processor

__all__ = ["UNUSED", "describe", "finish", "read_prompts", "read_sources", "require_idle", "spread"]

UNUSED = "unused"  # the folder of texts that nothing was tuned on


def require_idle() -> float:
    """The load found; ends the process where another job would spoil the figures."""
    try:
        return bench.require_idle()
    except bench.Busy as error:
        sys.exit(str(error))


def describe() -> dict[str, Any]:
    """Device, threads and versions, as they stand in every result."""
    return {
        "device": name_processor("cuda" if torch.cuda.is_available() else "cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def read_sources(name: str, folder: str = "prompts") -> list[dict[str, str]]:
    """The held-out prompts of a class with their sources: of `benchmarks/prompts`, cut from the valid part, or
    `UNUSED`."""
    lines = (Path(__file__).parent / folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def read_prompts(name: str, count: int, folder: str = "prompts") -> list[str]:
    """The texts of the first `count` of them."""
    return [prompt["text"] for prompt in read_sources(name, folder)[:count]]


def finish(result: dict[str, Any]) -> None:
    """Print the result as one JSON document, the last line of stdout."""
    print(json.dumps(result), flush=True)
