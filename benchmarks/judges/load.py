"""Runs in .venv-judges: aiperf puts a load on a server, and what it read must be what the server counted.

Four runs, chat and completions, streamed and whole, of `--requests` held-out prompts, 4 at a time. aiperf must parse
every answer and find in it the token counts and, where there were drafts, the acceptance in vLLM's shape; the sums must
be the server's own at `/metrics`. No hub is asked: the tokenizer is a folder. Prints one JSON document.

Example:
  .venv-judges/bin/python benchmarks/judges/load.py http://127.0.0.1:8000 models/embedded/model
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent.parent / "prompts"
CONCURRENCY = 4
OPTIONS = {"temperature": 0.8, "max_tokens": 48, "ignore_eos": True, "strace": {"mode": "exact", "metrics": True}}
# What aiperf sums over a run's answers, and the server's counter of the same.
SUMS = {
    "total_usage_prompt_tokens": "prompt_tokens",
    "total_usage_completion_tokens": "generation_tokens",
    "total_spec_decode_steps": "spec_decode_num_drafts",
    "total_draft_tokens": "spec_decode_num_draft_tokens",
    "total_accepted_draft_tokens": "spec_decode_num_accepted_tokens",
}


def write_prompts(file: Path, count: int) -> None:
    """So many texts of the held-out ones, as aiperf's `single_turn` reads them."""
    lines = [
        line for source in sorted(PROMPTS.glob("*.jsonl")) for line in source.read_text().splitlines()[: count // 5]
    ]
    file.write_text("".join(json.dumps({"text": json.loads(line)["text"][:300]}) + "\n" for line in lines))


def run(address: str, tokenizer: str, folder: Path, kind: str, stream: bool, count: int) -> dict[str, Any]:
    """What aiperf measured in one run."""
    out = folder / f"{kind}-{stream}"
    command = [str(Path(sys.executable).parent / "aiperf"), "profile", "--model", "embedded", "--url", address]
    command += ["--endpoint-type", kind, *(["--streaming"] if stream else []), "--tokenizer", tokenizer]
    command += ["--input-file", str(folder / "prompts.jsonl"), "--custom-dataset-type", "single_turn"]
    command += ["--request-count", str(count), "--concurrency", str(CONCURRENCY), "--use-server-token-count"]
    command += ["--extra-inputs", json.dumps(OPTIONS), "--random-seed", "1", "--artifact-dir", str(out)]
    command += ["--ui", "none", "--no-gpu-telemetry", "--workers-max", "1", "--export-level", "records"]
    # Told to be offline it would look for the folder in the hub's cache; as it is, it asks no hub for a folder.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment, cwd=folder)
    (file,) = out.rglob("profile_export_aiperf.json")
    measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def read_counters(address: str) -> dict[str, float]:
    """The server's counters of `SUMS`, over all their labels."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = {name: re.findall(rf"^strace_llm_{name}_total(?:{{.*}})? (\S+)$", text, re.M) for name in SUMS.values()}
    return {name: sum(map(float, values)) for name, values in found.items()}


def judge(address: str, tokenizer: str, folder: Path, kind: str, stream: bool, count: int) -> dict[str, Any]:
    """One run: what aiperf read, what the server counted, and whether both are content."""
    before = read_counters(address)
    measured = run(address, tokenizer, folder, kind, stream, count)
    after = read_counters(address)
    read = {name: measured.get(name, {}).get("avg", 0) for name in SUMS}
    counted = {name: after[counter] - before[counter] for name, counter in SUMS.items()}
    answered = measured.get("request_count", {}).get("avg", 0)
    whole = answered == count and not measured["error_summary"] and read == counted
    return {"answered": answered, "errors": measured["error_summary"], "read": read, "counted": counted, "whole": whole}


def main() -> None:
    """Judge, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("tokenizer", help="folder")
    parser.add_argument("--requests", type=int, default=40, help="of each run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", asked.requests)
        runs = {
            f"{kind}, {'streamed' if stream else 'whole'}": judge(
                asked.address, str(Path(asked.tokenizer).resolve()), folder, kind, stream, asked.requests
            )
            for kind in ("chat", "completions")
            for stream in (True, False)
        }
    drafted = sum(found["read"]["total_draft_tokens"] for found in runs.values())
    print(json.dumps({"runs": runs, "content": drafted > 0 and all(found["whole"] for found in runs.values())}))


if __name__ == "__main__":
    main()
