"""What every benchmark needs to be believed: an idle machine, its description, a table, one JSON last line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from server import bench
from server.bench import spread
from strace.costs import name_processor

__all__ = ["UNUSED", "describe", "finish", "read_prompts", "read_sources", "require_idle", "show", "spread"]

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


def show(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str],
    title: str | None = None,
    percent: Sequence[str] = (),
) -> None:
    """Rows as a table of some of their values, nothing where a row has none. columns: keys, or keys by heading.
    percent: keys whose values are shares."""
    keys = columns.values() if isinstance(columns, Mapping) else columns
    table = Table(*columns, title=title)
    for row in rows:
        values = ((key, row.get(key)) for key in keys)
        table.add_row(*("" if v is None else f"{v:.1%}" if key in percent else str(v) for key, v in values))
    Console(width=200).print(table)


def finish(result: dict[str, Any]) -> None:
    """Print the result as one JSON document, the last line of stdout."""
    print(json.dumps(result), flush=True)
