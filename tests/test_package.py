"""What the wheel holds: both packages, the native library, the embedded model and its subgraphs, within the promised
size; and that a machine without a compiler gets all but the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST = 90_000_000
CODE = ["strace", "server"]
EMBEDDED = ["model", "subgraphs"]
NATIVE, LIBRARY = "strace/native/", "strace/native/libstrace_native.so"


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of this checkout, built without the network."""
    settings = {"build-dir": str(folder / "build")} if environment else {}
    build = f"from scikit_build_core.build import build_wheel; build_wheel({str(folder)!r}, {settings!r})"
    # CMake and Ninja lie beside this Python where the system has none.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    everything = os.environ | {"PATH": path} | environment
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, env=everything, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def run_from(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as the wheel has it, in a folder of its own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    start = "import sys; from server.cli import main; sys.exit(main())"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *packages]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", start, *arguments]  # without site, whose editable install would come first
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def files_under(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, caches left out."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def expected_files() -> set[str]:
    """All but the native library: of the folder of its sources, what Python reads."""
    expected = {f"{package}/{name}" for package in CODE for name in files_under(ROOT / package)}
    expected = {name for name in expected if not name.startswith(NATIVE) or name.endswith(".py")}
    for part in EMBEDDED:
        names = files_under(ROOT / "models" / "embedded" / part)
        assert names, f"models/embedded/{part} is empty"
        expected |= {f"strace/embedded/{part}/{name}" for name in names}
    return expected


def test_wheel_holds_packages_library_and_embedded_model(wheel: Path) -> None:
    assert files_of(wheel) == expected_files() | {LIBRARY}
    assert wheel.name.split("-")[2:4] == ["py3", "none"]


def test_without_a_compiler_all_but_the_library_is_installed(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert files_of(wheel) == expected_files()
    assert wheel.name.endswith("py3-none-any.whl")
    ran = run_from(wheel, tmp_path / "installed", "generate", "Once upon", "--max-tokens", "2")
    said = [line for line in ran.stderr.splitlines() if "torch serves" in line]
    assert len(said) == 1, ran.stderr
    assert "native runner not built" in said[0]
    assert ran.stdout.strip()


def test_what_the_wheel_holds_decodes_with_its_native_runner(wheel: Path, tmp_path: Path) -> None:
    ran = run_from(wheel, tmp_path, "generate", "Once upon", "--max-tokens", "2")
    assert ran.stdout.strip()
    assert "torch serves" not in ran.stderr


def test_wheel_is_within_its_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= LARGEST
