"""Is `exact` the full model? Its text beside `full`'s, token for token, greedy and with a seed at temperature 1.

Every held-out text gives two prompts, a long and a short one. `full` decodes each alone; `exact` decodes them in random
batches of 1 to 32, the classes mixed. On the native runner any difference is a fault. The torch runner rounds a product
over one token and over many differently, so where the two best tokens (with a seed: of log p plus noise) lie closer
than that, `exact` may part from `full`. The noise is measured first: the same texts, token by token and in blocks as
long as one text's drafts and as those of 32, and how far the gap between the two best moves. Every difference is then
listed with its gap.

Examples:
  python benchmarks/equality.py
  python benchmarks/equality.py --runner torch --prompts 10 --tokens 64 --draft-length 4 --dtype fp32
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from machine import describe, finish, read_prompts
from modes import CLASSES, cut_prompt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from server.engine.build import Placement, build_engine
from server.engine.engine import Engine
from server.engine.options import Options
from server.engine.request import Mode, Ran, Request, Update
from strace.kv import BLOCK, Batch
from strace.runner import FULL, Runner
from strace.sampling import Noise, Purpose, SamplingParams, process

SEED = 17
LARGEST = 32  # texts side by side


def run_blocks(runner: Runner, ids: list[int], start: int, size: int) -> Tensor:
    """float32 [len(ids) - start, V]: the full model's rows from `start` on, in passes of `size` tokens."""
    table = torch.arange(-(-len(ids) // BLOCK))[None]
    runner.forward(FULL, Batch(ids[:start], [start], [0], table), [])
    rows = []
    for first in range(start, len(ids), size):
        block = ids[first : first + size]
        rows.append(runner.forward(FULL, Batch(block, [len(block)], [first], table), list(range(len(block)))))
    return torch.cat(rows)


def measure_noise(runner: Runner, texts: list[list[int]], sizes: list[int]) -> tuple[float, int]:
    """The furthest that the gap between the two best tokens moves from single tokens to blocks of these sizes, and over
    how many rows.
    """
    furthest, count = 0.0, 0
    for ids in texts:
        single = run_blocks(runner, ids, len(ids) // 2, 1)
        best = single.topk(2).indices
        for size in sizes:
            moved = (single - run_blocks(runner, ids, len(ids) // 2, size)).gather(1, best)
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


def run_together(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], list[Ran]]:
    """Decode requests side by side in this thread: their tokens, and what ran."""
    texts: list[list[int]] = [[] for _ in requests]
    rans: list[Ran] = []

    def deliver(number: int, update: Update | Exception) -> None:
        if isinstance(update, Exception):
            raise update
        texts[number].extend(update.ids)
        rans.extend([] if update.ran is None else [update.ran])

    for number, request in enumerate(requests):
        engine.submit(request, partial(deliver, number))
    while len(rans) < len(requests):
        engine.step()
    return texts, rans


def compare(
    engine: Engine, runner: Runner, prompts: list[tuple[str, list[int]]], params: SamplingParams, tokens: int
) -> dict[str, Any]:
    """Every prompt of a class, alone by the full model and with drafts in a batch; where they part, the gap there."""
    source = random.Random(SEED)
    left, sizes, gaps, compared, drafted, accepted = list(prompts), [], [], 0, 0, 0
    source.shuffle(left)
    while left:
        group, left = left[: (size := source.randint(1, LARGEST))], left[size:]
        seeds = [None if params.seed is None else params.seed + i for i in range(len(group))]
        plain, drafting = (
            [
                Request(str(seed), prompt, replace(params, seed=seed), tokens, mode=mode, class_name=name)
                for seed, (name, prompt) in zip(seeds, group, strict=True)
            ]
            for mode in (Mode.FULL, Mode.EXACT)
        )
        expected = [run_together(engine, [request])[0][0] for request in plain]
        got, rans = run_together(engine, drafting)
        sizes.append(len(group))
        drafted, accepted = drafted + sum(r.drafted for r in rans), accepted + sum(r.accepted for r in rans)
        for request, one, other in zip(plain, expected, got, strict=True):
            parted = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            compared += len(one) if parted is None else parted + 1
            if parted is not None:
                gaps.append(round(gap_at(runner, request.prompt + one[:parted], request.params), 4))
            elif len(one) != len(other):
                gaps.append(float("inf"))
    return {
        "prompts": len(prompts),
        "batches": len(sizes),
        "batch_sizes": sorted(sizes),
        "tokens_compared": compared,
        "drafted": drafted,
        "accepted": accepted,
        "different": len(gaps),
        "gaps": gaps,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder, or a hub name (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="texts per class (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per prompt (default %(default)s)")
    parser.add_argument("--draft-length", type=int, default=4, help="drafts per cycle (default %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--runner", default="auto", choices=("auto", "native", "torch"))
    arguments = parser.parse_args()
    options = Options(draft_length=arguments.draft_length, max_running=LARGEST, max_waiting=LARGEST)
    placement = Placement(dtype=arguments.dtype, runner=arguments.runner)
    engine, checkpoint = build_engine(arguments.model, placement=placement, options=options)
    texts = [
        (name, checkpoint.tokenizer(text)["input_ids"])
        for name in CLASSES
        for text in read_prompts(name, arguments.prompts)
    ]
    block = arguments.draft_length + 1
    noise, rows = measure_noise(engine.runner, [ids[:256] for _, ids in texts[:50]], [block, LARGEST * block])
    long = [(name, cut_prompt(ids)) for name, ids in texts]
    prompts = [*long, *((name, ids[: len(ids) // 2]) for name, ids in long)]
    table = Table("sampling", "prompts", "tokens compared", "different", "largest gap", "noise", "all below")
    results = {}
    for name, params in (("greedy", SamplingParams(0.0)), ("seeded T=1", SamplingParams(1.0, seed=SEED))):
        found = compare(engine, engine.runner, prompts, params, arguments.tokens)
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
            "runner": engine.runner.name,
            "isa": engine.runner.isa,
            "dtype": str(engine.runner.cache.keys[0].dtype),
            "draft_length": arguments.draft_length,
            "noise": round(noise, 4),
            "noise_rows": rows,
            "results": results,
        }
    )


if __name__ == "__main__":
    main()
