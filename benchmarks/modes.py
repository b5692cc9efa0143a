"""What each mode is worth: full, exact and routed beside transformers `generate`, interleaved in one run, per class.

Claims of the README on speed come from here. Every prompt (the first third of a held-out text) is continued by every
mode in turn, the order rotating from prompt to prompt, so that noise falls on all alike. `exact int4` drafts with the
whole model in int4, the others with the class's subgraph; `routed` emits from a confidence of .9 on and promises
nothing (benchmarks/routed.py measures what is certified). Times are whole requests, prefill included, without HTTP.

Examples:
  python benchmarks/modes.py
  python benchmarks/modes.py --prompts 40 --tokens 128 --classes chat code --draft-length 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import describe, finish, read_prompts, require_idle, spread
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from server.bench import SURE
from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.checkpoint import Checkpoint, resolve
from strace.costs import read_bandwidth
from strace.runner import FULL
from strace.sampling import SamplingParams

CLASSES = ("chat", "code", "facts", "math", "stories")
TRANSFORMERS = "transformers"
Run = Callable[[list[int], float, str, int], tuple[list[int], Ran | None]]


@dataclass
class Runs:
    """All requests of one mode, class and temperature."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rans: list[Ran] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]


def repeated_share(ids: list[int], n: int = 8) -> float:
    """The share of n-grams that stood in the text before: greedy text loops, and loops flatter every draft."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def cut_prompt(ids: list[int]) -> list[int]:
    """The part of a text that is given; the rest is for the model to write."""
    return ids[: min(256, max(16, len(ids) // 3))]


def run_engine(engine: Engine, request: Request) -> tuple[list[int], Ran]:
    """Decode one request to its end in this thread."""
    ids: list[int] = []
    ran: list[Ran] = []

    def deliver(update: Update | Exception) -> None:
        if isinstance(update, Exception):
            raise update
        ids.extend(update.ids)
        if update.ran is not None:
            ran.append(update.ran)

    engine.submit(request, deliver)
    while not ran:
        engine.step()
    assert not ran[0].cached_tokens, "every mode reads the whole prompt: the first leaves it in a cache for the others"
    return ids, ran[0]


def make_modes(arguments: argparse.Namespace) -> tuple[dict[str, Run], Engine, Engine, Checkpoint]:
    """The contestants by name, each `(prompt, temperature, class, seed) -> (ids, Ran or None)`."""
    options = Options(draft_length=arguments.draft_length, prefix_cache=False)
    placement = Placement(dtype=arguments.dtype)
    traced, checkpoint = build_engine(arguments.model, placement=placement, options=options)
    plain, _ = build_engine(resolve(arguments.model), placement=placement, options=options)
    peer = AutoModelForCausalLM.from_pretrained(resolve(arguments.model), dtype=traced.runner.graphs[FULL].dtype)

    def ours(engine: Engine, mode: Mode) -> Run:
        def run(prompt: list[int], temperature: float, name: str, seed: int) -> tuple[list[int], Ran | None]:
            known = name if name in engine.classes else None
            params = SamplingParams(temperature)
            sure = SURE if mode == Mode.ROUTED else None
            request = Request(str(seed), prompt, params, arguments.tokens, mode=mode, class_name=known, threshold=sure)
            return run_engine(engine, request)

        return run

    def generate(prompt: list[int], temperature: float, name: str, seed: int) -> tuple[list[int], None]:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        ids = torch.tensor([prompt])
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.tokens,
            eos_token_id=sorted(checkpoint.stop_ids),
            pad_token_id=min(checkpoint.stop_ids),
            **sampling,
        )
        return out[0, len(prompt) :].tolist(), None

    modes = {"full": ours(traced, Mode.FULL), "exact int4": ours(plain, Mode.EXACT), "exact": ours(traced, Mode.EXACT)}
    return modes | {"routed": ours(traced, Mode.ROUTED), TRANSFORMERS: generate}, traced, plain, checkpoint


def measure(modes: dict[str, Run], prompts: list[list[int]], name: str, temperature: float) -> dict[str, Runs]:
    """Every prompt through every mode, in rotating order, after one prompt of warm-up."""
    runs = {mode: Runs() for mode in modes}
    names = list(modes)
    for number, prompt in enumerate([prompts[0], *prompts]):
        turn = number % len(names)
        for mode in names[turn:] + names[:turn]:
            started = time.perf_counter()
            ids, ran = modes[mode](prompt, temperature, name, number)
            seconds = time.perf_counter() - started
            if number == 0:
                continue
            runs[mode].seconds.append(seconds)
            runs[mode].tokens.append(len(ids))
            runs[mode].repeated.append(repeated_share(ids))
            if ran is not None:
                runs[mode].rans.append(ran)
    return runs


def summarise(mode: str, runs: Runs, full: Runs, engine: Engine, name: str, bandwidth: float) -> dict[str, Any]:
    """One row of the result. speedup: tokens per second over the full mode's, of the same prompts in the same run."""
    rate = sum(runs.tokens) / sum(runs.seconds)
    row: dict[str, Any] = {
        "tokens_per_s": round(rate, 1),
        "speedup": round(rate / (sum(full.tokens) / sum(full.seconds)), 3),
        "spread": round(spread(runs.rates), 3),
        "tokens": sum(runs.tokens),
        "repeated_8grams": round(statistics.mean(runs.repeated), 3),
    }
    if runs.rans:
        graph = runs.rans[0].class_name
        drafted, accepted = sum(r.drafted for r in runs.rans), sum(r.accepted for r in runs.rans)
        passes = sum(r.tokens - r.accepted for r in runs.rans)
        graphs = engine.runner.graphs
        read = passes * graphs[FULL].bytes_per_step + drafted * (graphs[graph].bytes_per_step if drafted else 0)
        row |= {
            "class": graph,
            "drafted": drafted,
            "acceptance": round(accepted / drafted, 4) if drafted else None,
            "accepted_at": [sum(r.accepted_at[i] for r in runs.rans if i < len(r.accepted_at)) for i in range(8)],
            "tokens_per_pass": round(sum(runs.tokens) / max(passes, 1), 3),
            "fallbacks": sum(r.fallbacks for r in runs.rans),
            "unverified": round(sum(r.unverified for r in runs.rans) / sum(runs.tokens), 4),
            "divergence": round(sum(r.divergent for r in runs.rans) / sum(runs.tokens), 4),
            "bypassed": sum(r.bypass is not None for r in runs.rans),
            "bandwidth_share": round(read / sum(runs.seconds) / bandwidth, 4),
        }
        if mode != "full":
            row |= {"c": round(engine.cost.c(graph), 3), "v": {n: round(engine.cost.v(n), 3) for n in (2, 4, 8)}}
    return row


def show(results: list[dict[str, Any]]) -> None:
    """The results as a table."""
    table = Table(
        "class", "T", "mode", "tokens/s", "speedup", "acceptance", "tokens/pass", "c", "v(4)", "read", "repeats"
    )
    for row in results:
        share, v = row.get("bandwidth_share"), row.get("v")
        cells: Iterable[object] = (
            row["prompts"], row["temperature"], row["mode"], row["tokens_per_s"], f"{row['speedup']:.2f}",
            row.get("acceptance") or "", row.get("tokens_per_pass") or "", row.get("c") or "", v[4] if v else "",
            f"{share:.1%}" if share else "", row["repeated_8grams"],
        )  # fmt: skip
        table.add_row(*map(str, cells))
    Console(width=140).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES, metavar="CLASS")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.0], metavar="T")
    parser.add_argument("--prompts", type=int, default=20, help="prompts per class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    parser.add_argument("--draft-length", type=int, help="draw always so many drafts (default: by expected gain)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    arguments = parser.parse_args()
    load = require_idle()
    bandwidth = read_bandwidth()
    modes, traced, plain, checkpoint = make_modes(arguments)
    results = []
    for name in arguments.classes:
        texts = read_prompts(name, arguments.prompts)
        prompts = [cut_prompt(checkpoint.tokenizer(text)["input_ids"]) for text in texts]
        for temperature in arguments.temperatures:
            runs = measure(modes, prompts, name, temperature)
            for mode, found in runs.items():
                engine = plain if mode == "exact int4" else traced
                row = {"prompts": name, "temperature": temperature, "mode": mode, "n": len(prompts)}
                results.append(row | summarise(mode, found, runs["full"], engine, name, bandwidth))
    show(results)
    finish(
        {
            "benchmark": "modes",
            "machine": describe(),
            "load_before": round(load, 3),
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "model": arguments.model,
            "dtype": str(traced.runner.graphs[FULL].dtype),
            "draft_length": arguments.draft_length,
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
