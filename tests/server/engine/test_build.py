"""From a folder to an engine that answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.build import Placement, build_engine, count_blocks
from server.engine.options import Options
from server.engine.request import Mode
from strace import native
from strace.checkpoint import BadCheckpoint
from strace.kv import block_bytes
from tests.server.engine.harness import decode, load, make_request
from tests.tiny import save_tiny

SMALL = Placement(dtype="fp32", kv_memory=10**6)


def test_a_model_without_subgraphs_drafts_with_its_int4_self(tmp_path: Path) -> None:
    engine, checkpoint = build_engine(str(save_tiny(tmp_path)), placement=SMALL, options=Options(draft_length=3))
    assert engine.classes == ("pooled",)
    assert (engine.limits.context, engine.limits.vocabulary) == (256, 300)
    assert checkpoint.stop_ids == {257}
    assert engine.cost.v(8) >= engine.cost.v(1) == 1.0
    assert engine.cost.c("pooled") > 0
    request = make_request(class_name=None, max_tokens=20, temperature=1.0, seed=2)
    full, exact = decode(engine, make_request(mode=Mode.FULL, max_tokens=20, temperature=1.0, seed=2), request)
    assert exact.outcome == full.outcome
    assert exact.ran.drafted > 0


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STRACE_NATIVE_LIBRARY", "nowhere.so")
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_torch_serves_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = str(save_tiny(tmp_path))
    assert build_engine(model, placement=SMALL)[0].runner.name == "torch"
    assert [record.message for record in caplog.records] == [f"{native.why_unavailable()}; torch serves, slower"]
    with pytest.raises(ValueError, match="native runner not built"):
        build_engine(model, placement=replace(SMALL, runner="native"))


@pytest.mark.parametrize("kind", ["auto", "native", "torch"])
def test_the_runner_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    if kind != "torch" and not native.available():
        pytest.skip(str(native.why_unavailable()))
    engine, _ = build_engine(str(save_tiny(tmp_path)), placement=replace(SMALL, runner=kind))
    assert engine.runner.name == ("torch" if kind == "torch" else "native")


def test_unknown_model_and_dtype(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="nowhere"):
        build_engine(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="fp8"):
        build_engine(str(save_tiny(tmp_path)), placement=Placement(dtype="fp8"))


def test_blocks_by_memory() -> None:
    size = block_bytes(load().spec, load().dtype)
    assert count_blocks(load(), 10 * size + 1, 16) == 10
    assert count_blocks(load(), 10**12, 16) == 16 * 8
    with pytest.raises(ValueError, match="does not hold one block"):
        count_blocks(load(), size - 1, 16)
