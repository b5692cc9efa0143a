"""The paper's claims, judged: each is figures with intervals, and a verdict by rules that are the same for all.

A claim is *not reproduced* where a check of its pattern does not hold. Where the pattern is there but a check against
an explanation that needs no trained model does not hold, it is an *artefact*. A check holds where the whole interval of
its figure lies above its bound.

The paper's fixed sizes suit its models of 32 layers of 32 heads and 50 tokens, where s = 1e-3 is 20 paths from the
embeddings to the output. Here the core is the size nearest to 20 paths of each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from strace.figures import Study
from strace.growth import Growth, pick
from strace.metrics import (
    Bootstrap,
    Doubles,
    Estimate,
    Integers,
    Phases,
    cka,
    fit_phases,
    gini,
    rank_residuals,
    spearman,
    split_quarters,
    tv_density,
)

CORE = 20.0  # paths
CONSTRUCTED = 200.0  # paths at the paper's s = 1e-2, where its refinement begins
FAR = 0.1  # the size up to which later edges are looked at: beyond it what is left decides
REPRODUCED, MISSING, ARTEFACT = "reproduced", "not reproduced", "artefact"


@dataclass(frozen=True)
class Evidence:
    """Growths of the same prompts: the paper's, and what it is held against.

    `flow` grows by path products, `random` over random weights; `untrained` and `shuffled` as the paper does, on the
    model before training and on one whose matrices inside the layers have their entries in another order.
    """

    study: Study
    paper: Growth
    flow: Growth
    random: Growth
    untrained: Growth
    shuffled: Growth
    classes: Sequence[str]
    bootstrap: Bootstrap


@dataclass(frozen=True)
class Check:
    """What a figure is, the figure, and the bound above which its whole interval must lie."""

    says: str
    found: Estimate
    bound: float = 0.0

    @property
    def holds(self) -> bool:
        return self.found.low > self.bound


@dataclass(frozen=True)
class Claim:
    """One claim: the checks of its pattern, those against other explanations, and figures that decide nothing."""

    name: str
    says: str
    pattern: tuple[Check, ...]
    against: tuple[Check, ...]
    beside: tuple[Check, ...] = ()

    @property
    def verdict(self) -> str:
        if not all(check.holds for check in self.pattern):
            return MISSING
        return REPRODUCED if all(check.holds for check in self.against) else ARTEFACT

    @property
    def failed(self) -> list[str]:
        """The checks that decided against it."""
        return [c.says for c in (self.against if self.verdict == ARTEFACT else self.pattern) if not c.holds]


def judge_claims(evidence: Evidence) -> list[Claim]:
    """All claims in the paper's order."""
    return [
        judge_phases(evidence),
        judge_head(evidence),
        judge_early_layers(evidence),
        judge_later_layers(evidence),
        judge_later_attention(evidence),
        judge_uncertainty(evidence),
        judge_unigrams(evidence),
        judge_controls(evidence),
        judge_presence(evidence),
        judge_states(evidence),
    ]


def _mean(evidence: Evidence, says: str, values: Any, bound: float = 0.0) -> Check:
    """The mean over prompts of one number each, where it is known."""
    numbers = np.asarray(values, np.float64)

    def mean(draw: Integers) -> float:
        known = numbers[draw][np.isfinite(numbers[draw])]
        return float(known.mean()) if len(known) else math.nan

    return _of(evidence, says, mean, bound)


def _of(evidence: Evidence, says: str, statistic: Callable[[Integers], float], bound: float = 0.0) -> Check:
    return Check(says, evidence.bootstrap.estimate(statistic), bound)


def judge_phases(evidence: Evidence) -> Claim:
    """Steep fall of TV, then a slow one: by a line of three pieces through the medians, broken where it fits best."""
    sizes = evidence.study.manifest.settings.sizes

    def fit(growth: Growth, draw: Integers) -> Phases:
        reach = int((np.median(growth.counts, 0) >= growth.steps).argmax())
        found = fit_phases(sizes[reach:], np.median(growth.tv[draw], 0)[reach:].tolist())
        return found or Phases(math.nan, math.nan, (math.nan,) * 3, math.nan)

    def bend(growth: Growth) -> Callable[[Integers], float]:
        def value(draw: Integers) -> float:
            slopes = fit(growth, draw).slopes
            return 2 * slopes[2] - min(slopes[:2])

        return value

    paper, random, shuffled = (bend(growth) for growth in (evidence.paper, evidence.random, evidence.shuffled))
    first, last = evidence.paper.at_paths(2), evidence.paper.at_paths(CONSTRUCTED)
    built, by_chance = (pick(growth.tv, first) - pick(growth.tv, last) for growth in (evidence.paper, evidence.random))
    return Claim(
        "two phases",
        "TV falls steeply while the trace is built (s = 1e-4 to 1e-2), then slowly (to 1)",
        (
            _of(evidence, "steepest fitted fall of TV per decade, less twice that of the last piece", paper),
            _of(evidence, "fall of TV per decade on the last piece", lambda draw: -fit(evidence.paper, draw).slopes[2]),
        ),
        (
            _mean(evidence, "fall of TV from 2 to 200 paths, less that of random growth", built - by_chance),
            _of(evidence, "the first figure less the shuffled model's", lambda draw: paper(draw) - shuffled(draw)),
        ),
        (
            _mean(evidence, "fall of TV from 2 to 200 paths", built),
            _of(evidence, "size at the first break of the fit", lambda draw: fit(evidence.paper, draw).first),
            _of(evidence, "size at the second break", lambda draw: fit(evidence.paper, draw).second),
            _of(evidence, "the first figure of random growth", random),
            _of(evidence, "the first figure of the shuffled model", shuffled),
        ),
    )


def judge_head(evidence: Evidence) -> Claim:
    """The head of the distribution at the core."""
    study, paper = evidence.study, evidence.paper
    nucleus, chance = (study.read("nucleus", control) for control in ("trace", "random"))

    def recovered(paths: float, percent: int, of: Doubles = nucleus) -> Doubles:
        return (pick(of, paper.at_paths(paths)) >= percent).astype(np.float64)

    first = recovered(CORE, 1)
    return Claim(
        "head early",
        "a core near s = 1e-3, 20 paths of the paper's models, recovers the head of the distribution",
        (_mean(evidence, "share of prompts whose likeliest token is recovered at 20 paths", first, 0.5),),
        (_mean(evidence, "the same, less that of random growth", first - recovered(CORE, 1, chance)),),
        (
            _mean(evidence, "share at s = 1e-3", nucleus[:, study.nearest(1e-3)] >= 1),
            *(
                _mean(
                    evidence,
                    f"share whose {percent} % nucleus is recovered at {paths} paths",
                    recovered(paths, percent),
                )
                for paths in (20, 200, 1000)
                for percent in (1, 20, 60, 90)
            ),
        ),
    )


def early_share(growth: Growth, at: Integers) -> Doubles:
    """[n]: the share of a trace's edges in the first quarter of the layers over that of all edges."""
    layers = growth.layers
    found: Doubles = split_quarters(pick(layers, at))[:, 0] / split_quarters(layers[:, -1])[:, 0]
    return found


def judge_early_layers(evidence: Evidence) -> Claim:
    """Small traces lie in early layers, more than edges do."""
    paper, flow, random, untrained, shuffled = (
        early_share(growth, growth.at_paths(CORE))
        for growth in (evidence.paper, evidence.flow, evidence.random, evidence.untrained, evidence.shuffled)
    )
    return Claim(
        "early layers first",
        "small traces lie mostly in early layers",
        (_mean(evidence, "first quarter's share of the edges at 20 paths, over its share of all edges", paper, 1),),
        (
            _mean(evidence, "the same of traces grown by path products", flow, 1),
            _mean(evidence, "the same, less that of the untrained model", paper - untrained),
            _mean(evidence, "the same, less that of random growth", paper - random),
        ),
        (
            _mean(evidence, "the same of the untrained model", untrained, 1),
            _mean(evidence, "the same of the shuffled model", shuffled, 1),
            _mean(evidence, "the same of random growth", random, 1),
            *(
                _mean(evidence, f"the first figure at 200 paths{name}", early_share(g, g.at_paths(CONSTRUCTED)), 1)
                for name, g in (
                    ("", evidence.paper),
                    (", path products", evidence.flow),
                    (", untrained", evidence.untrained),
                )
            ),
        ),
    )


@dataclass(frozen=True)
class Later:
    """Of each prompt [n]: a mean over the edges of the core, over those added from there to `FAR`, and over all that
    the core leaves out."""

    core: Doubles
    added: Doubles
    left: Doubles

    @property
    def rise(self) -> Doubles:
        return self.added - self.core

    @property
    def lift(self) -> Doubles:
        """Beyond what would be added if edges were drawn from those left."""
        return self.added - self.left


def compare_later(amounts: Doubles, values: Doubles, core: Integers, far: int) -> Later:
    """The means of `values` [K] over edges counted as `amounts` [n, S, K]."""

    def mean(counted: Doubles) -> Doubles:
        with np.errstate(invalid="ignore"):
            found: Doubles = (counted @ values) / counted.sum(1)
        return found

    held = pick(amounts, core)
    return Later(mean(held), mean(amounts[:, far] - held), mean(amounts[:, -1] - held))


def _judge_later(evidence: Evidence, name: str, says: str, what: str, later: Callable[[Growth], Later]) -> Claim:
    paper, flow, untrained, shuffled, random = (
        later(g) for g in (evidence.paper, evidence.flow, evidence.untrained, evidence.shuffled, evidence.random)
    )
    return Claim(
        name,
        says,
        (_mean(evidence, f"{what} of the edges added from 20 paths to s = {FAR:g}, less the core's", paper.rise),),
        (
            _mean(evidence, "the same added edges, less all edges that the core leaves out (chance)", paper.lift),
            _mean(evidence, "the rise of traces grown by path products", flow.rise),
            _mean(evidence, "the rise, less that of the untrained model", paper.rise - untrained.rise),
        ),
        (
            _mean(evidence, f"{what} of the core", paper.core),
            _mean(evidence, f"{what} of the added edges", paper.added),
            _mean(evidence, f"{what} of those left out", paper.left),
            _mean(evidence, "chance check of traces grown by path products", flow.lift),
            _mean(evidence, "the rise of the untrained model", untrained.rise),
            _mean(evidence, "the rise of the shuffled model", shuffled.rise),
            _mean(evidence, "the rise of random growth", random.rise),
        ),
    )


def judge_later_layers(evidence: Evidence) -> Claim:
    """Edges that come later lie in later layers."""
    far = evidence.study.nearest(FAR)

    def later(growth: Growth) -> Later:
        layers = growth.layers
        return compare_later(layers, np.linspace(0, 1, layers.shape[2]), growth.at_paths(CORE), far)

    says = "later edges lie in later layers"
    return _judge_later(evidence, "later layers later", says, "mean depth (0: first layer, 1: last)", later)


def judge_later_attention(evidence: Evidence) -> Claim:
    """Edges that come later are attention edges."""
    far, attention = evidence.study.nearest(FAR), np.array([1.0, 0.0])

    def later(growth: Growth) -> Later:
        return compare_later(growth.kinds, attention, growth.at_paths(CORE), far)

    says = "later edges are increasingly attention"
    return _judge_later(evidence, "late edges are attention", says, "share of attention", later)


def densities(evidence: Evidence, tv: Doubles) -> Doubles:
    """[n]: the mean TV over log size from one path on."""
    study = evidence.study
    starts = [study.manifest.shape.steps / part.edges for part in study.parts]
    return np.array([tv_density(study.sizes.tolist(), row.tolist(), s) for row, s in zip(tv, starts, strict=True)])


def judge_uncertainty(evidence: Evidence) -> Claim:
    """Density against the entropy of the full model's prediction."""
    study = evidence.study
    entropy, tokens = study.entropy, [part.tokens for part in study.parts]
    density, chance = (densities(evidence, study.read("tv", control)) for control in ("trace", "random"))

    def rho(x: Doubles, y: Doubles) -> Callable[[Integers], float]:
        return lambda draw: spearman(x[draw], y[draw]).rho

    mine, theirs = (rank_residuals(x, evidence.classes, tokens) for x in (density, entropy))
    by_class = [
        _of(evidence, f"rho within {name}", partial(_rho_within, evidence, density, name))
        for name in sorted(set(evidence.classes))
    ]
    return Claim(
        "density and uncertainty",
        "density rises with the full model's entropy",
        (_of(evidence, "Spearman's rho of density and entropy", rho(density, entropy)),),
        (
            _of(evidence, "the same within class and at equal length (partial)", rho(mine, theirs)),
            _of(
                evidence,
                "rho, less that of random growth's density",
                lambda draw: rho(density, entropy)(draw) - rho(chance, entropy)(draw),
            ),
        ),
        (
            _of(evidence, "rho of random growth's density", rho(chance, entropy)),
            _of(evidence, "rho of density over random growth's", rho(density / chance, entropy)),
            *by_class,
        ),
    )


def _rho_within(evidence: Evidence, density: Doubles, name: str, draw: Integers) -> float:
    here = draw[np.array(evidence.classes)[draw] == name]
    return spearman(density[here], evidence.study.entropy[here]).rho


def judge_unigrams(evidence: Evidence) -> Claim:
    """The output of the smallest traces that hold a path against token frequency in a corpus."""

    def first(growth: Growth) -> Doubles:
        # The first size past one path whose output is not flat: a trace of a path's length need not hold one.
        known = np.isfinite(growth.unigram) & (growth.counts >= growth.steps)
        return pick(growth.unigram, known.argmax(1))

    paper, random, shuffled = (first(g) for g in (evidence.paper, evidence.random, evidence.shuffled))
    full = evidence.paper.unigram[:, -1]
    return Claim(
        "unigrams",
        "the sparsest traces encode unigram frequency",
        (
            _mean(evidence, "rank correlation of the smallest traces' output with token counts", paper),
            _mean(evidence, "the same, less the full model's", paper - full),
        ),
        (
            _mean(evidence, "the same, less that of random growth", paper - random),
            _mean(evidence, "the same, less that of the shuffled model", paper - shuffled),
        ),
        (
            _mean(evidence, "the full model's", full),
            _mean(evidence, "that of random growth", random),
            _mean(evidence, "that of the shuffled model", shuffled),
            *(
                _mean(evidence, f"that of traces of {paths} paths", pick(evidence.paper.unigram, at))
                for paths in (5, 20, 100)
                for at in [evidence.paper.at_paths(paths)]
            ),
        ),
    )


def judge_controls(evidence: Evidence) -> Claim:
    """The trace of 20 paths beside its complement and a random set of as many edges."""
    study, core = evidence.study, evidence.paper.at_paths(CORE)
    tv = {c: pick(study.read("tv", c), core) for c in ("trace", "inverse", "random")}
    free = {c: pick(study.read("tv", f"{c}+residuals"), core) for c in tv}
    less = "less the trace's, all residual edges free on both sides"
    first = (evidence.paper.counts > 0).argmax(1)
    return Claim(
        "controls",
        "a trace keeps the output; its complement and random edges do not",
        (
            _mean(evidence, f"TV of random growth {less}", free["random"] - free["trace"]),
            _mean(evidence, f"TV of the complement {less}", free["inverse"] - free["trace"]),
        ),
        (
            _mean(evidence, "the first with no free edges, as many on both sides", tv["random"] - tv["trace"]),
            _mean(evidence, "the second with no free edges", tv["inverse"] - tv["trace"]),
        ),
        (
            *(
                _mean(evidence, f"TV at 20 paths, {name}{more}", some[name])
                for some, more in ((tv, ""), (free, " and all residual edges"))
                for name in some
            ),
            _mean(evidence, "edges of the first trace that has any", pick(evidence.paper.counts, first)),
            _mean(evidence, "TV of its complement", pick(study.read("tv", "inverse"), first)),
        ),
    )


def judge_presence(evidence: Evidence) -> Claim:
    """How unevenly heads and MLPs occur in the cores."""

    def inequality(growth: Growth) -> Callable[[Integers], float]:
        held = pick(growth.components, growth.at_paths(CORE))
        return lambda draw: gini(held[draw].mean(0))

    paper, random, untrained, flow = (
        inequality(g) for g in (evidence.paper, evidence.random, evidence.untrained, evidence.flow)
    )
    return Claim(
        "component presence",
        "few heads and MLPs are in most cores",
        (
            _of(
                evidence,
                "Gini of the share of prompts whose core holds a component, less random growth's",
                lambda d: paper(d) - random(d),
            ),
        ),
        (_of(evidence, "the same Gini, less the untrained model's", lambda draw: paper(draw) - untrained(draw)),),
        (
            _of(evidence, "Gini", paper),
            _of(evidence, "Gini of random growth", random),
            _of(evidence, "Gini of the untrained model", untrained),
            _of(evidence, "Gini of traces grown by path products", flow),
        ),
    )


def judge_states(evidence: Evidence) -> Claim:
    """The last hidden state of a core beside the full run's."""

    def alike(growth: Growth) -> Doubles:
        return pick(growth.cosine, growth.at_paths(CORE))

    def aligned(growth: Growth) -> Callable[[Integers], float]:
        some = torch.from_numpy(pick(growth.states, growth.at_paths(CORE)))
        full = torch.from_numpy(np.ascontiguousarray(growth.states[:, -1]))
        return lambda draw: cka(some[draw], full[draw])

    paper, random = aligned(evidence.paper), aligned(evidence.random)
    near, by_chance = alike(evidence.paper), alike(evidence.random)
    return Claim(
        "hidden states",
        "the core's last state already points where the full model's does",
        (
            _mean(
                evidence,
                "cosine of the last states at 20 paths, less random growth's",
                alike(evidence.paper) - alike(evidence.random),
            ),
            _of(evidence, "CKA over prompts, less random growth's", lambda d: paper(d) - random(d)),
        ),
        (),
        (
            _mean(evidence, "cosine", near),
            _mean(evidence, "cosine of random growth", by_chance),
            _of(evidence, "CKA", paper),
            _of(evidence, "CKA of random growth", random),
        ),
    )


def compare_growths(evidence: Evidence) -> list[Check]:
    """TV of traces grown by path products beside the paper's, of equal sizes; and the density of every class."""
    paper, flow = evidence.paper, evidence.flow
    found = []
    for paths in (5, 20, 200):
        own, other = pick(paper.tv, paper.at_paths(paths)), pick(flow.tv, flow.at_paths(paths))
        found.append(_mean(evidence, f"TV at {paths} paths, the paper's less path products'", own - other))
    density, other = (densities(evidence, growth.tv) for growth in (paper, flow))
    found.append(_mean(evidence, "density, the paper's less path products'", density - other))
    for name in sorted(set(evidence.classes)):
        inside = np.array([c == name for c in evidence.classes])
        values = np.where(inside, density, math.nan)
        found.append(_mean(evidence, f"density of {name}", values))
    return found
