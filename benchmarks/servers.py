"""Servers in processes of their own, asked over HTTP: ours, and transformers' with its continuous batching."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TRANSFORMERS = "from transformers.cli.transformers import main; main()"
_START_SECONDS = 120


@contextmanager
def start_ours(model: str, flags: Mapping[str, object]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`strace-llm serve` with flags by name; its address and process."""
    command = [Path(sys.executable).parent / "strace-llm", "serve", model, "--port", "0", *_spell(flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                print(line, end="", file=sys.stderr)
                if found := re.search(r"API at (\S+)/v1", line):
                    _await(f"{found[1]}/health/ready", server)
                    yield found[1], server
                    break
            else:
                sys.exit("the server did not start")
        finally:
            server.kill()


@contextmanager
def start_transformers(folder: str, threads: int, flags: Mapping[str, object]) -> Iterator[str]:
    """`transformers serve --continuous-batching` in bf16 on the CPU, with flags by name; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _TRANSFORMERS, "serve", folder, "--continuous-batching", "--device", "cpu"]
    command += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port), *_spell(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _await(f"{address}/health", server)
            yield address
        finally:
            server.kill()


def _spell(flags: Mapping[str, object]) -> list[str]:
    """Flags as they are typed; one that is False as its opposite."""
    return [
        word
        for name, value in flags.items()
        for word in ([f"--no-{name}"] if value is False else [f"--{name}", str(value)])
    ]


def _await(url: str, server: subprocess.Popen[Any]) -> None:
    """Return once a server answers; end the process where it does not in time."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"no server answers at {url}")
