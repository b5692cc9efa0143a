"""What the promise of `routed` is worth: how often it would be broken, and what it brings on texts never used before.

Two parts, for every class and temperature where a risk is certified:

- The losses that `strace-llm certify` measured are taken as the whole population; over 1,000 calibration draws from it,
  with replacement, the threshold chosen must break the promise in at most delta + 3 sqrt(delta (1 - delta) / 1000).
- The first third of each held-out text is continued by full, exact and routed at the certified threshold, in rotating
  order: divergence with its 95 % interval, share emitted unverified, realised speedup. Untimed: where a seeded routed
  text first parts from the full model's of the same seed, and the full model's perplexity of routed text beside that
  of its own.

The guard shuts the gate where emitting unverified is not surely faster than verifying; it is given the texts to learn
from first. Each row says what it found, and what a pass over n tokens costs says how much could be gained at all: every
token passes the full model once, so no text is decoded faster than n / ((n - 1) c + v(n)) times as fast as by it.

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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, finish, read_prompts, require_idle
from modes import cut_prompt, repeated_share, run_engine
from rich.console import Console
from rich.table import Table
from scipy import stats

from server.engine.build import Placement, build_engine
from server.engine.cost import CostModel
from server.engine.engine import Engine
from server.engine.guard import Mean, Trust
from server.engine.options import Options
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
LESSONS = 5  # times that the guard sees the texts before they are timed
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


def find_gate(engine: Engine, name: str) -> tuple[Trust, Mean]:
    """What the guard thinks of a class's gate for one text at a time."""
    known = {other: (trust, mean) for other, batch, trust, mean in engine.guard.gates() if batch == 1}
    return known.get(name, (Trust.UNSURE, Mean(1.0)))


def teach(engine: Engine, name: str, requests: list[Request]) -> None:
    """Let the guard learn anew from routed texts, `LESSONS` times each at most, until it knows."""
    engine.guard.forget()
    for request in requests * LESSONS:
        run_engine(engine, request)
        if find_gate(engine, name)[0] is not Trust.UNSURE:
            return


def describe_gate(trust: Trust, mean: Mean) -> dict[str, Any]:
    """The guard's verdict, and the speedup of open over shut that it saw, with its 95 % interval."""
    ends = (mean.value + sign * 1.96 * mean.error for sign in (-1, 1))
    interval = [round(math.exp(end), 3) for end in ends]
    return {"trust": trust.name, "blocks": mean.blocks, "gain": round(math.exp(mean.value), 3), "interval": interval}


def predict(rans: Sequence[Ran], cost: CostModel, name: str) -> float | None:
    """The speedup over full that the costs of passes alone give for drafts as long and as good as these."""
    cycles = sum(ran.drafts for ran in rans)
    if not cycles:
        return None
    drafted = sum(ran.drafted for ran in rans) / cycles
    tokens = 1 + sum(ran.accepted for ran in rans) / cycles
    whole = int(drafted)
    verify = cost.v(whole + 1) + (drafted - whole) * (cost.v(whole + 2) - cost.v(whole + 1))
    return tokens / (drafted * cost.c(name) + verify)


def bound_speedup(cost: CostModel, name: str, most: int) -> float:
    """The greatest n / ((n - 1) c + v(n)), n up to `most`."""
    return max(n / ((n - 1) * cost.c(name) + cost.v(n)) for n in range(1, most + 1))


def measure(
    engine: Engine, name: str, prompts: list[list[int]], temperature: float, risk: float, tokens: int
) -> dict[str, Any]:
    """Every prompt through every mode, in rotating order, once the guard has learnt what it can."""
    modes = (Mode.FULL, Mode.EXACT, Mode.ROUTED)
    params = SamplingParams(temperature)
    asked = [Request(str(i), prompt, params, tokens, mode=Mode.ROUTED, risk=risk) for i, prompt in enumerate(prompts)]
    teach(engine, name, asked)
    seconds: dict[Mode, list[float]] = {mode: [] for mode in modes}
    texts: dict[Mode, list[list[int]]] = {mode: [] for mode in modes}
    rans: dict[Mode, list[Ran]] = {mode: [] for mode in modes}
    for number, routed in enumerate(asked):
        for turn in range(len(modes)):
            mode = modes[(number + turn) % len(modes)]
            request = routed if mode == Mode.ROUTED else replace(routed, mode=mode, risk=None)
            begun = time.perf_counter()
            ids, ran = run_engine(engine, request)
            seconds[mode].append(time.perf_counter() - begun)
            texts[mode].append(ids)
            rans[mode].append(ran)
    count = {mode: sum(map(len, texts[mode])) for mode in modes}
    rate = {mode: count[mode] / sum(seconds[mode]) for mode in modes}
    losses = [ran.divergent / ran.tokens for ran in rans[Mode.ROUTED]]
    cost, most = engine.cost, 1 + engine.options.max_draft + engine.options.run_limit
    predicted = {mode.value: predict(rans[mode], cost, name) for mode in modes[1:]}
    scored = {
        mode: [p for given, text in zip(prompts, texts[mode], strict=True) for p in score(engine, given, text)]
        for mode in (Mode.FULL, Mode.ROUTED)
    }
    return {
        "n": len(prompts),
        "routed": sum(ran.mode == Mode.ROUTED for ran in rans[Mode.ROUTED]),
        "tokens": count[Mode.ROUTED],
        "divergence": round(statistics.fmean(losses), 5),
        "interval": interval(losses),
        "unverified": round(sum(r.unverified for r in rans[Mode.ROUTED]) / count[Mode.ROUTED], 4),
        "tokens_per_s": {mode.value: round(rate[mode], 1) for mode in modes},
        "over_full": round(rate[Mode.ROUTED] / rate[Mode.FULL], 3),
        "over_exact": round(rate[Mode.ROUTED] / rate[Mode.EXACT], 3),
        "over_exact_interval": compare_rates(texts, seconds),
        "gate": describe_gate(*find_gate(engine, name)),
        "left": next((ran.bypass for ran in reversed(rans[Mode.ROUTED]) if ran.bypass), None),
        "c": round(cost.c(name), 3),
        "v": {n: round(cost.v(n), 2) for n in (2, 4, 8, 9, 16, 33)},
        "by_cost": {mode: speedup and round(speedup, 3) for mode, speedup in predicted.items()},
        "most_by_cost": round(bound_speedup(cost, name, most), 3),
        "repeated_8grams": round(statistics.fmean(map(repeated_share, texts[Mode.ROUTED])), 3),
        "perplexity": perplexity(scored[Mode.ROUTED]),
        "perplexity_full": perplexity(scored[Mode.FULL]),
    }


def compare_rates(texts: Mapping[Mode, list[list[int]]], seconds: Mapping[Mode, list[float]]) -> list[float]:
    """The 95 % interval of routed's tokens per second over exact's, prompt by prompt."""
    rates = {
        mode: np.array([len(ids) / took for ids, took in zip(texts[mode], seconds[mode], strict=True)])
        for mode in (Mode.EXACT, Mode.ROUTED)
    }
    logs = np.log(rates[Mode.ROUTED] / rates[Mode.EXACT])
    reach = float(stats.t.ppf(0.975, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return [round(math.exp(float(logs.mean()) + sign * reach), 3) for sign in (-1, 1)]


def judge(row: Mapping[str, Any]) -> str:
    """One line on what routed brought beside exact."""
    low, high = row["over_exact_interval"]
    about = f"{row['class']}, temperature {row['temperature']:g}, risk {row['risk']:g}:"
    about += f" {row['over_exact']} times exact ({low}-{high})"
    return f"{about}; {row['left'] or 'the gate was open'}"


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
    names += (
        "over_full",
        "over_exact",
        "by_cost",
        "most_by_cost",
        "parted",
        "parted_at",
        "perplexity",
        "perplexity_full",
    )
    table = Table(*names)
    for row in results:
        shown = row | {"by_cost": "{routed} / {exact}".format(**row["by_cost"])}
        table.add_row(*(str(shown.get(name, "")) for name in names))
    console = Console(width=200)
    console.print(table)
    for row in results:
        console.print(judge(row))


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
    options = Options(prefix_cache=False)
    engine, checkpoint = build_engine(arguments.model, arguments.subgraphs, placement=Placement(), options=options)
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
                row |= measure(engine, name, prompts, temperature, risk, arguments.tokens)
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
