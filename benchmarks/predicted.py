"""Does the prediction hold? Tokens and time per cycle of `exact`, as predicted and as realised, per class.

On texts that nothing was fitted on, chosen by or tuned on (`benchmarks/unused`). Drafts are of one fixed length k here,
because only then a cycle's length does not hang on what was drawn. Predicted: 1 + sum of prod a_i, with the acceptance
on the model's own text that the subgraph's manifest holds; k draft steps and a pass over k + 1 tokens, at the costs
measured when the engine starts. Cycles that the end of a request cut short count with the drafts they had. The speedup
is that of serving, where the rule of expected gain ends drafts; `full` is run in turn with it, and with --beside the
subgraphs of another folder are.

Examples:
  python benchmarks/predicted.py
  python benchmarks/predicted.py --classes code --draft-length 4 --temperature 0.7
  python benchmarks/predicted.py --classes stories --beside subgraphs/new
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import UNUSED, describe, finish, read_prompts, require_idle
from modes import CLASSES, cut_prompt, run_engine
from rich.console import Console
from rich.table import Table

from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request
from strace.graphs import choose_folder
from strace.runner import FULL
from strace.sampling import SamplingParams
from strace.subgraph import read_manifest


def predict_tokens(accepted: Sequence[float], length: float) -> float:
    """Tokens of a cycle of so many drafts, linear between whole numbers; accepted: at draft positions from 1 on."""
    expected = [1.0, *(1 + np.cumsum(np.cumprod(accepted)))]
    return float(np.interp(length, range(len(expected)), expected))


def predict_seconds(full: np.ndarray, draft: np.ndarray, length: float) -> float:
    """Of such a cycle; full, draft: seconds of a pass over so many tokens."""
    return length * float(draft[1]) + float(np.interp(length + 1, range(len(full)), full))


def run_in_turn(
    contestants: dict[str, tuple[Engine, Mode]], prompts: list[list[int]], name: str, temperature: float, tokens: int
) -> dict[str, list[tuple[Ran, int, float]]]:
    """Every prompt through every contestant, the order rotating, after one of warm-up: what ran, tokens, seconds."""
    runs: dict[str, list[tuple[Ran, int, float]]] = {each: [] for each in contestants}
    names = list(contestants)
    for number, prompt in enumerate([prompts[0], *prompts]):
        turn = number % len(names)
        for each in names[turn:] + names[:turn]:
            engine, mode = contestants[each]
            request = Request(str(number), prompt, SamplingParams(temperature), tokens, mode=mode, class_name=name)
            started = time.perf_counter()
            ids, ran = run_engine(engine, request)
            if number:
                runs[each].append((ran, len(ids), time.perf_counter() - started))
    return runs


def rate(runs: list[tuple[Ran, int, float]]) -> float:
    """Tokens per second."""
    return sum(n for _, n, _ in runs) / sum(s for _, _, s in runs)


def compare(rans: Sequence[Ran], accepted: Sequence[float], full: np.ndarray, draft: np.ndarray) -> dict[str, Any]:
    """Prediction and realisation of the cycles that drafted."""
    cycles, drafted = sum(r.drafts for r in rans), sum(r.drafted for r in rans)
    if not cycles:
        return {"bypassed": sum(r.bypass is not None for r in rans)}
    mean = drafted / cycles
    tokens = (predict_tokens(accepted, mean), 1 + sum(r.accepted for r in rans) / cycles)
    seconds = (predict_seconds(full, draft, mean), sum(r.seconds for r in rans) / cycles)
    row: dict[str, Any] = {"cycles": cycles, "drafts": round(mean, 2)}
    for what, (predicted, realised) in {"tokens": tokens, "ms": (seconds[0] * 1e3, seconds[1] * 1e3)}.items():
        row |= {
            f"predicted_{what}": round(predicted, 3),
            f"realised_{what}": round(realised, 3),
            f"off_{what}": round(realised / predicted - 1, 3),
        }
    return row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES, metavar="CLASS")
    parser.add_argument("--beside", type=Path, help="folder of other subgraphs, run in turn")
    parser.add_argument("--temperature", type=float, default=1.0, choices=(1.0, 0.7, 0.0))
    parser.add_argument("--draft-length", type=int, default=4, help="k (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=24, help="a class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    arguments = parser.parse_args()
    load = require_idle()
    fixed, checkpoint = build_engine(arguments.model, options=Options(draft_length=arguments.draft_length))
    served, _ = build_engine(arguments.model)
    tables = {graph: fixed.cost.table(graph).copy() for graph in fixed.runner.graphs}  # before live passes move them
    contestants = {"full": (served, Mode.FULL), "served": (served, Mode.EXACT), "fixed": (fixed, Mode.EXACT)}
    if arguments.beside:
        contestants["beside"] = (build_engine(arguments.model, arguments.beside)[0], Mode.EXACT)
    folder, results = choose_folder(arguments.model, None), []
    assert folder is not None, "predictions are those of subgraphs"
    for name in arguments.classes:
        texts = read_prompts(name, arguments.prompts, UNUSED)
        prompts = [cut_prompt(checkpoint.tokenizer(text)["input_ids"]) for text in texts]
        runs = run_in_turn(contestants, prompts, name, arguments.temperature, arguments.tokens)
        row: dict[str, Any] = {"class": name, "n": len(prompts)}
        row |= {each: round(rate(runs[each]) / rate(runs["full"]), 3) for each in contestants if each != "full"}
        measured = read_manifest(folder / name).measured
        own = measured.on_policy.get(f"{arguments.temperature:g}")
        row["a_i from"] = "texts" if own is None else "own text"
        accepted = measured.accepted if own is None else own.accepted
        results.append(row | compare([ran for ran, _, _ in runs["fixed"]], accepted, tables[FULL], tables[name]))
    table = Table(*results[0])
    for row in results:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)
    mean = float(np.exp(np.mean([np.log(row["served"]) for row in results])))
    finish(
        {
            "benchmark": "predicted",
            "machine": describe(),
            "load_before": round(load, 3),
            "model": arguments.model,
            "temperature": arguments.temperature,
            "draft_length": arguments.draft_length,
            "geometric_mean_speedup": round(mean, 3),
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
