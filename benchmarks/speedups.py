"""Is `exact` as fast as its own acceptance and costs say, and what would that be on larger models?

Per class and temperature, for drafts by the class's subgraph and by the whole model in int4, all in turn in one run:
- realised: tokens per second of decoding over those of our own `full`, on the same prompts; drafts end by the rule of
  expected gain.
- predicted: the best `S = E / (k c + v(k + 1))` over k, with a_i as judged in drafts of always 8 tokens on these
  prompts, and with c, v and the engine's own time per step as measured just before and after.
- projected, per larger shape: the same a_i and own time with that shape's measured costs. Such a model was not traced:
  its subgraph is taken to keep the same shares of neurons, key/value groups and head rows in the same format, and to be
  accepted as often. A step's cost is a line through five sizes timed once (strace/search.py).

`--price` times the shapes, weights random, and keeps what it found in --state; the rest then needs no large model.

Examples:
  python benchmarks/speedups.py --price
  python benchmarks/speedups.py
  python benchmarks/speedups.py --classes code --temperatures 1 --prompts 24 --folder unused
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from machine import describe, finish, read_prompts, require_idle, show
from modes import CLASSES, cut_prompt
from predicted import WARMUP, Run, Steps, make_steps, run_and_time, run_in_turn, time_steps
from shapes import SHAPES, write_shape
from torch import Tensor

from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode
from strace.checkpoint import load_decoder, open_checkpoint, resolve
from strace.classes import POOLED
from strace.costs import Cost
from strace.draft import Held, Verdict
from strace.families import Spec
from strace.files import cache_folder, write_beside
from strace.graphs import choose_folder
from strace.keep import NEURON_BLOCK, Kept, kept_bytes
from strace.kv import Batch
from strace.runner import FULL, Runner
from strace.search import StepCosts, price_steps
from strace.subgraph import Manifest, read_manifest

LONGEST = 8  # drafts of a cycle in which acceptance is measured
PROJECTED = ("SmolLM2-135M", "Llama-3.2-1B")
SUBGRAPH, WHOLE = "subgraph", "whole int4"


class Judging:
    """A runner that counts, by draft position, how many drafts were judged and how many stood."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.judged, self.stood = Counter[int](), Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def verify(self, logits: Tensor, held: Sequence[Held]) -> list[Verdict]:
        return self._count(held, self._runner.verify(logits, held))

    def verify_pass(self, batch: Batch, rows: list[int], held: Sequence[Held]) -> list[Verdict]:
        return self._count(held, self._runner.verify_pass(batch, rows, held))

    def _count(self, held: Sequence[Held], verdicts: list[Verdict]) -> list[Verdict]:
        for text, verdict in zip(held, verdicts, strict=True):
            standing = len(verdict.tokens) - 1
            self.judged.update(range(min(standing + 1, len(text.tokens))))
            self.stood.update(range(standing))
        return verdicts

    def take(self) -> list[float]:
        """The share that stood by position, of those whose predecessors did; counting begins anew."""
        accepted = [self.stood[i] / self.judged[i] for i in range(LONGEST) if self.judged[i]]
        self.judged.clear()
        self.stood.clear()
        return accepted


def price_shape(name: str, state: Path, anew: bool) -> StepCosts:
    """What steps at a shape cost on this machine: kept from before, else, or where it is to be anew, timed now and
    kept."""
    file = state / f"{name}.json"
    if file.exists() and not anew:
        record = json.loads(file.read_text(encoding="utf-8"))["costs"]
        return StepCosts(tuple(record["draft"]), {int(n): s for n, s in record["full"].items()}, record["runner"])
    checkpoint = open_checkpoint(str(write_shape(name)))
    costs = price_steps(load_decoder(checkpoint, "bf16"), checkpoint.weight_hash, "int4")
    state.mkdir(parents=True, exist_ok=True)
    write_beside(file, json.dumps({"shape": name, "machine": describe(), "costs": asdict(costs)}) + "\n")
    return costs


def keep_alike(spec: Spec, base: Spec, manifest: Manifest | None) -> Kept:
    """Units of a model in the shares that a subgraph of another one, `base`, keeps; of the whole model without one."""
    layers = range(spec.layers)
    if manifest is None:
        return Kept((torch.arange(spec.kv_heads),) * spec.layers, (torch.arange(spec.mlp),) * spec.layers)
    groups = np.mean([len(layer.groups) for layer in manifest.kept]) / base.kv_heads
    neurons = np.mean([layer.neurons for layer in manifest.kept]) / base.mlp
    return Kept(
        tuple(torch.arange(round(groups * spec.kv_heads)) for _ in layers),
        tuple(torch.arange(round(neurons * spec.mlp / NEURON_BLOCK) * NEURON_BLOCK) for _ in layers),
        torch.arange(round(manifest.head_rows / base.vocabulary * spec.vocabulary)),
    )


def project(costs: StepCosts, spec: Spec, kept: Kept, own: Steps) -> Steps:
    """Steps of another shape with drafts by such units. own: whose part of the engine is taken."""
    sublayers = sum(len(some) > 0 for some in (*kept.groups, *kept.neurons))
    draft = float(np.dot(costs.draft, (1, sublayers, kept_bytes(spec, kept, "int4"))))
    return Steps(draft, costs.full, own.own_plain, own.own_drafting)


def decoding_rate(runs: Sequence[Run]) -> float:
    """Tokens per second after the pass that reads the prompt."""
    return sum(run.tokens - 1 for run in runs) / sum(run.ran.seconds for run in runs)


def describe_draft(accepted: Sequence[float], steps: Steps, runs: Sequence[Run], full: Sequence[Run]) -> dict[str, Any]:
    """One row: what was realised beside what was predicted."""
    realised, (predicted, length) = decoding_rate(runs) / decoding_rate(full), steps.speedup(accepted)
    drafted = sum(run.ran.drafted for run in runs)
    return {
        "realised": round(realised, 3),
        "predicted": round(predicted, 3),
        "of_predicted": round(realised / predicted, 3),
        "k": length,
        "drafts": round(drafted / max(sum(run.ran.drafts for run in runs), 1), 2),
        "a": [round(share, 3) for share in accepted],
        "c": round(steps.draft / steps.plain, 3),
        "v": {n: round(steps.full[n] / steps.plain, 3) for n in steps.full},
        "own_ms": (round(steps.own_plain * 1e3, 3), round(steps.own_drafting * 1e3, 3)),
    }


class Contest:
    """The engines of one model: with its subgraphs and with the whole model in int4 as the only draft; each as it
    serves, and with drafts of always `LONGEST` tokens, whose verdicts are counted."""

    def __init__(self, model: str) -> None:
        self.engines: dict[str, Engine] = {}
        self.fixed: dict[str, Engine] = {}
        self.judging: dict[str, Judging] = {}
        served, always = Options(prefix_cache=False), Options(prefix_cache=False, draft_length=LONGEST)
        for draft, source in ((SUBGRAPH, model), (WHOLE, resolve(model))):
            self.engines[draft], self.checkpoint = build_engine(source, options=served)
            self.fixed[draft], _ = build_engine(source, options=always)
            self.judging[draft] = Judging(self.fixed[draft].runner)
            self.fixed[draft].cycle.runner = cast(Runner, self.judging[draft])
        self.contestants = {FULL: (self.engines[SUBGRAPH], Mode.FULL)}
        self.contestants |= {draft: (engine, Mode.EXACT) for draft, engine in self.engines.items()}
        self.contestants |= {f"{draft}, fixed": (engine, Mode.EXACT) for draft, engine in self.fixed.items()}

    def run(self, name: str, prompts: list[list[int]], temperature: float, tokens: int) -> dict[str, dict[str, Any]]:
        """Rows by draft, and the steps they were predicted by under the key `steps`."""
        trial = run_in_turn(self.contestants, prompts[:WARMUP], name, temperature, tokens)
        context = np.mean([len(prompt) for prompt in prompts]) + np.mean([run.tokens for run in trial[FULL]]) / 2
        timed = partial(self._time, name, float(context))
        for judging in self.judging.values():
            judging.take()  # of the trial
        runs, timings = run_and_time(timed, self.contestants, prompts, name, temperature, tokens)
        rows = {}
        for draft, judging in self.judging.items():
            accepted = judging.take()
            own = self.engines[SUBGRAPH].cost.own(1, drafting=False), self.fixed[draft].cost.own(1, drafting=True)
            steps = make_steps([timing[draft] for timing in timings], own)
            row = describe_draft(accepted, steps, runs[draft], runs[FULL])
            rows[draft] = row | {"accepted": accepted, "steps": steps}
        return rows

    def _time(self, name: str, context: float) -> dict[str, list[Cost]]:
        """What passes cost now, by draft, in the engines whose verdicts nobody counts."""
        graphs = {draft: name if name in engine.classes else POOLED for draft, engine in self.engines.items()}
        return {draft: time_steps(self.engines[draft], graph, context) for draft, graph in graphs.items()}


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return round(float(np.exp(np.mean(np.log(values)))), 3)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES, metavar="CLASS")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.7, 0.0], metavar="T")
    parser.add_argument("--folder", default="prompts", help="prompts, or unused (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=12, help="a class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    parser.add_argument("--shapes", nargs="*", default=PROJECTED, choices=SHAPES, metavar="SHAPE")
    parser.add_argument("--state", type=Path, default=cache_folder() / "prices", help="default: %(default)s")
    parser.add_argument("--price", action="store_true", help="only time the shapes")
    return parser.parse_args()


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    load = require_idle()
    priced = {name: price_shape(name, arguments.state, arguments.price) for name in arguments.shapes}
    if arguments.price:
        finish({"benchmark": "prices", "machine": describe()} | {name: asdict(costs) for name, costs in priced.items()})
        return
    specs = {name: open_checkpoint(str(write_shape(name))).spec for name in priced}
    contest, folder, results = Contest(arguments.model), choose_folder(arguments.model, None), []
    base = contest.checkpoint.spec
    for name in arguments.classes:
        texts = read_prompts(name, arguments.prompts, arguments.folder)
        prompts = [cut_prompt(contest.checkpoint.tokenizer(text)["input_ids"]) for text in texts]
        served = name if name in contest.engines[SUBGRAPH].classes else POOLED
        manifests = {WHOLE: None, SUBGRAPH: None if folder is None else read_manifest(folder / served)}
        for temperature in arguments.temperatures:
            for draft, row in contest.run(name, prompts, temperature, arguments.tokens).items():
                accepted, steps = row.pop("accepted"), row.pop("steps")
                for shape, costs in priced.items():
                    kept = keep_alike(specs[shape], base, manifests[draft])
                    row[f"projected {shape}"] = round(project(costs, specs[shape], kept, steps).speedup(accepted)[0], 3)
                results.append({"class": name, "temperature": temperature, "draft": draft} | row)
    means = []
    for temperature in arguments.temperatures:
        for draft in (SUBGRAPH, WHOLE):
            rows = [row for row in results if (row["temperature"], row["draft"]) == (temperature, draft)]
            columns = ("realised", "predicted", "of_predicted", *(f"projected {shape}" for shape in priced))
            means.append({"class": "mean", "temperature": temperature, "draft": draft})
            means[-1] |= {column: mean([row[column] for row in rows]) for column in columns}
    show(results + means, [column for column in results[0] if column != "a"])
    finish(
        {
            "benchmark": "speedups",
            "machine": describe(),
            "load_before": round(load, 3),
            "model": arguments.model,
            "folder": arguments.folder,
            "prompts": arguments.prompts,
            "tokens": arguments.tokens,
            "shapes": {name: asdict(costs) for name, costs in priced.items()},
            "results": results,
            "geometric_means": means,
        }
    )


if __name__ == "__main__":
    main()
