"""The command as users meet it: help, exit codes, one-line errors, text on the terminal, a server's life."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from rich.console import Console
from typer.testing import CliRunner

from server import console
from server.api.completions import prepare
from server.api.protocol import CompletionRequest
from server.api.served import Served
from server.cli import app, configure
from server.config import EngineConfig, ServeConfig
from server.engine.request import Update
from server.load import load_served
from server.serve import describe
from tests.server.api.fake import FakeEngine, make_served
from tests.strace.test_subgraph import make as make_subgraph
from tests.tiny import make_tokenizer, save_tiny

RUNNER = CliRunner()
COMMANDS = ["serve", "generate", "chat", "bench", "certify", "trace", "inspect", "measure", "convert"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STRACE_LLM_")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    """A tiny model with a real engine at work."""
    with console.running(load_served(EngineConfig(model=str(tiny), dtype="fp32"))) as served:
        yield served


def run(*arguments: str | Path, text: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def check_failure(code: int, outcome: tuple[int, str, str]) -> str:
    """The one line on stderr of a command that failed."""
    assert outcome[0] == code, outcome
    assert outcome[1] == ""
    assert re.fullmatch(r"error: [^\n]+\n", outcome[2])
    return outcome[2]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    if command:
        assert f"strace-llm {command[0]} " in re.sub(r"\s+", " ", out), "the help has no example"
    else:
        assert all(name in out for name in COMMANDS)


def test_unknown_model_folder(tmp_path: Path) -> None:
    for command in (["serve", "--port", "0"], ["chat"]):
        assert str(tmp_path / "no") in check_failure(1, run(*command, tmp_path / "no"))
    assert str(tmp_path / "no") in check_failure(1, run("generate", "hi", "--model", tmp_path / "no"))


def test_corrupt_safetensors(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "corrupt")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    assert "model.safetensors" in check_failure(1, run("generate", "hi", "--model", folder))


def test_unsupported_architecture(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert")
    config = (folder / "config.json").read_text()
    changed = config.replace('"model_type": "llama"', '"model_type": "bert"').replace("LlamaForCausalLM", "BertModel")
    assert changed != config
    (folder / "config.json").write_text(changed)
    assert "Llama" in check_failure(1, run("generate", "hi", "--model", folder))


def test_subgraph_folder_that_is_none(tiny: Path, tmp_path: Path) -> None:
    outcome = run("generate", "hi", "--model", tiny, "--subgraphs", tmp_path / "none")
    assert str(tmp_path / "none") in check_failure(1, outcome)


def test_subgraph_of_another_model(tiny: Path, tmp_path: Path) -> None:
    folder, *_ = make_subgraph(tmp_path, "qwen3")
    outcome = run("generate", "hi", "--model", tiny, "--subgraphs", folder.parent)
    assert "another model" in check_failure(1, outcome)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "3"], "temperature"),
        (["--max-tokens", "-1"], "max-tokens"),
        (["--mode", "fast"], "mode"),
        (["--dtype", "fp8"], "dtype"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_wrong_flag(flags: list[str], named: str) -> None:
    code, _, err = run("generate", "hi", *flags)
    assert code == 2
    assert named in re.sub(r"\x1b\[[0-9;]*m", "", err)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--device", "tpu"),
        ("--served-model-name", "a:b"),
        ("--max-running", "0"),
        ("--max-queue", "0"),
        ("--api-key", ""),
        ("--kv-memory", "much"),
        ("--step-timeout", "0"),
    ],
)
def test_wrong_setting(flag: str, value: str) -> None:
    assert flag in check_failure(2, run("serve", flag, value))


def test_memory_of_the_cache(tiny: Path) -> None:
    """With a unit; and texts share none of it where that is not wanted."""
    assert configure(ServeConfig, kv_memory="2GiB").kv_memory == 2 * 2**30
    config = configure(EngineConfig, model=str(tiny), dtype="fp32", kv_memory="95KiB", prefix_cache=False)
    served = load_served(config)
    assert served.cache == 96  # 3 layers, keys and values of 2 heads of 16 numbers, 4 bytes each: 768 bytes per token
    assert "KV cache 96 tokens" in describe(served, ServeConfig(), 1)
    assert not served.engine.options.prefix_cache
    served.engine.stop()


def test_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRACE_LLM_PORT", "many")
    assert "STRACE_LLM_PORT" in check_failure(2, run("serve"))


def test_empty_prompt_and_unknown_class(tiny: Path) -> None:
    assert "prompt is empty" in check_failure(2, run("generate", "", "--model", tiny))
    outcome = run("generate", "hi", "--model", tiny, "--class", "poetry")
    assert "poetry" in check_failure(2, outcome)


def test_port_in_use(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = check_failure(1, run("serve", tiny, "--port", port))
    assert port in message
    assert "in use" in message


def test_generate_prints_the_text_and_what_ran(tiny: Path, served: Served) -> None:
    code, out, err = run(
        "generate", "hello", "--model", tiny, "--dtype", "fp32", "--max-tokens", "12", "--seed", "1", "--mode", "full"
    )
    assert code == 0
    assert "\x1b" not in out
    body = CompletionRequest(model=served.name, prompt="hello", max_tokens=12, seed=1)
    assert out == f"{text_of(served, body)}\n"
    assert re.match(r"12 tokens; mode full; class pooled; .*realised speedup \d", err)


def text_of(served: Served, body: CompletionRequest) -> str:
    """The text that the engine itself reports."""
    (request,) = prepare(served, body, "test")
    return "".join(update.text for update in console.updates(served, request))


def test_generate_reports_acceptance(tiny: Path) -> None:
    _, _, err = run("generate", "hello", "--model", tiny, "--max-tokens", "24", "--mode", "exact")
    assert "mode exact" in err
    assert "acceptance" in err or "nothing drafted" in err


def test_chat_takes_turns(tiny: Path) -> None:
    code, out, err = run("chat", tiny, "--max-tokens", "5", text="hello\n\n" + "x" * 300 + "\nand you?\n")
    assert code == 0
    assert out.count("\n") >= 2
    assert len(re.findall(r"^\d tokens; ", err, re.MULTILINE)) == 2
    assert "error: the context holds 256 tokens" in err


def terminal() -> Console:
    return Console(force_terminal=True, color_system="standard", width=80, record=True)


def test_tokens_wear_the_colour_of_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    h, i = make_tokenizer().encode("hi", add_special_tokens=False)
    served = make_served(FakeEngine(updates=[Update([h, i], [False, True], "hi", "stop")]))
    with console.running(served):
        out = terminal()
        console.generate(served, CompletionRequest(model="tiny", prompt="x"), out, Console(stderr=True))
    shown = capsys.readouterr()
    assert "\x1b[33mh\x1b[0m\x1b[32mi\x1b[0m" in shown.out
    assert "acceptance 75% (3 of 4 drafted)" in shown.err
    assert "realised speedup 2.00" in shown.err


def test_escape_sequences_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    escape = make_tokenizer().encode("\x1b]0;title\x07", add_special_tokens=False)
    served = make_served(FakeEngine(updates=[Update(escape, [False] * len(escape), "", "stop")]))
    with console.running(served):
        console.generate(served, CompletionRequest(model="tiny", prompt="x"), terminal(), Console(stderr=True))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "]0;title" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


@contextmanager
def server_process(*arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`strace-llm serve` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from server.cli import main; main()", "serve", *map(str, arguments)],
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_banner(process: subprocess.Popen[str], certificate: Path | None = None) -> tuple[str, list[str]]:
    """The address a started server gives, and its whole banner, once it answers."""
    trust = True if certificate is None else ssl.create_default_context(cafile=certificate)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    match = re.search(r"API at (\S+)/v1", lines[1])
    assert match, (lines, process.stderr.read() if process.stderr else "")
    deadline = time.monotonic() + 20
    while True:
        try:
            assert httpx.get(f"{match[1]}/health", verify=trust).status_code == 200
            return match[1], lines
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_server_end_to_end(tiny: Path) -> None:
    with server_process(tiny, "--port", "0", "--dtype", "fp32", STRACE_LLM_MODE="full") as process:
        address, banner = read_banner(process)
        assert "mode full" in banner[0]
        answer = subprocess.run([*shlex.split(banner[2]), "-sf"], capture_output=True, check=True, timeout=60)
        assert b'"strace":{"mode":"full"' in answer.stdout
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
            check_modes_agree(client)
        metrics = httpx.get(f"{address}/metrics").text
        assert re.search(r'strace_llm_requests_total\{class="pooled",finish_reason="\w+",mode="exact"\} 1\.0', metrics)
        assert f'model="{tiny.name}"' in metrics
        check_drained(address, process)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


def test_tls_and_keys(tiny: Path, tmp_path: Path) -> None:
    """Keys from a file and from the environment, over HTTPS."""
    key, certificate, keys = (tmp_path / name for name in ("key.pem", "certificate.pem", "keys"))
    keys.write_text("first\n\n  second\n")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    flags = ["--tls-key", key, "--tls-certificate", certificate, "--api-key-file", keys, "--port", "0"]
    with server_process(tiny, "--dtype", "fp32", *flags, STRACE_LLM_API_KEY="third") as process:
        address, banner = read_banner(process, certificate)
        assert address.startswith("https://")
        assert "Authorization: Bearer $STRACE_LLM_API_KEY" in banner[2]
        with httpx.Client(base_url=address, verify=ssl.create_default_context(cafile=certificate)) as http:
            for given, status in (("first", 200), ("second", 200), ("third", 200), ("fourth", 401)):
                headers = {"Authorization": f"Bearer {given}"}
                assert http.get("/v1/models", headers=headers).status_code == status
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{address.replace('https', 'http')}/health")


def test_half_a_key_pair_and_an_empty_key_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    assert "--tls-certificate and --tls-key" in check_failure(2, run("serve", str(tiny), "--tls-key", "x"))
    assert "holds no key" in check_failure(1, run("serve", str(tiny), "--api-key-file", str(tmp_path / "keys")))


def check_drained(address: str, process: subprocess.Popen[str]) -> None:
    """A stream in progress when the server is told to stop comes to its end."""
    body = {"model": "tiny", "prompt": "once", "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"


def check_modes_agree(client: openai.OpenAI) -> None:
    """A seeded text is the same streamed or not, in full and in exact."""
    fixed = {"prompt": "once upon", "max_tokens": 24, "seed": 5}
    whole = client.completions.create(model="tiny", **fixed)  # type: ignore[call-overload]
    assert whole.usage.prompt_tokens == len("once upon")
    exact = client.completions.create(model="tiny:exact", **fixed)  # type: ignore[call-overload]
    assert exact.choices[0].text == whole.choices[0].text
    stream = client.completions.create(model="tiny", stream=True, **fixed)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
