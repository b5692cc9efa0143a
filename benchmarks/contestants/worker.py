"""The process in which one engine runs: JSON lines in, JSON lines out, so that each has its own Python environment and
its own memory. Started by benchmarks/peers.py as `python worker.py ENGINE`; ENGINE is a module beside this file.

Such a module has a class `Contestant` whose methods are the requests: `load(**options) -> dict`, then
`generate(prompt, tokens, stop, temperature, seed, **options) -> Text`, or others that it documents.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import IO, Any


def memory() -> dict[str, float]:
    """MB that are resident now, and that were at most."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {"resident_mb": fields["VmRSS"], "peak_mb": fields["VmHWM"]}
    return {name: round(int(size.split()[0]) / 1024, 1) for name, size in sizes.items()}


def answer(contestant: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Carry one request out."""
    method = request.pop("do")
    if method == "memory":
        return memory()
    started = time.perf_counter()
    done = getattr(contestant, method)(**request)
    if method != "generate":
        return done
    ids, times, read = done
    later = [t for t in times if t > times[0]]
    return {
        "ids": ids,
        "prefill_s": times[0] - started,
        "decoded": len(later),
        "decode_s": times[-1] - times[0],
        "bytes": read,
    }


def main() -> None:
    """Answer every line of stdin with one line on the real stdout; whatever the engine prints goes to stderr."""
    replies: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant = import_module(sys.argv[1]).Contestant()
    for line in sys.stdin:
        try:
            reply = answer(contestant, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
