"""Engines in processes of their own: each in its Python environment and with its own memory, asked over pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CONTESTANTS = Path(__file__).parent / "contestants"
PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
_LAST_WORDS = 2000  # characters of an engine's own output that are shown when it fails


class Worker:
    """One engine's process: requests are dicts, as benchmarks/contestants/worker.py answers them."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process, self._errors = process, errors

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Carry a request out and wait for its answer.

        Raises:
            RuntimeError: with the engine's own words, if it failed or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the process ended"}
        if "error" in reply:
            self._errors.seek(0)
            raise RuntimeError(f"{method}: {reply['error']}\n{self._errors.read()[-_LAST_WORDS:]}")
        return reply


@contextmanager
def start(engine: str, threads: int) -> Iterator[Worker]:
    """A worker for as long as it is needed; engine: a module of benchmarks/contestants."""
    python = sys.executable if engine in ("ours", "huggingface") else str(PEERS_PYTHON)
    command = [python, str(CONTESTANTS / "worker.py"), engine]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment) as process,
    ):
        yield Worker(process, errors)
