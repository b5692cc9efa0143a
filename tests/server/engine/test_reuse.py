"""Blocks that texts share, and blocks that they lose: neither changes a token or a bit of a log-probability."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.options import Options
from server.engine.request import Mode, Request
from strace import native
from strace.sampling import SamplingParams
from tests.server.engine.harness import decode, drain, make_engine, make_request, make_runner, submit

NATIVE = pytest.mark.skipif(not native.available(), reason=str(native.why_unavailable()))
LONG = [(7 * i) % 251 for i in range(110)]

alike = st.builds(
    Request,
    id=st.just("r"),
    prompt=st.builds(lambda n, own: LONG[:n] + own, st.integers(20, 110), st.lists(st.integers(0, 255), min_size=1)),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 9),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
    ),
    max_tokens=st.integers(8, 60),
    mode=st.sampled_from([Mode.EXACT, Mode.FULL]),
    class_name=st.sampled_from(["pooled", "stranger"]),
    logprobs=st.just(1),
    prompt_logprobs=st.booleans(),
)


@NATIVE
@settings(max_examples=20, derandomize=True)
@given(batch=st.lists(alike, min_size=2, max_size=5), blocks=st.sampled_from([8, 64]))
def test_shared_or_lost_blocks_change_no_bit(batch: list[Request], blocks: int) -> None:
    """Three rounds over one pool, which is large enough, or so small that texts lose their blocks, against each text
    alone, read whole."""
    runner = make_runner(blocks=64, kind="native")
    batch = [replace(r, prompt=r.prompt[: 250 - r.max_tokens]) for r in batch]
    plain = Options(prefix_cache=False)
    alone = [decode(make_engine(plain, runner=runner), replace(request, mode=Mode.FULL))[0] for request in batch]
    engine = make_engine(Options(chunk=40, seed=0), runner=make_runner(blocks=blocks, kind="native"))
    for _ in range(3):
        for got, expected in zip(decode(engine, *batch), alone, strict=True):
            assert got.outcome == expected.outcome
            assert got.logprobs == expected.logprobs
            told, known = ([t for u in g.updates for t in u.prompt_logprobs] for g in (got, expected))
            assert told == known


def test_what_is_reused() -> None:
    """Whole blocks, and never the last token, whose row the next one follows from."""
    engine = make_engine()
    for prompt, cached in ((LONG[:64], 0), (LONG[:64], 32), (LONG[:65], 64), (LONG[:40] + [9] * 40, 32), ([9] * 40, 0)):
        (got,) = decode(engine, make_request(prompt, max_tokens=4))
        assert got.ran.cached_tokens == cached
    request = make_request(LONG[:65], max_tokens=4)
    (told,) = decode(engine, replace(request, logprobs=0, prompt_logprobs=True))
    assert told.ran.cached_tokens == 0
    (off,) = decode(make_engine(Options(prefix_cache=False)), request)
    assert off.outcome == decode(engine, request)[0].outcome


def test_a_block_is_reused_only_behind_what_it_was_read_behind() -> None:
    engine, x, y, z = make_engine(), LONG[:32], LONG[40:72], LONG[70:102]
    for prompt, cached in ((x + y + [1], 0), (z + x + [1], 0), (z + y + [1], 32)):
        (got,) = decode(engine, make_request(prompt, max_tokens=4))
        assert got.ran.cached_tokens == cached


def test_the_answer_is_reused_with_its_question() -> None:
    engine = make_engine()
    (first,) = decode(engine, make_request(LONG[:50], max_tokens=40))
    (second,) = decode(engine, make_request(LONG[:50] + first.ids + [7, 8], max_tokens=4))
    assert second.ran.cached_tokens == 64


def test_answers_to_one_prompt_share_it() -> None:
    """They are asked for at once; those that are read later find what the first has read."""
    engine = make_engine(Options(chunk=110, seed=1))
    got = decode(engine, *[make_request(LONG, max_tokens=6, temperature=1.0)] * 4)
    assert [g.ran.cached_tokens for g in got] == [0, 96, 96, 96]


def test_a_cache_full_of_idle_blocks_serves_on() -> None:
    engine = make_engine(blocks=4)
    for start in range(6):
        (got,) = decode(engine, make_request(LONG[start : start + 90], max_tokens=20))
        assert len(got.ids) == 20


def test_one_shared_beginning_is_held_once() -> None:
    """Eight texts of four blocks each, three of them common, run side by side over a cache of twelve."""
    engine = make_engine(blocks=12)
    decode(engine, make_request(LONG[:97], max_tokens=1))
    got = [submit(engine, make_request([*LONG[:96], i, 1], max_tokens=10)) for i in range(8)]
    engine.step()
    assert engine.stats().running == 8
    assert engine.stats().blocks_used == 11
    drain(engine)
    assert not any(g.ran.preemptions or g.errors for g in got)
