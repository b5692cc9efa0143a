"""`routed`: sure tokens are emitted before the full model sees them, and every one of them is audited."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.engine.options import Options
from server.engine.request import Mode, Request
from strace.decoder import DenseAttend
from strace.sampling import Noise, draw_token, process
from tests.server.engine.harness import Got, decode, graphs, make_engine, make_request

ALWAYS, NEVER = 0.0, 1.1


def recount(request: Request, got: Got) -> int:
    """Unverified tokens that are not the full model's choice after the same text, without the engine."""
    full, ids = graphs()["full"], request.prompt + got.ids
    positions = torch.arange(len(ids))
    logits = full.logits(full.streams(torch.tensor(ids), positions, DenseAttend(1, len(ids))))
    noise, divergent = Noise(request.params.seed or 0, shared=True), 0
    for i in got.unverified:
        position = len(request.prompt) + i
        p = process(logits[position - 1 : position], [got.ids[:i]], request.params)[0]
        divergent += draw_token(p, noise, position) != got.ids[i]
    return divergent


@pytest.mark.parametrize("class_name", ["pooled", "lame", "stranger"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"frequency_penalty": 0.7}])
def test_everything_emitted_is_audited(class_name: str, params: dict[str, float]) -> None:
    request = make_request(mode=Mode.ROUTED, class_name=class_name, threshold=ALWAYS, max_tokens=40, **params)
    got = decode(make_engine(Options(run_limit=6)), request)[0]
    # The first token and one after each run of six are the full model's own.
    assert got.unverified == [i for i in range(39) if i % 7]
    assert got.ran.unverified == len(got.unverified)
    assert got.ran.divergent == recount(request, got)
    assert got.ran.fallbacks == 0
    if class_name == "stranger":
        assert got.ran.divergent > 8


def test_without_a_seed_the_expected_divergence_counts() -> None:
    engine = make_engine(Options(seed=1))
    request = make_request(mode=Mode.ROUTED, threshold=ALWAYS, max_tokens=60, temperature=1.0)
    good, bad = decode(engine, request, replace(request, class_name="stranger"))
    assert 0 < good.ran.divergent / good.ran.unverified < 0.2
    assert bad.ran.divergent / bad.ran.unverified > 0.4
    assert bad.ran.divergent != int(bad.ran.divergent)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}])
def test_nothing_is_sure_enough(params: dict[str, float]) -> None:
    request = make_request(class_name="lame", max_tokens=30, **params)
    options = Options(draft_length=3, seed=4)
    exact = decode(make_engine(options), request)[0]
    routed = decode(make_engine(options), replace(request, mode=Mode.ROUTED, threshold=NEVER))[0]
    assert routed.outcome == exact.outcome
    assert routed.ran.unverified == 0
    assert routed.ran.fallbacks == routed.ran.drafts


def test_held_from_the_first_unsure_token_on() -> None:
    request = make_request(mode=Mode.ROUTED, threshold=0.05, max_tokens=60)
    got = decode(make_engine(), request)[0]
    assert 0 < got.ran.unverified < got.ran.accepted
    assert got.ran.fallbacks > 0
    assert got.ran.divergent == recount(request, got)


def test_end_of_text_is_always_settled() -> None:
    """The harness fails on an end before its full pass; here nearly every token would be one."""
    request = make_request(mode=Mode.ROUTED, threshold=ALWAYS, temperature=1.0, max_tokens=40)
    finishes = []
    for seed in range(6):
        stop_ids = range(seed, 300, 20)
        seeded = replace(request, params=replace(request.params, seed=seed))
        got = decode(make_engine(stop_ids=stop_ids), seeded)[0]
        assert not set(stop_ids) & {got.ids[i] for i in got.unverified}
        assert not set(stop_ids) & set(got.ids[:-1])
        finishes.append(got.finish)
    assert "stop" in finishes


def test_stop_strings_are_always_settled() -> None:
    request = make_request(mode=Mode.ROUTED, threshold=ALWAYS, max_tokens=60)
    engine = make_engine(Options(run_limit=50))
    text = decode(engine, request)[0].text
    for start in range(0, len(text) - 2, 5):
        stop = text[start : start + 2]
        got = decode(engine, replace(request, stop=(stop,)))[0]
        assert stop not in got.text
        assert len(got.ids) - 1 not in got.unverified
        if got.finish == "stop":
            assert text.startswith(got.text)


def test_routed_beside_exact() -> None:
    """What one text emits unverified must not reach another's."""
    exact = make_request([5, 6], max_tokens=30, temperature=1.0, seed=9)
    routed = make_request(mode=Mode.ROUTED, threshold=ALWAYS, class_name="stranger", max_tokens=30)
    alone = decode(make_engine(), exact)[0]
    assert decode(make_engine(), routed, exact)[1].outcome == alone.outcome
