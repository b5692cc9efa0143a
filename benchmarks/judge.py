"""Others' programs judge the server: lm-evaluation-harness, litellm, the openai client and aiperf, over a socket.

lm-evaluation-harness scores the same texts through the server (`local-completions`) and through transformers (`hf`),
both in float32: the log-likelihoods must agree to 1e-3 and the greedy texts be equal, drafts and all. The texts are the
held-out ones, cut before their last word. aiperf puts a load on it (benchmarks/judges/load.py). Ends with status 1
where a judge is not content.

`make judge` makes .venv-judges and runs this.

Examples:
  python benchmarks/judge.py
  python benchmarks/judge.py --texts 20
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import read_prompts

from strace.checkpoint import EMBEDDED, resolve

HERE = Path(__file__).parent
JUDGES = HERE.parent / ".venv-judges" / "bin"
TASKS = ("next_word", "write_word")
CLASSES = ("chat", "code", "facts", "math", "stories")


@contextmanager
def serving() -> Iterator[str]:
    """A server of the embedded model in float32; gives its address."""
    command = [Path(sys.executable).parent / "strace-llm", "serve", EMBEDDED, "--dtype", "fp32", "--port", "0"]
    with subprocess.Popen([*command, "--mode", "exact"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if found := re.search(r"API at (\S+)/v1", line):
                    yield found[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            server.terminate()


def write_texts(folder: Path, count: int) -> int:
    """texts.jsonl: so many held-out texts of each class, cut before their last word."""
    lines = []
    for name in CLASSES:
        cut = [re.fullmatch(r"(.{40,400}?\S) (\w+)\W*", text[:400], re.DOTALL) for text in read_prompts(name, 200)]
        lines += [json.dumps({"before": m[1], "word": m[2]}) for m in cut if m][:count]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    for task in TASKS:
        text = (HERE / "judges" / f"{task}.yaml").read_text()
        (folder / f"{task}.yaml").write_text(text.replace("texts.jsonl", str(folder / "texts.jsonl")))
    return len(lines)


def evaluate(folder: Path, model: str, arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Per task what lm-evaluation-harness noted of each text, in order."""
    out = folder / model
    command = [JUDGES / "lm_eval", "run", "--model", model, "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", *TASKS, "--include_path", folder, "--output_path", out, "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "none"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=offline)
    noted = {}
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        noted[task] = sorted(samples, key=lambda sample: sample["doc_id"])
    return noted


def compare(ours: dict[str, list[dict[str, Any]]], theirs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How far the server's scores and texts are from transformers'."""

    def first(sample: dict[str, Any]) -> Any:
        return sample["resps"][0][0]

    likelihoods = [
        (float(first(a)[0]), float(first(b)[0])) for a, b in zip(*(x["next_word"] for x in (ours, theirs)), strict=True)
    ]
    texts = [(first(a), first(b)) for a, b in zip(*(x["write_word"] for x in (ours, theirs)), strict=True)]
    return {
        "largest difference of log-likelihood": max(abs(a - b) for a, b in likelihoods),
        "texts that differ": sum(a != b for a, b in texts),
        "share of words right": sum(s["exact_match"] for s in ours["write_word"]) / len(texts),
    }


def ask_clients(address: str) -> dict[str, Any]:
    """What benchmarks/judges/clients.py was told, and under `seen` what its clients made of the rest."""
    command = [JUDGES / "python", HERE / "judges" / "clients.py", f"{address}/v1"]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # or it looks for prices on the network
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    texts: dict[str, Any] = json.loads(told.splitlines()[-1])
    return texts


def put_load(address: str, model: str, requests: int) -> dict[str, Any]:
    """What benchmarks/judges/load.py found."""
    command = [JUDGES / "python", HERE / "judges" / "load.py", address, model, "--requests", str(requests)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def main() -> None:
    """Judge, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=12, help="texts of each class")
    parser.add_argument("--requests", type=int, default=40, help="requests of each of aiperf's runs")
    asked = parser.parse_args()
    model = resolve(EMBEDDED)
    with tempfile.TemporaryDirectory() as name, serving() as address:
        folder = Path(name)
        count = write_texts(folder, asked.texts)
        url = f"{address}/v1/completions"
        through = f"model={EMBEDDED},base_url={url},tokenizer={model},num_concurrent=4,max_length=1024"
        ours = evaluate(folder, "local-completions", through)
        theirs = evaluate(folder, "hf", f"pretrained={model},dtype=float32,max_length=1024")
        clients = ask_clients(address)
        load = put_load(address, str(model), asked.requests)
    seen = clients.pop("seen")
    found: dict[str, Any] = {"texts": count, **compare(ours, theirs), "clients": clients, "seen": seen, "load": load}
    content = (
        found["largest difference of log-likelihood"] <= 1e-3
        and not found["texts that differ"]
        and 0.1 <= found["share of words right"] <= 0.9
        and len(set(clients.values())) == 1
        and all(seen.values())
        and load["content"]
    )
    print(json.dumps(found | {"content": content}))
    sys.exit(not content)


if __name__ == "__main__":
    main()
