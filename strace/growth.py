"""How traces grow with their size: edges by component, and what their masked runs give, over many prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strace.ablate import Composition, Selection, Selections, compose, run_masked
from strace.decoder import Decoder
from strace.extract import EdgeWeights, Traces
from strace.figures import Study
from strace.metrics import Doubles, Integers, cosine, unigram_correlation
from strace.sampling import total_variation


@dataclass(frozen=True)
class Growth:
    """Traces of n prompts at S sizes, the last of them 1, grown in one way on one model of L layers of H heads.

    counts [n, S]. Edges by component: attention [n, S, L, H], mlp and residual [n, S, L]. Of their masked runs, nan
    where there were none: tv, unigram and cosine [n, S]; states [n, S + 1, hidden], the last the full run's. `steps` is
    the length of a path.
    """

    steps: int
    counts: Doubles
    attention: Doubles
    mlp: Doubles
    residual: Doubles
    tv: Doubles
    unigram: Doubles
    cosine: Doubles
    states: Doubles

    def at_paths(self, paths: float) -> Integers:
        """Of each prompt the number of the size nearest to so many paths."""
        found: Integers = np.abs(np.log(np.maximum(self.counts, 0.5) / (paths * self.steps))).argmin(1)
        return found

    @property
    def layers(self) -> Doubles:
        """Edges by layer [n, S, L]."""
        found: Doubles = self.attention.sum(3) + self.mlp + self.residual
        return found

    @property
    def kinds(self) -> Doubles:
        """Edges [n, S, 2]: attention's and all others."""
        return np.stack([self.attention.sum((2, 3)), (self.mlp + self.residual).sum(2)], 2)

    @property
    def components(self) -> Doubles:
        """1 where a head or MLP has an edge, else 0 [n, S, L * (H + 1)]."""
        held = np.concatenate([self.attention, self.mlp[..., None]], 3).reshape(*self.counts.shape, -1) > 0
        return held.astype(np.float64)


def measure_growth(
    decoder: Decoder, tokens: Tensor, weights: EdgeWeights, sizes: Sequence[float], corpus: Tensor | None = None
) -> dict[str, Doubles]:
    """One prompt's part of a `Growth` but `steps`; masked runs are made where a `corpus`'s token counts are given."""
    traces = Traces(weights)
    counts = [traces.count_of(size) for size in sizes]
    made = compose(traces, counts)
    found = {"counts": np.array(counts, np.float64)} | _by_component(made)
    if corpus is None:
        nothing = np.full(len(counts), math.nan)
        return found | {"tv": nothing, "unigram": nothing, "cosine": nothing, "states": np.empty((0, 0))}
    sets = Selections(traces, traces, [Selection("trace", count) for count in counts])
    full, masked = run_masked(decoder, tokens, None), run_masked(decoder, tokens, sets)
    p, q = full.logits[0].softmax(-1), masked.logits.softmax(-1)
    last, reference = masked.states[:, -1], full.states[:, -1]
    return found | {
        "tv": total_variation(q, p).double().numpy(),
        "unigram": np.array(unigram_correlation(q, corpus)),
        "cosine": cosine(last, reference).double().numpy(),
        "states": torch.cat([last, reference]).double().numpy(),
    }


def _by_component(made: Composition) -> dict[str, Doubles]:
    residual = made.residual.reshape(*made.mlp.shape, -1).sum(2)
    parts = {"attention": made.attention, "mlp": made.mlp, "residual": residual}
    return {name: part.astype(np.float64) for name, part in parts.items()}


def stack_growth(steps: int, prompts: Sequence[dict[str, Doubles]]) -> Growth:
    """A `Growth` of what `measure_growth` gave for each prompt."""
    return Growth(steps, **{name: np.stack([prompt[name] for prompt in prompts]) for name in prompts[0]})


def read_growth(study: Study, states: Sequence[Tensor]) -> Growth:
    """The traces of an analysis; `states` as `analyze.read_states` gives them."""
    residual = study.measured("residual")
    mlp = study.measured("mlp")
    return Growth(
        steps=study.manifest.shape.steps,
        counts=study.counts,
        attention=study.measured("attention"),
        mlp=mlp,
        residual=residual.reshape(*mlp.shape, -1).sum(3),
        tv=study.read("tv", "trace"),
        unigram=study.measured("unigram"),
        cosine=study.measured("cosine")[..., -1],
        states=torch.stack(list(states)).double().numpy(),
    )


def pick(values: Any, at: Integers) -> Doubles:
    """[n, ...]: of values [n, S, ...] each prompt's at its size `at` [n]."""
    found: Doubles = np.asarray(values)[np.arange(len(at)), at]
    return found
