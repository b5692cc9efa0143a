"""The paper's claims on one model, each with figures, intervals, n and a verdict by rule (strace/claims.py).

40-word starts of held-out texts (`benchmarks/prompts`): traces of all sizes and every control by `strace-llm analyze`,
and traces of the same prompts grown in other ways:

| growth | on | by |
|---|---|---|
| flow | the model | path products: local weights times the flow that reaches an edge's target |
| random | the model | one random number per edge, as `analyze` draws them |
| untrained | the model as its configuration starts it | the paper's weights |
| shuffled | the model, every matrix inside its layers with its entries in random order | the paper's weights |

Intervals are 95 % percentile bootstraps over sources within classes. No times are measured, so other load does no harm.
It goes on where it was cut off; `analyze` with the same folder's prompts does its part of the work too.

Examples:
  python benchmarks/claims.py
  python benchmarks/claims.py --prompts 4 --draws 100 --state /tmp/claims
  python benchmarks/claims.py --model ./my-model --state build/my-claims
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from machine import describe, finish
from matplotlib.figure import Figure
from rich.progress import track
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from strace.analyze import Analyst, Options, read_states
from strace.checkpoint import load_decoder, open_checkpoint, resolve
from strace.claims import (
    Check,
    Claim,
    Evidence,
    compare_growths,
    early_share,
    judge_claims,
)
from strace.classes import shipped_prompts
from strace.decoder import Decoder
from strace.extract import SIZES, EdgeWeights
from strace.figures import COLOURS, STYLE, load_study
from strace.files import file_beside, folder_beside, write_beside
from strace.growth import Growth, measure_growth, read_growth, stack_growth
from strace.importance import draw_weights, weigh_edges
from strace.metrics import draw_bootstrap

CLASSES = ("chat", "code", "facts", "math", "stories")
WORDS = 40
HELD_OUT = Path(__file__).parent / "prompts"
HUES = {
    "trace": COLOURS["trace"],
    "path products": "#d9822b",
    "random growth": COLOURS["random"],
    "complement": COLOURS["inverse"],
    "untrained": "#9aa5b1",
    "shuffled": "#6b4fa0",
}
Weigh = Callable[[Decoder, Tensor, int], EdgeWeights]


def read_lines(folder: Path, name: str) -> list[dict[str, str]]:
    """The texts of a class, each with its source."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [{"class": name} | json.loads(line) for line in lines if line]


def read_prompts(per_class: int) -> list[dict[str, str]]:
    """The first texts of every class that are long enough, classes in turn."""
    long = [[text for text in read_lines(HELD_OUT, name) if len(text["text"].split()) >= WORDS] for name in CLASSES]
    if min(map(len, long)) < per_class:
        sys.exit(f"a class has only {min(map(len, long))} texts of {WORDS} words")
    return [text for turn in zip(*(texts[:per_class] for texts in long), strict=True) for text in turn]


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    """A JSONL file, as `analyze` reads it."""
    write_beside(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def make_twin(model: str, kind: str, folder: Path) -> Path:
    """The model `untrained` or `shuffled`, in a folder of its own."""
    if (folder / "config.json").exists():
        return folder
    checkpoint = open_checkpoint(model)
    torch.manual_seed(0)
    if kind == "untrained":
        twin = AutoModelForCausalLM.from_config(checkpoint.config)
    else:
        twin = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
        shuffle_layers(twin)
    with folder_beside(folder) as beside:
        twin.save_pretrained(beside)
        checkpoint.tokenizer.save_pretrained(beside)
    return folder


@torch.no_grad()
def shuffle_layers(model: Any) -> None:
    """Put the entries of every matrix but embeddings and head in random order: sizes stay, what was learned goes."""
    head = model.get_output_embeddings()
    for module in model.modules():
        weight = None if isinstance(module, nn.Embedding) or module is head else getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


class Study:
    """An analysis and the growths that it is held against, each prompt's kept on disk once made."""

    def __init__(self, model: str, state: Path, per_class: int) -> None:
        self.model, self.state = model, state
        state.mkdir(parents=True, exist_ok=True)
        self.prompts = read_prompts(per_class)
        asked = write_lines(state / "prompts.jsonl", self.prompts)
        corpus = write_lines(
            state / "corpus.jsonl", [text for name in CLASSES for text in read_lines(shipped_prompts(), name)]
        )
        folder = state / "study" / model.strip("./").replace("/", "-")
        self.analyst = Analyst(Options(model, asked, folder, words=WORDS, sizes=SIZES, unigrams=corpus))

    def analyze(self) -> None:
        """What `strace-llm analyze` does."""
        done = len(self.analyst.finished())
        total = len(self.prompts) - done
        for _ in track(self.analyst.run(), "analyze", total=total, disable=not total):
            pass

    def grow(self, name: str, decoder: Decoder, weigh: Weigh, masked: bool) -> Growth:
        """A growth of every prompt, with its masked runs or without."""
        folder = self.state / name
        folder.mkdir(exist_ok=True)
        corpus = self.analyst.corpus if masked else None
        found = []
        for i, tokens in enumerate(track(self.analyst.tokens, name)):
            path = folder / f"{i:05}.safetensors"
            if not path.exists():
                with file_beside(path) as beside:
                    save_file(measure_growth(decoder, tokens, weigh(decoder, tokens, i), SIZES, corpus), beside)
            found.append(load_file(path))
        return stack_growth(decoder.spec.steps, found)

    def gather(self, draws: int) -> Evidence:
        """All of it, run where it is not there yet."""
        own = self.analyst.decoder
        grown = {
            "flow": self.grow("flow", own, lambda d, tokens, i: weigh_edges(d, tokens, "flow"), True),
            "random": self.grow("random", own, lambda d, tokens, i: draw_weights(d.spec, len(tokens), (1, 0, i)), True),
        }
        for kind in ("untrained", "shuffled"):
            folder = make_twin(self.model, kind, self.state / "models" / kind)
            twin = load_decoder(open_checkpoint(str(folder)), "fp32")
            grown[kind] = self.grow(kind, twin, lambda d, tokens, i: weigh_edges(d, tokens), kind == "shuffled")
        self.analyze()
        study = load_study(self.analyst.options.output)
        states = [read_states(study.folder, part.index) for part in study.parts]
        sources, classes = ([prompt[key] for prompt in self.prompts] for key in ("source", "class"))
        return Evidence(
            study=study,
            paper=read_growth(study, states),
            classes=classes,
            bootstrap=draw_bootstrap(sources, classes, draws),
            **grown,
        )


def say(check: Check, bound: bool) -> str:
    """One line of the report."""
    found = check.found
    line = f"{check.says}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return f"{line}, {'above' if check.holds else 'not above'} {check.bound:g}" if bound else line


def report(claims: list[Claim], beside: list[Check]) -> Iterator[str]:
    """Every claim with its checks, as text."""
    for claim in claims:
        yield f"\n{claim.name}: {claim.verdict.upper()}  ({claim.says})"
        yield from (f"  pattern  {say(check, True)}" for check in claim.pattern)
        yield from (f"  against  {say(check, True)}" for check in claim.against)
        yield from (f"           {say(check, False)}" for check in claim.beside)
    yield "\nbeside the claims"
    yield from (f"           {say(check, False)}" for check in beside)


def draw(evidence: Evidence) -> Figure:
    """TV of every growth, and how many of its edges lie in the first quarter of the layers, against size."""
    grown = {
        "trace": evidence.paper,
        "path products": evidence.flow,
        "random growth": evidence.random,
        "untrained": evidence.untrained,
        "shuffled": evidence.shuffled,
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = evidence.study.sizes
    for name, growth in grown.items():
        if np.isfinite(growth.tv).all():
            left.plot(sizes, np.median(growth.tv, 0), color=HUES[name], label=name)
        reach = int((np.median(growth.counts, 0) >= growth.steps).argmax())
        early = [early_share(growth, np.full(len(growth.counts), at)).mean() for at in range(reach, len(sizes))]
        right.plot(sizes[reach:], early, color=HUES[name], label=name)
    left.plot(sizes, np.median(evidence.study.read("tv", "inverse"), 0), color=HUES["complement"], label="complement")
    left.set_ylabel("median TV to the full run")
    right.set_ylabel("first quarter's share of edges / of all edges")
    right.axhline(1, color="#7a8595", linewidth=0.8, linestyle=":")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("size (share of edges)")
        axes.legend(fontsize=8)
    return figure


def record(claim: Claim) -> dict[str, Any]:
    """A claim as JSON."""
    return {"name": claim.name, "says": claim.says, "verdict": claim.verdict, "failed": claim.failed} | {
        part: [asdict(check) for check in getattr(claim, part)] for part in ("pattern", "against", "beside")
    }


def main() -> None:
    """Run what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=40, help="texts per class (default %(default)s)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("build/claims"), help="folder to go on from (%(default)s)")
    parser.add_argument("--figure", type=Path, help="PNG of TV and of early layers by growth")
    options = parser.parse_args()
    evidence = Study(options.model, options.state, options.prompts).gather(options.draws)
    claims, beside = judge_claims(evidence), compare_growths(evidence)
    print("\n".join(report(claims, beside)))
    if options.figure:
        with matplotlib.rc_context(STYLE):
            draw(evidence).savefig(options.figure, dpi=100)
    parts = evidence.study.parts
    finish(
        {
            "benchmark": "claims",
            "machine": describe(),
            "model": options.model,
            "weight_hash": evidence.study.manifest.settings.weight_hash,
            "prompts": len(parts),
            "sources": evidence.bootstrap.groups,
            "tokens": float(np.median([part.tokens for part in parts])),
            "edges": float(np.median([part.edges for part in parts])),
            "seconds": {key: sum(part.seconds[key] for part in parts) for key in ("trace", "runs")},
            "claims": [record(claim) for claim in claims],
            "beside": [asdict(check) for check in beside],
        }
    )


if __name__ == "__main__":
    main()
