"""Where this project keeps what it may make again, and how a file is written."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`strace-llm` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`); it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strace-llm"


def write_beside(path: Path, content: str) -> None:
    """Write beside, then rename, so that no reader ever sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)
