"""Where this project keeps what it may make again, and how a file or folder is written: beside its place and then
renamed, so that no reader ever sees half of it and nothing half-written is left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def cache_folder() -> Path:
    """`strace-llm` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`); it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strace-llm"


@contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` unless the block fails.

    Raises:
        OSError: it cannot be written, because the disk is full, say.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors would write a file that only its owner can read
        yield beside
        beside.chmod(mode)
        beside.replace(path)
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` unless the block fails."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_beside(path: Path, content: str) -> None:
    """Write a text file, in UTF-8, by `file_beside`."""
    with file_beside(path) as beside:
        beside.write_text(content, encoding="utf-8")
