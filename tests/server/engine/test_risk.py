"""A risk becomes the certified threshold, or the request runs `exact` and is told why."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from server.engine.engine import Drafts, Engine
from server.engine.options import Options
from server.engine.request import Mode, Request
from server.engine.risk import find_unusual
from strace.sampling import SamplingParams
from tests.server.engine.harness import FixedCost, decode, drain, make_engine, make_request, submit
from tests.strace.test_certificate import make_certificate

TOKENS = 16
ROUTED = replace(make_request(mode=Mode.ROUTED, max_tokens=TOKENS), risk=0.05)


class FirstToken:
    """Prompts that begin with 9 are of `lame`."""

    def choose(self, ids: list[int]) -> str:
        return "lame" if ids[0] == 9 else "pooled"


def make_certified(options: Options | None = None) -> Engine:
    """Certified is `pooled`: 2 % from .9 on, 5 % from 0 on."""
    certificate = make_certificate("pooled", {0.01: None, 0.02: 0.9, 0.05: 0.0}, tokens=TOKENS)
    return make_engine(options, certificates={"pooled": certificate}, chooser=FirstToken())


def test_a_certified_risk_runs_at_its_threshold() -> None:
    got, by_threshold = decode(make_certified(), ROUTED, replace(ROUTED, risk=None, threshold=0.0))
    assert (got.ran.mode, got.ran.risk, got.ran.bypass) == (Mode.ROUTED, 0.05, None)
    assert got.unverified
    assert got.ids == by_threshold.ids
    assert (by_threshold.ran.mode, by_threshold.ran.risk) == (Mode.ROUTED, None)


@pytest.mark.parametrize(
    ("asked", "promised"), [(0.02, 0.02), (0.04, 0.02), (0.05, 0.05), (0.5, 0.05), (None, 0.02), (0.019, None)]
)
def test_no_more_is_risked_than_asked(asked: float | None, promised: float | None) -> None:
    (got,) = decode(make_certified(), replace(ROUTED, risk=asked))
    assert got.ran.risk == promised
    assert got.ran.mode == (Mode.ROUTED if promised else Mode.EXACT)


def test_the_operator_sets_the_risk_and_what_auto_means() -> None:
    engine = make_certified(Options(auto=Mode.ROUTED, risk=0.05, seed=0))
    auto = replace(ROUTED, mode=Mode.AUTO, risk=None)
    assert [g.ran.risk for g in decode(engine, auto, replace(auto, risk=0.02))] == [0.05, 0.02]
    assert decode(engine, replace(auto, class_name=None, prompt=[9]))[0].ran.mode == Mode.EXACT


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"class_name": None, "prompt": [9, 2]}, "nothing is certified for class 'lame'"),
        ({"prompt": [9, 2]}, "its prompt is of 'lame'"),
        ({"params": SamplingParams(0.7)}, "temperature 0.7 (for class 'pooled': 0)"),
        ({"params": SamplingParams(0.0, top_p=0.9)}, "top_p"),
        ({"params": SamplingParams(0.0, logit_bias=((3, 1.0),))}, "logit_bias"),
        ({"stop": ("a",)}, "stop"),
        ({"max_tokens": TOKENS - 1}, f"max_tokens below {TOKENS}"),
        ({"risk": 0.01}, "a risk of 0.01"),
    ],
)
def test_exact_and_why(change: dict[str, Any], why: str) -> None:
    request = replace(ROUTED, **change)
    (got,) = decode(make_certified(), request)
    (exact,) = decode(make_certified(), replace(request, mode=Mode.EXACT, risk=None))
    assert (got.ran.mode, got.ran.risk, got.ran.unverified) == (Mode.EXACT, None, 0)
    assert why in (got.ran.bypass or "")
    assert got.outcome == exact.outcome
    assert exact.ran.bypass is None


def test_without_certificates_a_threshold_still_routes() -> None:
    refused, routed = decode(make_engine(), ROUTED, replace(ROUTED, risk=None, threshold=0.0))
    assert (refused.ran.mode, refused.ran.bypass) == (Mode.EXACT, "nothing is certified for class 'pooled'")
    assert (routed.ran.mode, routed.ran.risk) == (Mode.ROUTED, None)
    assert routed.unverified


@pytest.mark.parametrize("max_draft", [None, 3])
def test_a_longer_text_is_verified_from_where_the_measured_ones_ended(max_draft: int | None) -> None:
    engine = make_certified(Options(draft_length=5, seed=0))
    measured = replace(ROUTED, risk=None, threshold=0.0, max_draft=max_draft)
    short, long = decode(engine, measured, replace(ROUTED, max_tokens=3 * TOKENS, max_draft=max_draft))
    assert long.ran.mode == Mode.ROUTED
    assert long.ids[:TOKENS] == short.ids
    assert long.unverified == short.unverified
    assert long.ran.divergent == short.ran.divergent
    assert max(long.unverified) < TOKENS - 1
    assert len(long.ids) == 3 * TOKENS
    assert long.ran.drafted - short.ran.drafted > TOKENS, "the rest is drafted too"


def test_every_other_parameter_is_unusual() -> None:
    """Whatever is added to a request is outside of what was measured until someone says otherwise."""
    values: dict[str, Any] = {"logit_bias": ((1, 1.0),), "top_k": 3, "seed": 7, "stop": ("a",), "stop_ids": (1,)}
    values |= {"min_tokens": 2, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": True}
    usual = Request("r", [1], SamplingParams(1.0), TOKENS)
    assert find_unusual(usual, TOKENS) is None
    for field in fields(SamplingParams):
        if field.name != "temperature":
            params = SamplingParams(1.0, **{field.name: values.get(field.name, 0.5)})
            assert find_unusual(replace(usual, params=params), TOKENS) == field.name
    for name in ("stop", "stop_ids", "ignore_eos", "min_tokens", "logprobs", "prompt_logprobs"):
        assert find_unusual(replace(usual, **{name: values[name]}), TOKENS) == name
    free = {"class_name": "a", "risk": 0.1, "max_draft": 2, "specials": True, "mode": Mode.ROUTED, "id": "s"}
    assert find_unusual(replace(usual, **free), TOKENS) is None
    assert find_unusual(replace(usual, params=SamplingParams(0.0, seed=3)), TOKENS) is None


def test_new_subgraphs_end_what_was_promised_of_the_old() -> None:
    """A text that has begun emits nothing unverified any more; a new one is promised what the new certificates say."""
    engine = make_certified(Options(draft_length=4, seed=0))
    request = replace(ROUTED, max_tokens=4 * TOKENS)
    text = submit(engine, request)
    engine.step()
    engine.step()
    before = text.handle.ran.unverified
    assert 0 < before < TOKENS - 1
    engine.swap(Drafts(engine.runner, ("pooled", "lame"), FixedCost(), FirstToken(), {}))
    drain(engine)
    assert (text.ran.unverified, text.ran.risk) == (before, 0.05)
    assert decode(engine, request)[0].ran.mode == Mode.EXACT
