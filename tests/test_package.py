"""What the wheel holds: both packages, the embedded model and its subgraphs, within the promised size."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST = 90_000_000
CODE = ["strace", "server"]
EMBEDDED = ["model", "subgraphs"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from scikit_build_core.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def files_under(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, caches left out."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_packages_and_embedded_model(wheel: Path) -> None:
    expected = {f"{package}/{name}" for package in CODE for name in files_under(ROOT / package)}
    for part in EMBEDDED:
        names = files_under(ROOT / "models" / "embedded" / part)
        assert names, f"models/embedded/{part} is empty"
        expected |= {f"strace/embedded/{part}/{name}" for name in names}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel_is_within_its_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST
