"""What a class is traced on: its texts in tokens, by use, and the prompts that the full model is to go on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strace.checkpoint import Checkpoint
from strace.classes import SHARES, BadPrompts, Parts, Prompt
from strace.duplicates import drop_repeats
from strace.families import Spec
from strace.subgraph import Data
from strace.texts import LONGEST, Texts, batch_texts, cut_pieces, take_pieces

# Tokens read of each part. Units are scored and candidates compared on some of those to fit on; the chosen one is
# fitted on all of them, for what fits one source need not fit another.
BUDGETS = {"fit": 65_536, "choose": 4_096, "report": 8_192}
SOME_TOKENS = 16_384
HELD = 1 << 27  # inputs of one projection that a fit may hold: of wide models fewer tokens than the budget are read
# Prompts that the full model continues, and the most tokens given of each; more to fit on, to be distilled on.
CONTINUED = {"choose": 32, "report": 48}
CONTINUED_TO_FIT = 160
GIVEN = 128


@dataclass(frozen=True)
class Material:
    """A class's texts, tokenised and batched, by use; `data` is what the manifest says of them. `prompts`: source and
    ids of those that the full model continues. `long`: places of those longer than its context, which are cut."""

    texts: dict[str, list[Texts]]
    data: dict[str, Data]
    prompts: dict[str, list[tuple[str, list[int]]]]
    long: tuple[str, ...] = ()


def gather_material(checkpoint: Checkpoint, parts: Parts, seed: int, fit_tokens: int = BUDGETS["fit"]) -> Material:
    """Tokenise and cut a class's texts, each part to its budget of tokens, in an order drawn by `seed`; prompts that
    repeat an earlier part's are left out. fit_tokens: the budget of those to fit on."""
    budgets = BUDGETS | {"fit": fit_tokens}
    texts, data, drawn, distinct = {}, {}, {}, drop_repeats(parts)
    context, counts = checkpoint.spec.context, {"fit": CONTINUED_TO_FIT, **CONTINUED}
    long: list[str] = []
    for use in SHARES:
        prompts: Sequence[Prompt] = getattr(distinct.parts, use)
        if not prompts:
            raise BadPrompts(f"all prompts to {use} by repeat those of earlier parts: sources differ, texts do not")
        ids: list[list[int]] = [checkpoint.tokenizer(prompt.text, verbose=False)["input_ids"] for prompt in prompts]
        long += [p.place for p, own in zip(prompts, ids, strict=True) if len(own) > context]
        chosen = _draw_pieces(ids, min(LONGEST, context), _limit(budgets[use], checkpoint.spec), seed)
        if not chosen:
            raise BadPrompts(f"all prompts to {use} by are empty to this model's tokenizer")
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        texts[use] = batch_texts(chosen)
        sources = len({prompt.source for prompt in prompts})
        data[use] = Data(
            prompts=len(prompts),
            sources=sources,
            tokens=sum(map(len, chosen)),
            hash=digest,
            repeats=distinct.repeats[use],
        )
        drawn[use] = _draw_prompts(prompts, ids, context, counts[use], seed)
    return Material(texts, data, drawn, tuple(long))


def _limit(budget: int, spec: Spec) -> int:
    """So many tokens, or as many as `HELD` allows of a model, which is `SOME_TOKENS` at least."""
    return min(budget, max(SOME_TOKENS, HELD // max(spec.hidden, spec.mlp)))


def _draw_prompts(
    prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], context: int, count: int, seed: int
) -> list[tuple[str, list[int]]]:
    """Sources and first thirds of some texts, for the model to go on with."""
    found = []
    for i in np.random.default_rng(seed).permutation(len(prompts))[:count]:
        given = max(1, min(GIVEN, context // 2, max(16, len(ids[i]) // 3)))
        if ids[i]:
            found.append((prompts[i].source, list(ids[i][:given])))
    return found


def _draw_pieces(ids: Sequence[Sequence[int]], longest: int, budget: int, seed: int) -> list[list[int]]:
    pieces = cut_pieces(ids, longest) or [list(text) for text in ids if text]
    order = np.random.default_rng(seed).permutation(len(pieces))
    return take_pieces([pieces[i] for i in order], budget)
