"""`benchmarks/modes.py`: what is compared is asked the same."""

from __future__ import annotations

import pytest
from modes import run_engine

from server.engine.build import build_engine
from server.engine.options import Options
from server.engine.request import Mode, Request
from strace.sampling import SamplingParams


def test_no_mode_finds_the_prompt_that_another_read() -> None:
    requests = [
        Request(mode, list(range(100, 148)), SamplingParams(0.0), 4, mode=mode) for mode in (Mode.FULL, Mode.EXACT)
    ]
    alone, _ = build_engine("embedded", options=Options(prefix_cache=False))
    full, exact = (run_engine(alone, request)[0] for request in requests)
    assert full == exact
    shared, _ = build_engine("embedded", options=Options(prefix_cache=True))
    run_engine(shared, requests[0])
    with pytest.raises(AssertionError, match="reads the whole prompt"):
        run_engine(shared, requests[1])
