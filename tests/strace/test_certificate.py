"""A certificate holds for what it was measured on, and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace import classifier
from strace.certificate import Certificate, Level, Setting, hash_parts, load_certificates
from strace.subgraph import MANIFEST

SETTING = Setting("native", "avx2", "bf16")
PLACE = "routed/native-avx2-bf16.json"


def make_certificate(
    name: str = "code",
    thresholds: dict[float, float | None] | None = None,
    temperatures: tuple[float, ...] = (0.0,),
    tokens: int = 16,
    **other: object,
) -> Certificate:
    """thresholds: by risk."""
    given = {0.02: 0.9, 0.05: 0.5} if thresholds is None else thresholds
    levels = [
        Level(temperature=at, risk=r, delta=0.05, threshold=t, why="") for at in temperatures for r, t in given.items()
    ]
    settings = {"subgraph": "", "classifier": "", "runner": "native", "isa": "avx2", "dtype": "bf16"} | other
    return Certificate(
        class_name=name,
        created="2026-01-01T00:00:00+00:00",
        processor="",
        tokens=tokens,
        run_limit=32,
        prompts=200,
        levels=levels,
        tested=[],
        **settings,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of subgraphs, as far as certificates look into it, with one in force."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / MANIFEST).write_text("{}")
    (tmp_path / classifier.MANIFEST).write_text("{}")
    make_certificate(**hash_parts(tmp_path, "code")).save(tmp_path / "code")
    return tmp_path


def test_in_force(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_certificates(folder, ["code", "pooled"], SETTING)
    assert found == {"code": make_certificate(**hash_parts(folder, "code"))}
    assert not caplog.records


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "code" / PLACE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (write(f"code/{MANIFEST}", '{"traced": "again"}'), "the subgraph has been made anew"),
        (write(classifier.MANIFEST, '{"fitted": "again"}'), "the classifier has been made anew"),
        (edit(runner="torch"), "measured with runner torch, served is native"),
        (edit(isa="avx512amx"), "measured with isa avx512amx, served is avx2"),
        (edit(dtype="int8"), "measured with dtype int8, served is bf16"),
        (edit(**{"class": "math"}), "of the class 'math'"),
        (edit(schema_version=2), "schema_version"),
        (edit(levels=[{}]), "levels"),
        (edit(tokens=0), "tokens"),
        (edit(luck=1), "luck"),
        (write(f"code/{PLACE}", "{"), "cannot be read"),
        (write(f"code/{PLACE}", "[]"), "valid"),
    ],
)
def test_void(folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], why: str) -> None:
    damage(folder)
    assert load_certificates(folder, ["code"], SETTING) == {}
    (record,) = caplog.records
    assert why in record.getMessage()
    assert str(folder / "code" / PLACE) in record.getMessage()


@pytest.mark.parametrize(
    "other",
    [Setting("native", "avx512amx", "bf16"), Setting("torch", "avx2", "bf16"), Setting("native", "avx2", "fp32")],
)
def test_each_setting_has_a_certificate_of_its_own(
    folder: Path, caplog: pytest.LogCaptureFixture, other: Setting
) -> None:
    """What was measured on one instruction set says nothing of another, whose kernels round in another order."""
    assert load_certificates(folder, ["code", "pooled"], other) == {}
    (record,) = caplog.records
    assert f"nothing for class 'code': served is {other}, certified native-avx2-bf16" in record.getMessage()
    make_certificate(thresholds={0.01: 0.5}, **hash_parts(folder, "code"), **vars(other)).save(folder / "code")
    for setting, risk in ((other, 0.01), (SETTING, 0.02)):
        assert load_certificates(folder, ["code"], setting)["code"].levels[0].risk == risk


@given(st.floats(0.001, 0.999))
def test_the_highest_level_within_the_risk(risk: float) -> None:
    certificate = make_certificate(thresholds={0.01: None, 0.02: 0.9, 0.05: 0.5, 0.1: None})
    level = certificate.find(0.0, risk)
    assert (level.risk if level else None) == (0.05 if risk >= 0.05 else 0.02 if risk >= 0.02 else None)
    assert certificate.find(0.5, risk) is None
    assert certificate.temperatures == [0.0]
    assert make_certificate(thresholds={0.02: None}).temperatures == []
