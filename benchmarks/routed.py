"""What the promise of `routed` is worth: how often it would be broken, and what it brings on texts never used before.

Two parts, for every class and temperature where a risk is certified:

- The losses that `strace-llm certify` measured are taken as the whole population; over 1,000 calibration draws from it,
  with replacement, the threshold chosen must break the promise in at most delta + 3 sqrt(delta (1 - delta) / 1000).
- The first third of each held-out text is continued by full, exact and routed at the certified threshold, in rotating
  order: divergence with its 95 % interval, share emitted unverified, realised speedup. Untimed: where a seeded routed
  text first parts from the full model's of the same seed, and the full model's perplexity of routed text beside that
  of its own.

Only prompts that the classifier sends to the class count. Times are whole requests, prefill included, without HTTP.

Examples:
  python benchmarks/routed.py
  python benchmarks/routed.py --classes chat math --risk 0.05 --prompts 20
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, finish, read_prompts, require_idle
from modes import cut_prompt, repeated_share, run_engine
from rich.console import Console
from rich.table import Table

from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.request import Mode, Ran, Request, Update
from strace.certificate import Certificate, Level, Setting, load_certificates
from strace.certify import DELTA, bound_mean, share_broken
from strace.graphs import choose_dtype, choose_folder
from strace.losses import Losses
from strace.runner import FULL
from strace.sampling import SamplingParams
from strace.subgraph import find_subgraphs

CLASSES = ("chat", "code", "facts", "math", "stories")
DRAWS = 1000
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)


def resample(table: Path, certificate: Certificate, temperature: float) -> list[dict[str, Any]]:
    """The share of calibration draws that break the promise, per risk, of the losses measured for a class."""
    losses = Losses.load(table)
    thresholds = losses.measured(temperature, certificate.prompts)
    if not thresholds or not certificate.prompts:
        return []
    pool = losses.matrix(temperature, thresholds)
    rows = []
    for level in certificate.levels:
        if level.temperature == temperature:
            broken = share_broken(pool, level.risk, DRAWS, len(pool))
            row = {"risk": level.risk, "n": len(pool), "broken": broken, "allowed": round(ALLOWED, 4)}
            rows.append(row | {"kept": broken <= ALLOWED})
    return rows


def interval(losses: Sequence[float]) -> list[float]:
    """Of the mean, 95 %, both ends by the bound that certifies."""
    x = np.array(losses)
    return [round(1 - bound_mean(1 - x, 0.025), 5), round(bound_mean(x, 0.025), 5)]


def find_parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The number of the first token in which two texts differ; None where neither does."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), None)


def score(engine: Engine, prompt: list[int], text: list[int]) -> list[float]:
    """The full model's log-probability of each token of `text`, at temperature 1."""
    told: list[float] = []
    done: list[bool] = []

    def deliver(update: Update | Exception) -> None:
        if isinstance(update, Exception):
            raise update
        told.extend(one.logprob for one in update.prompt_logprobs)
        done.extend([True] if update.finish else [])

    params = SamplingParams(0.0)
    whole = Request("score", prompt + text, params, 1, mode=Mode.FULL, logprobs=0, prompt_logprobs=True)
    engine.submit(whole, deliver)
    while not done:
        engine.step()
    return told[len(prompt) - 1 :]


def perplexity(logprobs: Sequence[float]) -> float | None:
    """Of all tokens together."""
    return round(math.exp(-statistics.fmean(logprobs)), 3) if logprobs else None


def measure(engine: Engine, prompts: list[list[int]], temperature: float, risk: float, tokens: int) -> dict[str, Any]:
    """Every prompt through every mode, in rotating order, after one prompt of warm-up."""
    modes = (Mode.FULL, Mode.EXACT, Mode.ROUTED)
    seconds = dict.fromkeys(modes, 0.0)
    count = dict.fromkeys(modes, 0)
    routed: list[Ran] = []
    texts: dict[Mode, list[list[int]]] = {mode: [] for mode in modes}
    for number, prompt in enumerate([prompts[0], *prompts]):
        for turn in range(len(modes)):
            mode = modes[(number + turn) % len(modes)]
            asked = risk if mode == Mode.ROUTED else None
            request = Request(str(number), prompt, SamplingParams(temperature), tokens, mode=mode, risk=asked)
            begun = time.perf_counter()
            ids, ran = run_engine(engine, request)
            took = time.perf_counter() - begun
            if number:
                seconds[mode] += took
                count[mode] += len(ids)
                texts[mode].append(ids)
                routed += [ran] if mode == Mode.ROUTED else []
    rate = {mode: count[mode] / seconds[mode] for mode in modes}
    losses = [ran.divergent / ran.tokens for ran in routed]
    scored = {
        mode: [p for given, text in zip(prompts, texts[mode], strict=True) for p in score(engine, given, text)]
        for mode in (Mode.FULL, Mode.ROUTED)
    }
    return {
        "n": len(prompts),
        "routed": sum(ran.mode == Mode.ROUTED for ran in routed),
        "tokens": count[Mode.ROUTED],
        "divergence": round(statistics.fmean(losses), 5),
        "interval": interval(losses),
        "unverified": round(sum(r.unverified for r in routed) / count[Mode.ROUTED], 4),
        "tokens_per_s": {mode.value: round(rate[mode], 1) for mode in modes},
        "over_full": round(rate[Mode.ROUTED] / rate[Mode.FULL], 3),
        "over_exact": round(rate[Mode.ROUTED] / rate[Mode.EXACT], 3),
        "repeated_8grams": round(statistics.fmean(map(repeated_share, texts[Mode.ROUTED])), 3),
        "perplexity": perplexity(scored[Mode.ROUTED]),
        "perplexity_full": perplexity(scored[Mode.FULL]),
    }


def part(engine: Engine, prompts: list[list[int]], temperature: float, level: Level, tokens: int) -> dict[str, Any]:
    """Where routed text first parts from the full model's of the same seed, at the certified threshold."""
    places: list[int | None] = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature, seed=number)
        full = Request(str(number), prompt, params, tokens, mode=Mode.FULL)
        routed = replace(full, mode=Mode.ROUTED, threshold=level.threshold)
        places.append(find_parting(run_engine(engine, full)[0], run_engine(engine, routed)[0]))
    parted = [place for place in places if place is not None]
    return {
        "parted": round(len(parted) / len(places), 3),
        "parted_at": [int(q) for q in np.quantile(parted, [0.25, 0.5, 0.75])] if parted else None,
    }


def show(results: list[dict[str, Any]]) -> None:
    """What was measured, as a table."""
    names = ("class", "temperature", "risk", "threshold", "n", "divergence", "interval", "unverified")
    names += ("over_full", "over_exact", "parted", "parted_at", "perplexity", "perplexity_full")
    table = Table(*names)
    for row in results:
        table.add_row(*(str(row.get(name, "")) for name in names))
    Console(width=180).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--subgraphs", type=Path, help="folder of subgraphs; the embedded model brings its own")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES, metavar="CLASS")
    parser.add_argument("--risk", type=float, nargs="+", default=[0.02], help="risks asked for (default 0.02)")
    parser.add_argument("--prompts", type=int, default=50, help="held-out texts per class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    parser.add_argument("--resample-only", action="store_true", help="measure no times and no held-out texts")
    arguments = parser.parse_args()
    load = 0.0 if arguments.resample_only else require_idle()
    engine, checkpoint = build_engine(arguments.model, arguments.subgraphs, placement=Placement())
    folder = choose_folder(arguments.model, arguments.subgraphs)
    if folder is None:
        parser.error(f"{arguments.model} has no subgraphs")
    setting = Setting(engine.runner.name, engine.runner.isa, choose_dtype("cpu"))
    resampled, results, uncertified = [], [], []
    for name, certificate in load_certificates(folder, find_subgraphs(folder), setting).items():
        table = setting.path(folder / name).with_suffix(".safetensors")
        for temperature in sorted({level.temperature for level in certificate.levels}, reverse=True):
            about = {"class": name, "temperature": temperature}
            resampled += [about | row for row in resample(table, certificate, temperature)]
            if arguments.resample_only or name not in arguments.classes:
                continue
            encode = checkpoint.tokenizer
            ids = [cut_prompt(encode(text)["input_ids"]) for text in read_prompts(name, arguments.prompts)]
            prompts = [some for some in ids if engine.choose(some) == name]
            for risk in arguments.risk:
                level = certificate.find(temperature, risk)
                if level is None:
                    uncertified.append(about | {"risk": risk})
                    continue
                row = about | {"risk": level.risk, "threshold": level.threshold}
                row |= measure(engine, prompts, temperature, risk, arguments.tokens)
                results.append(row | part(engine, prompts, temperature, level, arguments.tokens))
    show(results)
    finish(
        {
            "benchmark": "routed",
            "machine": describe(),
            "load_before": round(load, 3),
            "model": arguments.model,
            "runner": f"{engine.runner.name} {engine.runner.isa}",
            "dtype": str(engine.runner.graphs[FULL].dtype),
            "resampled": resampled,
            "promise_kept": all(row["kept"] for row in resampled),
            "results": results,
            "uncertified": uncertified,
        }
    )


if __name__ == "__main__":
    main()
