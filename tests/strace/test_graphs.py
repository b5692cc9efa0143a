"""Which graphs are served, and what runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from strace.checkpoint import EMBEDDED, embedded_folder
from strace.graphs import choose_dtype, choose_folder, make_runner, open_graphs
from strace.runner import FULL
from tests.tiny import save_tiny


def test_dtype() -> None:
    assert choose_dtype("cpu", "fp32") == "fp32"
    assert choose_dtype("cuda") == "bf16"


def test_only_torch_on_a_cpu_without_bf16_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strace.graphs.cpu_has_bf16", lambda: False)
    monkeypatch.setattr("strace.native.why_unavailable", lambda: None)
    assert choose_dtype("cpu") == choose_dtype("cpu", runner="native") == "bf16"
    assert choose_dtype("cpu", runner="torch") == choose_dtype("auto") == "fp32"
    monkeypatch.setattr("strace.native.why_unavailable", lambda: "no compiler")
    assert choose_dtype("cpu") == "fp32"


def test_only_the_embedded_model_brings_subgraphs() -> None:
    assert choose_folder(EMBEDDED, None) == embedded_folder() / "subgraphs"
    assert choose_folder(EMBEDDED, Path("mine")) == Path("mine")
    assert choose_folder("other", None) is None


def test_a_model_without_subgraphs_drafts_with_its_int4_self(tmp_path: Path) -> None:
    _, graphs = open_graphs(str(save_tiny(tmp_path)), dtype="fp32")
    assert list(graphs) == [FULL, "pooled"]
    assert {graph.head.format for graph in graphs.values()} == {"fp32", "int4"}
    runner = make_runner(graphs, 7, "torch")
    assert runner.graphs == graphs
    assert runner.cache.blocks == 7
    with pytest.raises(ValueError, match="unknown runner 'fast'"):
        make_runner(graphs, 7, "fast")
    with pytest.raises(ValueError, match="compiles on cuda only, not on cpu"):
        make_runner(graphs, 7, compile="on")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_native_runner_serves(tmp_path: Path) -> None:
    """A native library that cannot be loaded must not pass for one that could not be built."""
    _, graphs = open_graphs(str(save_tiny(tmp_path)), dtype="fp32")
    assert make_runner(graphs, 7).name == "native"
