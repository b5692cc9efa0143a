"""From a folder to an engine that answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.build import Placement, build_engine, count_blocks, reload_drafts
from server.engine.options import Options
from server.engine.request import Mode
from strace import native
from strace.checkpoint import BadCheckpoint
from strace.kv import block_bytes
from strace.runner import FULL
from strace.subgraph import BadSubgraph
from tests.server.engine.harness import decode, drain, load, make_request, submit
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


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_full_model_is_what_exact_means(tmp_path: Path, dtype: str) -> None:
    engine, _ = build_engine(str(save_tiny(tmp_path)), placement=replace(SMALL, dtype=dtype))
    full = engine.runner.graphs[FULL]
    assert {layer.mlp.down.format for layer in full.layers} | {full.head.format} == {dtype}
    requests = [make_request(mode=mode, class_name=None, max_tokens=40) for mode in (Mode.FULL, Mode.EXACT)]
    plain, exact = decode(engine, *requests)
    assert exact.outcome == plain.outcome
    assert plain.outcome != decode(build_engine(str(tmp_path), placement=SMALL)[0], requests[0])[0].outcome


def test_drafts_are_read_again(tmp_path: Path) -> None:
    """A folder that cannot be read changes nothing; nor do drafts that are other than before change a text."""
    model = str(save_tiny(tmp_path / "model"))
    engine, checkpoint = build_engine(model, placement=SMALL, options=Options(draft_length=3))
    request = make_request(list(range(70)), class_name=None, max_tokens=40, temperature=1.0, seed=2)
    (before,) = decode(engine, request)
    runner = engine.runner
    with pytest.raises(BadSubgraph, match="nowhere"):
        reload_drafts(engine, checkpoint, tmp_path / "nowhere", SMALL)
    got = submit(engine, request)
    engine.step()
    done = reload_drafts(engine, checkpoint, None, SMALL)
    assert engine.runner is runner
    drain(engine)
    assert done.done()
    assert engine.runner is not runner
    assert engine.runner.cache is runner.cache
    assert got.outcome == before.outcome
    assert got.ran.cached_tokens == 64
    save_tiny(tmp_path / "model", seed=1)
    with pytest.raises(BadCheckpoint, match="have changed"):
        reload_drafts(engine, checkpoint, None, SMALL)
