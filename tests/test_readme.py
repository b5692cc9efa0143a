"""README.md as a test: each of its blocks runs, in order, against a server started by the real command.

A block is skipped only where an HTML comment `<!-- not run: reason -->` stands right before it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADDRESS = "http://127.0.0.1:8000"
RUNNERS = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SHOWN = {"json", "text"}
TWO_COMMANDS = ["make serve", "make test"]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
START_SECONDS = 200
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its `language`, its `code`, the line it starts at, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def read_blocks(text: str) -> list[Block]:
    """Every fenced block of a Markdown text."""
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")), m["reason"]) for m in FENCE.finditer(text)
    ]


TESTED = {
    "chat, completions, responses": "server/api/test_parameters.py::test_streamed_is_whole_is_plain",
    "`n` answers": "server/api/test_chat.py::test_several_answers",
    "`best_of`": "server/api/test_parameters.py::test_the_best_of_several",
    "seed per request, equal text with and without drafts": (
        "server/engine/test_exact.py::test_every_parameter_and_pair"
    ),
    "penalties under speculation": "strace/test_laws.py::test_every_parameter_alone_and_with_each_other",
    "min_p, logit_bias": "strace/test_laws.py::test_every_parameter_alone_and_with_each_other",
    "logprobs, echo": "server/engine/test_logprobs.py::test_they_are_the_full_models",
    "JSON schema, regex, grammar": "server/api/test_structured.py::test_structured_outputs",
    "tools, streamed arguments; required, named, strict": "server/api/test_structured.py::test_required_tools",
    "thoughts apart": "server/api/test_tools.py::test_thoughts_apart",
    "speculation chosen per request": "server/api/test_chat.py::test_every_parameter_reaches_the_engine",
    "what ran, realised speedup in the answer": "server/api/test_chat.py::test_response_says_what_ran",
    "bounded queue, 429": "server/api/test_crowd.py::test_a_thousand_too_many",
    "who leaves frees its place within a step, streamed or not": (
        "server/api/test_crowd.py::test_who_leaves_frees_its_place_within_a_step"
    ),
    "keys, CORS, TLS": "server/test_cli.py::test_tls_and_keys",
    "ready only after a token": "server/api/test_bad_input.py::test_engine_that_is_not_running",
    "unknown fields refused": "server/api/test_bad_input.py::test_field_at_fault_is_named",
}
"""The rows of the table of features, and per row a test that fails where our `yes` is none."""


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = read_blocks(README)
RUNNABLE = [block for block in BLOCKS if block.language in RUNNERS and block.reason is None]


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, without comments."""
    return [shlex.join(words) for line in block.code.splitlines() if (words := shlex.split(line, comments=True))]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when `/health` answers 200; fail with the server's log when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    state = "ended" if process.poll() is not None else f"did not answer in {START_SECONDS} s"
    pytest.fail(f"the server {state}:\n{log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `strace-llm serve`, started once; an interrupt must end it cleanly."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["strace-llm", "serve", "--port", str(port)], env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that reads like the checkout, made of links, so that what blocks write lands beside it, not in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        (folder / entry.name).symlink_to(entry)
    # A reader sees curl print an error object; here that must be a failure.
    (folder / ".curlrc").write_text("fail-with-body\nshow-error\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("block", RUNNABLE, ids=[f"line-{block.line}" for block in RUNNABLE])
def test_block_runs(block: Block, address: str, checkout: Path) -> None:
    code = block.code.replace(ADDRESS, address)
    environment = {**ENVIRONMENT, "CURL_HOME": str(checkout)}
    done = subprocess.run(
        [*RUNNERS[block.language], code], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"README.md line {block.line}\n{code}\n{done.stdout}\n{done.stderr}"


def test_something_runs() -> None:
    assert RUNNABLE, "README.md has no runnable block"


def test_every_fence_is_a_block_of_a_known_language() -> None:
    """Neither a misplaced fence nor another name for the shell lets a block escape."""
    assert README.count("```") == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= RUNNERS.keys() | SHOWN


def test_comments_that_skip_stand_before_a_block() -> None:
    assert README.count("<!-- not run") == sum(block.reason is not None for block in BLOCKS)


def test_first_shell_block_is_the_two_commands() -> None:
    first = next(block for block in BLOCKS if block.language == "sh")
    assert first.reason is not None, "the install and the test run are what this test cannot run"
    ours = [command for command in commands(first) if not command.startswith(("git clone", "cd "))]
    assert ours == TWO_COMMANDS


@pytest.mark.parametrize("command", TWO_COMMANDS)
def test_two_commands_are_targets(command: str) -> None:
    plan = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    assert {"make serve": "strace-llm serve", "make test": "pytest"}[command] in plan.stdout


def test_every_feature_of_ours_has_a_test() -> None:
    table = README.partition("## The API beside others")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert [row[0].removeprefix("| ") for row in rows] == list(TESTED)
    for row in rows:
        file, name = TESTED[row[0].removeprefix("| ")].split("::")
        assert row[1] not in ("no", "-")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), file
