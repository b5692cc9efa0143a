"""Is `exact` the full model? Its text beside `full`'s, token for token, greedy and with a seed at temperature 1.

The torch runner rounds a product over one token and over five differently, so where the two best tokens (with a seed:
of log p plus noise) lie closer than that, `exact` may part from `full`. The noise is measured first: the same texts,
token by token and in blocks, and how far the gap between the two best moves. Every difference is then listed with its
gap.

Examples:
  python benchmarks/equality.py
  python benchmarks/equality.py --prompts 20 --tokens 128 --draft-length 4 --dtype fp32
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import describe, finish, read_prompts
from modes import CLASSES, cut_prompt, run_engine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Request
from strace.kv import BLOCK, Batch
from strace.runner import FULL, Runner
from strace.sampling import Noise, Purpose, SamplingParams, process

SEED = 17


def run_blocks(runner: Runner, ids: list[int], start: int, size: int) -> Tensor:
    """float32 [len(ids) - start, V]: the full model's rows from `start` on, in passes of `size` tokens."""
    table = torch.arange(-(-len(ids) // BLOCK))[None]
    runner.forward(FULL, Batch(torch.tensor(ids[:start]), [start], [0], table), [])
    rows = []
    for first in range(start, len(ids), size):
        block = ids[first : first + size]
        rows.append(
            runner.forward(FULL, Batch(torch.tensor(block), [len(block)], [first], table), list(range(len(block))))
        )
    return torch.cat(rows)


def measure_noise(runner: Runner, texts: list[list[int]], size: int) -> tuple[float, int]:
    """The furthest that the gap between the two best tokens moves from one pass shape to another, and over how many
    rows.
    """
    furthest, count = 0.0, 0
    for ids in texts:
        single, block = (run_blocks(runner, ids, len(ids) // 2, n) for n in (1, size))
        best = single.topk(2).indices
        moved = (single - block).gather(1, best)
        furthest = max(furthest, float((moved[:, 0] - moved[:, 1]).abs().max()))
        count += len(best)
    return furthest, count


def gap_at(runner: Runner, ids: list[int], params: SamplingParams) -> float:
    """How far apart the two best candidates for the token after `ids` are for the full model, in logits."""
    row = run_blocks(runner, ids, len(ids) - 1, 1)
    if params.seed is not None:
        noise = Noise(params.seed, shared=True).gumbel(len(ids), Purpose.TOKEN, row.shape[1])
        row = process(row, [[]], params).log() + noise
    best = row.topk(2).values[0]
    return float(best[0] - best[1])


def compare(
    engine: Engine, runner: Runner, prompts: list[list[int]], params: SamplingParams, tokens: int
) -> dict[str, Any]:
    """Every prompt in both modes; where they part, the gap there."""
    gaps, compared = [], 0
    for number, prompt in enumerate(prompts):
        texts = []
        for mode in (Mode.FULL, Mode.EXACT):
            ids, _ = run_engine(engine, Request(str(number), prompt, params, tokens, mode=mode))
            texts.append(ids)
        parted = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), None)
        compared += len(texts[0]) if parted is None else parted + 1
        if parted is not None:
            gaps.append(round(gap_at(runner, prompt + texts[0][:parted], params), 4))
    return {"prompts": len(prompts), "tokens_compared": compared, "different": len(gaps), "gaps": gaps}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="prompts per class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    parser.add_argument("--draft-length", type=int, default=4, help="drafts per cycle (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    arguments = parser.parse_args()
    options = Options(draft_length=arguments.draft_length)
    engine, checkpoint = build_engine(arguments.model, placement=Placement(dtype=arguments.dtype), options=options)
    texts = [
        checkpoint.tokenizer(text)["input_ids"] for name in CLASSES for text in read_prompts(name, arguments.prompts)
    ]
    noise, rows = measure_noise(engine.runner, [ids[:256] for ids in texts], arguments.draft_length + 1)
    table = Table("sampling", "prompts", "tokens compared", "different", "largest gap", "noise", "all below")
    results = {}
    for name, params in (("greedy", SamplingParams(0.0)), ("seeded T=1", SamplingParams(1.0, seed=SEED))):
        found = compare(engine, engine.runner, [cut_prompt(ids) for ids in texts], params, arguments.tokens)
        found["all_below_noise"] = all(gap <= noise for gap in found["gaps"])
        results[name] = found
        cells = name, found["prompts"], found["tokens_compared"], found["different"], max(found["gaps"], default=0.0)
        table.add_row(*map(str, (*cells, round(noise, 4), found["all_below_noise"])))
    Console(width=120).print(table)
    finish(
        {
            "benchmark": "equality",
            "machine": describe(),
            "model": arguments.model,
            "dtype": str(engine.runner.cache.keys[0].dtype),
            "draft_length": arguments.draft_length,
            "noise": round(noise, 4),
            "noise_rows": rows,
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
