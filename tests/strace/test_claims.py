"""Verdicts by their rules, on planted growths and on a tiny model's."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from strace.analyze import Analyst, Options, read_states
from strace.claims import (
    ARTEFACT,
    MISSING,
    REPRODUCED,
    Check,
    Claim,
    Evidence,
    compare_growths,
    compare_later,
    densities,
    early_share,
    judge_claims,
    judge_early_layers,
    judge_later_attention,
    judge_unigrams,
)
from strace.figures import load_study
from strace.growth import Growth, measure_growth, read_growth, stack_growth
from strace.importance import draw_weights, weigh_edges
from strace.metrics import Doubles, Estimate, draw_bootstrap
from tests.tiny import save_tiny

SIZES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
CLASSES = ["one", "other"] * 4


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """All growths of a tiny random model, whose twins are itself."""
    here = tmp_path_factory.mktemp("claims")
    model, prompts = save_tiny(here / "model"), here / "p.jsonl"
    texts = [" ".join(f"{word}{i}" for word in ("some", "few", "words")) for i in range(8)]
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    analyst = Analyst(Options(str(model), prompts, here / "out", words=3, sizes=SIZES))
    list(analyst.run())
    study = load_study(here / "out")
    paper = read_growth(study, [read_states(study.folder, i) for i in range(8)])
    own, corpus = analyst.decoder, analyst.corpus

    def grow(measure: str) -> Growth:
        found = [
            measure_growth(own, t, weigh_edges(own, t, measure, seed=i), SIZES, corpus)
            for i, t in enumerate(analyst.tokens)
        ]
        return stack_growth(own.spec.steps, found)

    drawn = [draw_weights(own.spec, len(t), (1, 0, i)) for i, t in enumerate(analyst.tokens)]
    random = [measure_growth(own, t, w, SIZES, corpus) for t, w in zip(analyst.tokens, drawn, strict=True)]
    return Evidence(
        study=study,
        paper=paper,
        flow=grow("flow"),
        random=stack_growth(own.spec.steps, random),
        untrained=grow("l1"),
        shuffled=grow("l1"),
        classes=CLASSES,
        bootstrap=draw_bootstrap(range(8), CLASSES, draws=20),
    )


def test_a_growth_measured_alone_is_the_analysis_own(evidence: Evidence) -> None:
    for name in ("counts", "attention", "mlp", "residual", "tv", "unigram", "cosine", "states"):
        np.testing.assert_allclose(
            getattr(evidence.untrained, name), getattr(evidence.paper, name), atol=2e-5, err_msg=name
        )
    chance = evidence.study.read("tv", "random")
    np.testing.assert_allclose(evidence.random.tv, chance, atol=1e-5)


def test_all_claims_are_judged_and_a_model_is_never_beyond_itself(evidence: Evidence) -> None:
    claims = judge_claims(evidence)
    assert len({claim.name for claim in claims}) == 10
    for claim in claims:
        assert claim.verdict in (REPRODUCED, MISSING, ARTEFACT)
        for check in (*claim.pattern, *claim.against, *claim.beside):
            assert check.found.n == 8
            assert check.found.groups == 8
            if "less that of the untrained" in check.says or "less that of the shuffled" in check.says:
                assert not abs(check.found.value) > 1e-4  # nan where so small a graph has no edges between
                assert not check.holds
    assert any("density of other" in check.says for check in compare_growths(evidence))


def test_density_starts_where_the_analysis_starts_it(evidence: Evidence) -> None:
    np.testing.assert_allclose(densities(evidence, evidence.paper.tv), evidence.study.density)


@pytest.mark.parametrize(
    ("pattern", "against", "verdict", "failed"),
    [
        ([0.1, 0.2], [0.1], REPRODUCED, []),
        ([0.1, 0.2], [], REPRODUCED, []),
        ([0.1, -0.1], [0.1], MISSING, ["p1"]),
        ([0.1, 0.2], [0.1, 0.0], ARTEFACT, ["a1"]),
        ([-0.1], [-0.1], MISSING, ["p0"]),
        ([math.nan], [0.1], MISSING, ["p0"]),
    ],
)
def test_the_verdict_is_a_rule(pattern: list[float], against: list[float], verdict: str, failed: list[str]) -> None:
    def checks(name: str, lows: list[float]) -> tuple[Check, ...]:
        return tuple(Check(f"{name}{i}", Estimate(low + 1, low, low + 2, 8, 8)) for i, low in enumerate(lows))

    claim = Claim("x", "y", checks("p", pattern), checks("a", against))
    assert (claim.verdict, claim.failed) == (verdict, failed)


def test_a_check_looks_at_the_whole_interval() -> None:
    estimate = Estimate(1.5, 0.9, 2, 8, 8)
    assert Check("x", estimate, 0.5).holds
    assert not Check("x", estimate, 1).holds


def plant(shares: list[list[float]], attention: float = 0.9) -> Growth:
    """8 equal prompts of 4 layers and 1 head with 1,000 edges a layer; the shares of each layer's that are in."""
    n, layers = 8, np.array(shares) * 1000
    zeros = np.zeros((n, *layers.shape))
    whole = zeros + layers
    none = np.full((n, len(shares)), math.nan)
    counts: Doubles = whole.sum(2)
    return Growth(
        1, counts, (attention * whole)[..., None], (1 - attention) * whole, zeros, none, none, none, np.empty((n, 0, 0))
    )


EARLY = plant([[0.02, 0, 0, 0], [0.3, 0.1, 0, 0], [1, 1, 1, 1]])
LATE = plant([[0, 0, 0, 0.02], [0, 0, 0.1, 0.3], [1, 1, 1, 1]])
EVEN = plant([[0.005] * 4, [0.1] * 4, [1, 1, 1, 1]])


def test_the_share_of_early_layers_by_hand() -> None:
    assert early_share(EARLY, EARLY.at_paths(20)).tolist() == [4.0] * 8
    assert early_share(EVEN, EVEN.at_paths(20)) == pytest.approx([1.0] * 8)
    assert EARLY.at_paths(20).tolist() == [0] * 8
    assert EARLY.at_paths(300).tolist() == [1] * 8


@pytest.mark.parametrize(
    ("paper", "flow", "untrained", "verdict"),
    [
        (EARLY, EARLY, EVEN, REPRODUCED),
        (EARLY, EARLY, EARLY, ARTEFACT),  # without training too
        (EARLY, LATE, EVEN, ARTEFACT),  # not by path products
        (EVEN, EARLY, LATE, MISSING),
        (LATE, LATE, EARLY, MISSING),
    ],
)
def test_early_layers_first(evidence: Evidence, paper: Growth, flow: Growth, untrained: Growth, verdict: str) -> None:
    planted = replace(evidence, paper=paper, flow=flow, untrained=untrained, shuffled=EVEN, random=EVEN)
    assert judge_early_layers(planted).verdict == verdict


def test_later_edges_by_hand() -> None:
    amounts = np.array([[[3.0, 1.0], [3.0, 3.0], [10.0, 10.0]]])
    later = compare_later(amounts, np.array([0.0, 1.0]), np.array([0]), 1)
    assert (later.core[0], later.added[0], later.left[0]) == (0.25, 1.0, 9 / 16)
    assert (later.rise[0], later.lift[0]) == (0.75, 1 - 9 / 16)


def test_attention_that_only_fills_up_is_an_artefact(evidence: Evidence) -> None:
    """All edges are added alike from those left, so that attention's share rises by counting alone."""

    def kinds(attention: list[float], others: list[float]) -> Growth:
        a, b = (np.tile(np.array(x), (8, 1)) for x in (attention, others))
        fill = np.zeros((8, 3, 1))
        return replace(EVEN, counts=a + b, attention=a[..., None, None], mlp=b[..., None], residual=fill)

    counted = kinds([0, 900, 9000], [20, 120, 1020])
    beyond = kinds([0, 990, 9000], [20, 30, 1020])
    none = kinds([18, 918, 9000], [2, 102, 1000])
    far = replace(evidence, flow=beyond, untrained=none, shuffled=none, random=none)
    assert judge_later_attention(replace(far, paper=beyond, study=_third(evidence))).verdict == REPRODUCED
    assert judge_later_attention(replace(far, paper=counted, study=_third(evidence))).failed == [
        "the same added edges, less all edges that the core leaves out (chance)"
    ]


def _third(evidence: Evidence) -> object:
    """The study, with sizes of which the second is the one looked at."""
    settings = evidence.study.manifest.settings.model_copy(update={"sizes": [0.002, 0.1, 1.0]})
    return replace(evidence.study, manifest=evidence.study.manifest.model_copy(update={"settings": settings}))


def test_unigrams_are_read_at_the_first_trace_that_says_something(evidence: Evidence) -> None:
    def say(*rho: float) -> Growth:
        return replace(EVEN, unigram=np.tile(np.array(rho), (8, 1)))

    planted = replace(evidence, paper=say(math.nan, 0.8, 0.3), random=say(0.1, 0.9, 0.3), shuffled=say(0.2, 0.2, 0.2))
    claim = judge_unigrams(planted)
    assert claim.verdict == REPRODUCED
    assert claim.pattern[0].found.value == pytest.approx(0.8)
    assert judge_unigrams(replace(planted, random=say(0.9, 0.1, 0.3))).verdict == ARTEFACT
    assert judge_unigrams(replace(planted, paper=say(0.2, 0.8, 0.3))).verdict == MISSING
