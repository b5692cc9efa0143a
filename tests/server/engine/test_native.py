"""On the native runner `exact` is `full` to the last token, whatever is decoded beside it and however it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.options import Options
from server.engine.request import Mode, Request
from strace import native
from tests.server.engine.harness import decode, make_engine, make_request, make_runner
from tests.server.engine.test_exact import requests

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_unavailable()))


@settings(max_examples=25, derandomize=True)
@given(
    batch=st.lists(requests, min_size=1, max_size=4),
    length=st.sampled_from([None, 1, 3, 6]),
    stop_ids=st.sets(st.integers(0, 299), max_size=12),
)
def test_same_text_in_any_batch(batch: list[Request], length: int | None, stop_ids: set[int]) -> None:
    """Each text alone by the full model, prompts read whole; then all side by side, with drafts, prompts in chunks."""
    runner = make_runner(kind="native")
    plain = [replace(request, mode=Mode.FULL, class_name=None) for request in batch]
    alone = [decode(make_engine(runner=runner, stop_ids=stop_ids), request)[0] for request in plain]
    engine = make_engine(Options(draft_length=length, chunk=32, seed=0), runner=runner, stop_ids=stop_ids)
    for got, expected in zip(decode(engine, *batch), alone, strict=True):
        assert got.outcome == expected.outcome


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0}, {"frequency_penalty": 0.7}]
)
def test_routed_is_booked_alike(params: dict[str, float]) -> None:
    """Both runners emit, hold and audit the same tokens of the same drafts."""
    options = Options(draft_length=6, seed=4)
    request = make_request(mode=Mode.ROUTED, class_name="lame", threshold=0.05, max_tokens=60, stop=("\x01",), **params)
    native_ran, torch_ran = (
        decode(make_engine(options, runner=make_runner(kind=kind)), request)[0] for kind in ("native", "torch")
    )
    assert native_ran.outcome == torch_ran.outcome
    assert native_ran.unverified == torch_ran.unverified
    assert native_ran.ran.divergent == pytest.approx(torch_ran.ran.divergent, abs=1e-4)
    assert native_ran.ran.accepted_at == torch_ran.ran.accepted_at
