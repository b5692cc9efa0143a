"""A server's process to its end: it drains, it notices that its engine is lost, it reads its subgraphs again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from strace.checkpoint import open_checkpoint
from strace.classifier import fit_classifier
from tests.server.api.fake import wait_for
from tests.server.test_cli import ENVIRONMENT, read_banner
from tests.strace.test_subgraph import make as make_subgraph

SLOW = """
import time
from server.engine.cycle import Cycle
full_pass, passes = Cycle.full_pass, []
def slow(self, plan):
    passes.append(1)
    time.sleep({seconds} if len(passes) == {when} or {when} == 0 else 0)
    return full_pass(self, plan)
Cycle.full_pass = slow
"""
LATE = """
import time
import server.serve as serve
reload = serve.reload
def late(app):
    told = reload(app)
    print("read", flush=True)
    time.sleep(0.5)
    return told
serve.reload = late
"""
LONG = {"model": "model", "prompt": "once", "max_tokens": 200, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `subgraphs` with the class `code`."""
    folder = tmp_path_factory.mktemp("life")
    subgraph, checkpoint, *_ = make_subgraph(folder, dtype="fp32")
    rng = np.random.default_rng(0)
    known = {n: [(str(i), rng.integers(0, 99, 40).tolist()) for i in range(8)] for n in ("code", "chat")}
    tokenizer_hash = open_checkpoint(checkpoint.model).tokenizer_hash
    fit_classifier(known, known, 300, tokenizer_hash=tokenizer_hash).save(subgraph.parent)
    return folder


@contextmanager
def server_process(folder: Path, *arguments: str, before: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`strace-llm serve` of the folder's model after some code; its address."""
    command = ["serve", str(folder / "model"), "--port", "0", "--dtype", "fp32", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom server.cli import main; main()", *command],
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield read_banner(process)[0], process
    finally:
        process.kill()
        process.communicate()


def read_stream(address: str, lines: list[str]) -> threading.Thread:
    """Ask for a long text in a thread; its events arrive in `lines`, and the first one has."""

    def follow() -> None:
        with httpx.stream("POST", f"{address}/v1/completions", json=LONG, timeout=60) as response:
            for line in filter(None, response.iter_lines()):
                lines.append(line)

    thread = threading.Thread(target=follow)
    thread.start()
    wait_for(lambda: bool(lines), 30)
    return thread


def test_what_does_not_finish_in_time_is_cancelled(folder: Path) -> None:
    slow = SLOW.format(seconds=0.2, when=0)
    with server_process(folder, "--drain-timeout", "0.5", before=slow) as (address, process):
        lines: list[str] = []
        reading = read_stream(address, lines)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        reading.join(30)
        assert "the engine was stopped" in lines[-2]
        assert process.wait(30) == 0
        assert time.monotonic() - begun < 15


def test_with_its_engine_stuck_the_process_fails(folder: Path) -> None:
    stuck = SLOW.format(seconds=600, when=3)
    with server_process(folder, "--step-timeout", "2", before=stuck) as (address, process):
        with httpx.stream("POST", f"{address}/v1/completions", json=LONG, timeout=60) as response:
            told = "".join(response.iter_lines()) if response.status_code == 200 else response.read().decode()
        assert "unavailable_error" in told
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "the engine is stuck: a step has taken more than 2 seconds" in err


def test_subgraphs_are_read_again_and_the_end_is_orderly(folder: Path) -> None:
    """A class that is gone, one that is back, a folder that cannot be read; a stream goes on through all of it, and to
    its end when the process is told to stop."""
    subgraphs, away = folder / "subgraphs", folder / "away"
    slow = SLOW.format(seconds=0.05, when=0)
    with server_process(folder, "--subgraphs", str(subgraphs), before=slow) as (address, process):
        assert process.stdout is not None
        assert process.stderr is not None

        def names() -> list[str]:
            return [each["id"] for each in httpx.get(f"{address}/v1/models").json()["data"]]

        assert "model:code" in names()
        lines: list[str] = []
        reading = read_stream(address, lines)
        manifest = subgraphs / "code" / "subgraph.json"
        text = manifest.read_text()
        assert '"class": "code"' in text or '"class":"code"' in text
        changed = re.sub(r'("pays": ?)true', r"\1false", text)
        assert changed != text
        manifest.write_text(changed)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline().startswith("subgraphs read again: classes pooled")
        subgraphs.rename(away)
        process.send_signal(signal.SIGHUP)
        assert "those from before stay: no subgraph in" in process.stderr.readline()
        away.rename(subgraphs)
        manifest.write_text(text)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "subgraphs read again: classes code, pooled\n"
        assert "model:code" in names()
        fixed = {"model": "model:code", "prompt": "once upon", "max_tokens": 20, "seed": 1}
        exact, full = (
            httpx.post(f"{address}/v1/completions", json=fixed | {"strace": {"mode": mode}}, timeout=60).json()
            for mode in ("exact", "full")
        )
        assert exact["choices"][0]["text"] == full["choices"][0]["text"]
        if not reading.is_alive():
            reading = read_stream(address, lines := [])
        check_drained(address, process)
        reading.join(60)
        assert lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-2]
        assert process.wait(30) == 0


@pytest.mark.timeout(120)
def test_what_changes_while_subgraphs_are_read_is_read_too(folder: Path) -> None:
    """A signal that comes before the last one's reading has ended is not lost."""
    subgraphs = folder / "subgraphs"
    manifest = subgraphs / "code" / "subgraph.json"
    text = manifest.read_text()
    with server_process(folder, "--subgraphs", str(subgraphs), before=LATE) as (_, process):
        assert process.stdout is not None
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "read\n"
        manifest.write_text(re.sub(r'("pays": ?)true', r"\1false", text))
        process.send_signal(signal.SIGHUP)
        told = [process.stdout.readline() for _ in range(3)]
    manifest.write_text(text)
    assert told[:2] == ["subgraphs read again: classes code, pooled\n", "read\n"]
    assert told[2].startswith("subgraphs read again: classes pooled")


def check_drained(address: str, process: subprocess.Popen[str]) -> None:
    """Told to stop while a request runs: not ready, new requests refused, and still there."""
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{address}/health/ready").status_code == 503)
    assert httpx.get(f"{address}/health/live").status_code == 200
    refused = httpx.post(f"{address}/v1/completions", json=LONG | {"stream": False})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"
    assert process.poll() is None
