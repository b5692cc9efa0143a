"""Files and folders take their place whole, or not at all."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from strace.files import file_beside, folder_beside, write_beside

Beside = Callable[[Path], AbstractContextManager[Path]]


def test_a_text_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "zwölf"):
        write_beside(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_new_file_whoever_writes_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with file_beside(tmp_path / "a.safetensors") as beside:
        save_file({"x": np.zeros(1)}, beside)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_replaces_what_was_there_and_a_leftover(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    for name in ("one", "two"):
        leftover = path.with_name(".a.partial")
        leftover.mkdir(parents=True)
        (leftover / "old").touch()
        with folder_beside(path) as beside:
            (beside / name).touch()
        assert [child.name for child in path.iterdir()] == [name]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("beside", [file_beside, folder_beside])
def test_after_an_error_the_old_one_stays_and_nothing_else(tmp_path: Path, beside: Beside) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), beside(path):
        raise KeyError
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_full_disk_is_told_as_an_oserror_whoever_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match=r"cannot write .*file: .*No space left"), file_beside(path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 64 KiB: a disk that fills up in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_tensors(path: Path) -> None:
    with file_beside(path) as beside:
        save_file({"x": np.zeros(1 << 17, np.uint8)}, beside)


def write_folder(path: Path) -> None:
    with folder_beside(path) as beside:
        (beside / "small").write_text("fits")
        write_tensors(beside / "large")


@pytest.mark.parametrize(
    "write",
    [write_tensors, write_folder, lambda path: write_beside(path, "x" * (1 << 17))],
    ids=["file", "folder", "text"],
)
@pytest.mark.usefixtures("small_files")
def test_what_does_not_fit_leaves_what_was_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(OSError, match="File too large"):
        write(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
