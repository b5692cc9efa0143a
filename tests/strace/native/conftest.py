"""Tests of the native runner need its library."""

from __future__ import annotations

import pytest

from strace import native


@pytest.fixture(autouse=True)
def library() -> None:
    if reason := native.why_unavailable():
        pytest.skip(reason)
