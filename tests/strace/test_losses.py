"""The table of losses: what is in it, what counts as measured, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace.losses import THRESHOLDS, Losses

TABLE = "native-avx2-bf16.safetensors"


def fill(rows: int, temperature: float = 1.0, thresholds: tuple[float, ...] = THRESHOLDS[:2]) -> Losses:
    losses = Losses("key")
    for threshold in thresholds:
        for document in reversed(range(rows)):
            losses.add(document, temperature, threshold, 10, 5, document / 10)
    return losses


def test_thresholds_are_in_the_order_of_the_test() -> None:
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS), reverse=True)


@given(st.permutations(range(5)))
def test_rows_come_by_document_whatever_their_order(order: list[int]) -> None:
    losses = Losses("key")
    for document in order:
        losses.add(document, 0.7, 0.9, 8, 4, document)
        losses.add(document, 0.0, 0.9, 8, 4, 7)
    assert losses.at(0.7, 0.9).loss.tolist() == [d / 8 for d in range(5)]
    assert losses.matrix(0.7, [0.9]).shape == (5, 1)


def test_only_whole_thresholds_count_and_none_behind_a_gap() -> None:
    assert fill(4).measured(1.0, 4) == list(THRESHOLDS[:2])
    assert fill(4).measured(1.0, 5) == []
    assert fill(4).measured(0.0, 4) == []
    assert fill(4, thresholds=THRESHOLDS[1:3]).measured(1.0, 4) == []


def test_saved_and_read(tmp_path: Path) -> None:
    losses = fill(3)
    losses.save(tmp_path / "routed" / TABLE)
    read = Losses.load(tmp_path / "routed" / TABLE)
    assert read.key == "key"
    assert all(np.array_equal(getattr(read, name), getattr(losses, name)) for name in vars(losses) if name != "key")


@pytest.mark.parametrize("content", [None, b"", b"\x10\0\0\0\0\0\0\0nonsense"])
def test_no_table(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / TABLE).write_bytes(content)
    with pytest.raises(ValueError, match=TABLE):
        Losses.load(tmp_path / TABLE)
