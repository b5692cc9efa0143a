"""Does the prediction hold? Tokens and time per cycle of `exact`, as predicted and as realised, per class.

On texts that nothing was fitted on, chosen by or tuned on (`benchmarks/unused`). Drafts are of one fixed length k here,
because only then a cycle's length does not hang on what was drawn. Predicted: 1 + sum of prod a_i, with the acceptance
on the model's own text that the subgraph's manifest holds; k draft steps and a pass over k + 1 tokens with its verdicts
at the costs measured before, between and after the texts, at the context that these have, and what the engine takes
itself in such a step, learnt from a few texts of warm-up. Cycles that the end of a request cut short count with the
drafts they had; intervals are 95 % bootstraps over texts. The speedup is that of serving, where the rule of expected
gain ends drafts, prompts included; `full` is run in turn with it. With --beside so are the subgraphs of another folder,
in an engine of their own, compared with its own `full`: what comes after another engine's run is a few per cent slower.

Examples:
  python benchmarks/predicted.py
  python benchmarks/predicted.py --classes code --draft-length 4 --temperature 0.7
  python benchmarks/predicted.py --classes stories --beside subgraphs/new
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from machine import UNUSED, describe, finish, read_prompts, require_idle, show
from modes import CLASSES, cut_prompt, run_engine

from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request
from strace.costs import Cost, draw_curve, draw_verifying, list_cases, measure_costs, text_limit
from strace.graphs import choose_folder
from strace.measure import predict_speedup
from strace.runner import FULL
from strace.sampling import SamplingParams
from strace.subgraph import read_manifest

CONTEXTS, LENGTHS = (64, 192, 448), (1, 2, 4, 5, 6, 7, 9)  # of the passes timed
ROUNDS = 8  # of timing
WARMUP = 2  # texts from which the engine's own time is learnt
_DRAWS = 1000  # of a bootstrap
Timing = TypeVar("Timing")


@dataclass(frozen=True)
class Steps:
    """Seconds: a draft step; full passes with their verdicts, by tokens; the engine's own part of a plain step, and of
    one that drafts."""

    draft: float
    full: Mapping[int, float]
    own_plain: float
    own_drafting: float

    @property
    def plain(self) -> float:
        """A step without drafts."""
        return self.full[1] + self.own_plain

    def cycle(self, drafts: float) -> float:
        """A step of so many drafts; linear between the passes timed."""
        tokens = sorted(self.full)
        verify = float(np.interp(drafts + 1, tokens, [self.full[n] for n in tokens]))
        return drafts * self.draft + verify + self.own_drafting

    def speedup(self, accepted: Sequence[float]) -> tuple[float, int]:
        """The best over numbers of drafts, and that number."""
        v = {n: (seconds + self.own_drafting) / self.plain for n, seconds in self.full.items()}
        return predict_speedup(accepted, self.draft / self.plain, v)


def time_steps(engine: Engine, graph: str, context: float) -> list[Cost]:
    """What passes with drafts by `graph` cost now, near a context; the engine holds no text. Medians: the lower
    quartile that the engine starts from is of quieter moments than a whole text sees."""
    cases = list_cases(text_limit(engine.runner), CONTEXTS, (1,), LENGTHS)
    costs, at = measure_costs(engine.runner, [graph], cases, ROUNDS, quantile=0.5), round(context)
    drafts = [Cost(graph, 1, 1, at, draw_curve(costs, graph, at)[1])]
    return drafts + [Cost(FULL, 1, n, at, seconds) for n, seconds in draw_verifying(costs, at).items()]


def make_steps(timings: Sequence[Sequence[Cost]], own: tuple[float, float]) -> Steps:
    """The mean of several timings, around and between what they predict. own: see `Steps`."""
    draft, *full = ((same[0].tokens, fmean(cost.seconds for cost in same)) for same in zip(*timings, strict=True))
    return Steps(draft[1], dict(full), *own)


def predict_tokens(accepted: Sequence[float], length: float) -> float:
    """Tokens of a cycle of so many drafts, linear between whole numbers; accepted: at draft positions from 1 on."""
    expected = [1.0, *(1 + np.cumsum(np.cumprod(accepted)))]
    return float(np.interp(length, range(len(expected)), expected))


@dataclass(frozen=True)
class Run:
    """A text: what ran, its tokens, the seconds of all of it."""

    ran: Ran
    tokens: int
    seconds: float


def run_in_turn(
    contestants: Mapping[str, tuple[Engine, Mode]],
    prompts: Sequence[list[int]],
    name: str,
    temperature: float,
    tokens: int,
) -> dict[str, list[Run]]:
    """Every prompt through every contestant, the order rotating. A class that an engine does not have is `pooled`'s."""
    runs: dict[str, list[Run]] = {each: [] for each in contestants}
    names = list(contestants)
    for number, prompt in enumerate(prompts):
        turn = number % len(names)
        for each in names[turn:] + names[:turn]:
            engine, mode = contestants[each]
            known, params = name if name in engine.classes else None, SamplingParams(temperature)
            request = Request(str(number), prompt, params, tokens, mode=mode, class_name=known)
            started = time.perf_counter()
            ids, ran = run_engine(engine, request)
            runs[each].append(Run(ran, len(ids), time.perf_counter() - started))
    return runs


def run_and_time(
    timed: Callable[[], Timing],
    contestants: Mapping[str, tuple[Engine, Mode]],
    prompts: Sequence[list[int]],
    name: str,
    temperature: float,
    tokens: int,
) -> tuple[dict[str, list[Run]], list[Timing]]:
    """As `run_in_turn`, with passes timed before, after and after each full turn: a machine that is shared changes its
    speed within seconds."""
    runs: dict[str, list[Run]] = {each: [] for each in contestants}
    timings, turn = [timed()], len(contestants)
    for first in range(0, len(prompts), turn):
        for each, more in run_in_turn(contestants, prompts[first : first + turn], name, temperature, tokens).items():
            runs[each] += more
        timings.append(timed())
    return runs, timings


def rate(runs: Sequence[Run]) -> float:
    """Tokens per second."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def compare(rans: Sequence[Ran], accepted: Sequence[float], steps: Steps) -> dict[str, Any]:
    """Prediction and realisation of the cycles that drafted."""
    cycles, drafted = sum(r.drafts for r in rans), sum(r.drafted for r in rans)
    if not cycles:
        return {"bypassed": sum(r.bypass is not None for r in rans)}
    mean = drafted / cycles
    # The first token is the prompt's; where no draft had room plain steps brought the last ones.
    plain = sum(max(0, r.tokens - 1 - r.drafts - r.accepted) for r in rans)
    seconds = (sum(r.seconds for r in rans) - plain * steps.plain) / cycles
    expected, realised = predict_tokens(accepted, mean), 1 + sum(r.accepted for r in rans) / cycles
    low, high = bootstrap_tokens(rans)
    return {
        "cycles": cycles,
        "drafts": round(mean, 2),
        "predicted_tokens": round(expected, 3),
        "realised_tokens": round(realised, 3),
        "off_tokens": round(realised / expected - 1, 3),
        "off_between": (round(low / expected - 1, 3), round(high / expected - 1, 3)),
        "predicted_ms": round(steps.cycle(mean) * 1e3, 3),
        "realised_ms": round(seconds * 1e3, 3),
        "off_ms": round(seconds / steps.cycle(mean) - 1, 3),
        "own_ms": round(steps.own_drafting * 1e3, 3),
    }


def bootstrap_tokens(rans: Sequence[Ran]) -> tuple[float, float]:
    """95 % interval of the realised tokens per cycle."""
    counts = np.array([(r.accepted, r.drafts) for r in rans])
    draws = np.random.default_rng(0).integers(len(counts), size=(_DRAWS, len(counts)))
    accepted, cycles = counts[draws].sum(1).T
    low, high = np.percentile(1 + accepted / np.maximum(cycles, 1), (2.5, 97.5))
    return float(low), float(high)


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
    alone = Options(prefix_cache=False)
    fixed, checkpoint = build_engine(arguments.model, options=replace(alone, draft_length=arguments.draft_length))
    served, _ = build_engine(arguments.model, options=alone)
    contestants = {"full": (served, Mode.FULL), "served": (served, Mode.EXACT), "fixed": (fixed, Mode.EXACT)}
    if arguments.beside:
        beside, _ = build_engine(arguments.model, arguments.beside, options=alone)
        contestants |= {"full beside": (beside, Mode.FULL), "beside": (beside, Mode.EXACT)}
    folder, results = choose_folder(arguments.model, None), []
    assert folder is not None, "predictions are those of subgraphs"
    for name in arguments.classes:
        texts = read_prompts(name, arguments.prompts, UNUSED)
        prompts = [cut_prompt(checkpoint.tokenizer(text)["input_ids"]) for text in texts]
        trial = run_in_turn(contestants, prompts[:WARMUP], name, arguments.temperature, arguments.tokens)
        own = served.cost.own(1, drafting=False), fixed.cost.own(1, drafting=True)
        context = np.mean([len(prompt) for prompt in prompts]) + np.mean([run.tokens for run in trial["fixed"]]) / 2
        timed = partial(time_steps, fixed, name, float(context))
        runs, timings = run_and_time(timed, contestants, prompts, name, arguments.temperature, arguments.tokens)
        steps = make_steps(timings, own)
        row: dict[str, Any] = {"class": name, "n": len(prompts)}
        full = {each: "full beside" if each == "beside" else "full" for each in runs if not each.startswith("full")}
        row |= {each: round(rate(runs[each]) / rate(runs[full[each]]), 3) for each in full}
        measured = read_manifest(folder / name).measured
        own_text = measured.on_policy.get(f"{arguments.temperature:g}")
        row["a_i from"] = "texts" if own_text is None else "own text"
        accepted = measured.accepted if own_text is None else own_text.accepted
        results.append(row | compare([run.ran for run in runs["fixed"]], accepted, steps))
    show(results, list(results[0]))
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
