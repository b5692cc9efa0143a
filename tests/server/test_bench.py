"""`strace-llm bench`: what it times, what it counts, when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import bench
from server.bench import Bench, Row, Timed, compare_modes, cut_prompt, spread, summarise
from server.cli import app
from server.engine.build import Placement
from server.engine.request import Mode, Ran
from strace.costs import Case
from strace.runner import FULL
from strace.sampling import SamplingParams
from tests.tiny import save_tiny

PROMPT = list(range(30, 60))
GREEDY = SamplingParams(0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=299)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Bench:
    return Bench(str(tiny), placement=Placement(dtype="fp32"))


def test_text_is_timed_token_by_token(engine: Bench) -> None:
    text = engine.generate(PROMPT, 12, Mode.FULL, GREEDY)
    assert len(text.ids) == len(text.times) == 12
    assert text.times == sorted(text.times)
    assert text.decoded == 11
    assert text.seconds > 0


def test_full_mode_reads_the_model_once_per_token(engine: Bench) -> None:
    text = engine.generate(PROMPT, 12, Mode.FULL, GREEDY)
    assert engine.bytes_read(text) == 11 * engine.engine.runner.graphs[FULL].bytes_per_step


def test_drafts_are_read_too(engine: Bench) -> None:
    ran = Ran(Mode.EXACT, "pooled", prompt_tokens=9, tokens=12, drafted=8, accepted=6)
    graphs = engine.engine.runner.graphs
    read = 5 * graphs[FULL].bytes_per_step + 8 * graphs["pooled"].bytes_per_step
    assert engine.bytes_read(Timed([], [], ran)) == read


def test_modes_are_compared_on_the_same_prompts(engine: Bench) -> None:
    rows = compare_modes(engine, {"a": [PROMPT], "b": [PROMPT[::-1], PROMPT]}, rounds=2, tokens=6, params=GREEDY)
    assert list(rows) == [Mode.FULL, Mode.EXACT, Mode.ROUTED]
    assert all(len(row.rates) == 2 for row in rows.values())
    assert rows[Mode.FULL].drafted == 0


def test_summary_takes_paired_ratios() -> None:
    full, exact = Row([10.0, 20.0, 40.0], bytes=100, seconds=2), Row([20.0, 40.0, 20.0], 8, 6, bytes=50, seconds=1)
    first, second = summarise({Mode.FULL: full, Mode.EXACT: exact}, bandwidth=500.0)
    assert (first["tokens_per_s"], first["ms"], first["bandwidth_share"], first["acceptance"]) == (20, 50, 0.1, None)
    assert (second["speedup"], second["acceptance"]) == (2, 0.75)


def test_passes_of_full_model_and_draft_are_timed(engine: Bench) -> None:
    rows = engine.time_passes([Case(2, 1, 16)], rounds=1)
    assert {row["graph"] for row in rows} == {FULL, "pooled"}
    assert all(row["seconds"] > 0 < row["bytes"] for row in rows)


def test_spread_and_prompt() -> None:
    assert spread([1, 2, 3]) == 0
    assert spread([10, 10, 10, 10]) == 0
    assert spread([8, 9, 10, 11, 12]) == pytest.approx(0.15)
    assert [len(cut_prompt(list(range(n)))) for n in (9, 30, 90, 9000)] == [9, 16, 30, 256]


def test_refuses_beside_another_job(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "busy_share", lambda: 0.5)
    done = CliRunner().invoke(app, ["bench", str(tiny)])
    assert done.exit_code == 1
    assert "another job uses 50%" in done.stderr
    assert not done.stdout


def test_command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "busy_share", lambda: 0.0)
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 1e9)
    prompts = [{"text": f"{i} " * 40, "source": str(i)} for i in range(9)]
    (tmp_path / "code.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    options = ["--prompts", str(tmp_path), "--rounds", "1", "--tokens", "4", "--dtype", "fp32", "--temperature", "0"]
    done = CliRunner().invoke(app, ["bench", str(tiny), *options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["mode"] for row in found["results"]] == ["full", "exact", "routed"]
    assert found["results"][0]["tokens_per_s"] > 0
    done = CliRunner().invoke(app, ["bench", str(tiny), *options])
    assert "routed" in done.stdout
