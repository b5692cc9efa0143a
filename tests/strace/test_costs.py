"""Costs: which cases, in what order, what is taken of several times, what is kept on disk and when it holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from strace import cli, costs, native
from strace.checkpoint import load_decoder, open_checkpoint, quantise_decoder
from strace.cli import app
from strace.costs import (
    SETTLE,
    STEPS,
    Case,
    Cost,
    CostTable,
    Prefill,
    ReadMeter,
    count_blocks,
    count_macs,
    describe_setting,
    draw_curve,
    draw_verifying,
    list_cases,
    load_table,
    measure_costs,
    measure_table,
    save_table,
    text_limit,
)
from strace.draft import Draft, DraftPlan, Held, Verdict
from strace.graphs import RUNNERS, make_runner
from strace.kv import Batch, KVCache, make_cache
from strace.runner import FULL, Runner, TorchRunner
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def make_tiny_runner(model: Path, blocks: int = 16) -> Runner:
    full = load_decoder(open_checkpoint(str(model)), "fp32")
    return make_runner({FULL: full, "pooled": quantise_decoder(full, "int4")}, blocks)


class Timed:
    """A runner on a clock of its own; its first and every seventh full pass are disturbed. log: graph and tokens of
    every pass."""

    def __init__(self) -> None:
        self.now, self.passes = 0.0, 0
        self.graphs = {FULL: SimpleNamespace(spec=SimpleNamespace(vocabulary=3))}
        self.log: list[tuple[str, int]] = []
        self.judged: list[tuple[int, int]] = []
        self.cache = KVCache([torch.zeros(8, 1, 1, 1)], [torch.zeros(8, 1, 1, 1)])

    def clock(self) -> float:
        return self.now

    def forward(self, graph: str, batch: Batch, rows: list[int]) -> Tensor:
        assert max(s + n for s, n in zip(batch.starts, batch.counts, strict=True)) <= batch.tables.shape[1] * 32
        assert int(batch.tables.max()) < self.cache.blocks
        self.passes += 1
        self.log.append((graph, len(batch.tokens)))
        self.now += 0.1 + 0.01 * len(batch.tokens) + (5.0 if self.passes == 1 or self.passes % 7 == 0 else 0.0)
        return torch.zeros(len(rows), 3)

    def draft(self, graph: str, batch: Batch, plan: DraftPlan) -> list[Draft]:
        steps = plan.limits[0].held
        assert max(batch.starts) + steps <= batch.tables.shape[1] * 32
        self.log.append((graph, steps))
        self.now += 0.03 * steps
        return [Draft([0] * steps, [1.0] * steps, None) for _ in batch.counts]

    def verify(self, logits: Tensor, held: Sequence[Held]) -> list[Verdict]:
        self.judged += [(text.row, len(text.tokens)) for text in held]
        self.now += 0.002 * len(logits)
        return [Verdict([*text.tokens, 0], []) for text in held]


CASES = [Case(1, 1, 60), Case(1, 8, 60), Case(4, 1, 60)]


def test_drafts_and_full_passes_alternate() -> None:
    runner = Timed()
    measure_costs(runner, ["code", "math"], CASES, rounds=1, clock=runner.clock)
    passes = [[(FULL, 1)] * 2, [(FULL, 8)], [(FULL, 4)] * 2]  # a pass over one token of each text follows another
    assert runner.log == 2 * [step for full in passes for name in ("code", "math") for step in ((name, STEPS), *full)]
    turn = [(0, 0)] * 2 + [(0, 7)] * 2 + [(0, 0), (1, 0), (2, 0), (3, 0)] * 2
    assert runner.judged == 2 * turn


def test_a_disturbed_pass_does_not_count() -> None:
    runner = Timed()
    found = measure_costs(runner, ["code"], CASES, rounds=10, clock=runner.clock)
    seconds = {(c.graph, c.sequences, c.tokens): c.seconds for c in found}
    assert seconds[FULL, 1, 1] == pytest.approx(0.11)
    assert seconds[FULL, 1, 8] == pytest.approx(0.18)
    assert seconds[FULL, 4, 1] == pytest.approx(0.14)
    assert seconds["code", 4, 1] == seconds["code", 1, 1] == pytest.approx(0.03)
    assert seconds[SETTLE, 1, 8] == pytest.approx(0.016)
    assert draw_verifying(found)[8] == pytest.approx(0.196)


def test_measuring_ends_with_its_rounds_or_its_budget_but_not_before_the_second() -> None:
    for budget, rounds in ((1e9, 8), (0.0, 2), (19.0, 3)):
        runner, shares = Timed(), []
        measure_costs(runner, ["code"], CASES, 8, budget, shares.append, runner.clock)
        assert runner.passes == 5 * (rounds + 1)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx((rounds + 1) / 9)


def test_cases_fit_the_texts_and_a_pass() -> None:
    cases = list_cases(8192)
    assert {c.context for c in cases} == {64, 1024, 4096}
    assert max(c.sequences * c.tokens for c in cases) == 64
    assert Case(16, 4, 1024) in cases
    assert Case(16, 8, 1024) not in cases
    for limit in (64, 100, 1024, 4096):
        assert all(0 < c.context + c.tokens + STEPS <= limit for c in list_cases(limit))
    assert {c.context for c in list_cases(1100)} == {64, 1024, 1100 - 16 - STEPS}
    assert count_blocks(cases) == 16 * 129


def test_curves_are_over_tokens_for_the_full_model_and_over_texts_for_a_draft() -> None:
    table = [
        Cost(FULL, 1, 1, 100, 1.0), Cost(FULL, 1, 1, 300, 2.0), Cost(FULL, 1, 4, 100, 3.0), Cost(FULL, 1, 4, 300, 5.0),
        Cost(FULL, 4, 1, 100, 99.0), Cost("code", 1, 1, 100, 0.5), Cost("code", 4, 1, 100, 0.7),
    ]  # fmt: skip
    assert draw_curve(table, FULL, 200) == {1: 1.5, 4: 4.0}
    assert draw_curve(table, FULL, 10) == {1: 1.0, 4: 3.0}
    assert draw_curve(table, "code", 200) == {1: 0.5, 4: 0.7}


def test_a_table_says_what_was_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 1)  # what the clock says is not checked here
    runner = make_tiny_runner(model)
    table = measure_table(runner, describe_setting(runner, "hash"))
    assert {(c.sequences, c.tokens, c.context) for c in table.costs if c.graph == FULL} == {
        tuple(case) for case in list_cases(256)
    }
    assert {c.sequences for c in table.costs if c.graph == "pooled"} == {1, 4, 16}
    assert min(c.seconds for c in table.costs) > 0
    assert sorted(table.prefill) == [128, 256]
    assert table.bandwidth > 1e8
    assert all(0 < prefill.macs / prefill.seconds < 100 * table.peak for prefill in table.prefill.values())
    graphs = table.setting.graphs
    assert (graphs[FULL].formats, graphs["pooled"].formats) == ("fp32", "int4")
    assert graphs["pooled"].bytes_per_step == runner.graphs["pooled"].bytes_per_step < graphs[FULL].bytes_per_step


def test_memory_is_read_in_every_round() -> None:
    runner, meter = Timed(), ReadMeter(megabytes=4)
    measure_costs(runner, ["code"], CASES, rounds=3, clock=runner.clock, meter=meter)
    assert len(meter.samples) == 4
    assert meter.best == max(meter.samples) > 1e7


def test_multiplications_of_a_prompt_are_those_of_its_products(model: Path) -> None:
    """As torch counts them, to whom attention on the CPU is no product: two over half of a square are."""
    full = load_decoder(open_checkpoint(str(model)), "fp32")
    tokens, runner = 32, TorchRunner({FULL: full}, make_cache(full.spec, 1, torch.float32))
    with FlopCounterMode(display=False) as counted:
        runner.forward(FULL, Batch([0] * tokens, [tokens], [0], torch.tensor([[0]])), [0])
    attention = full.spec.layers * full.spec.heads * full.spec.head_dim * tokens * (tokens + 1)
    assert count_macs(full, tokens) - attention == counted.get_total_flops() / 2


def test_a_small_cache_shortens_the_texts(model: Path) -> None:
    assert text_limit(make_tiny_runner(model, blocks=4)) == 128
    assert text_limit(make_tiny_runner(model, blocks=99)) == 256


def test_a_table_holds_in_its_own_setting_only(model: Path, cache_home: Path) -> None:
    runner = make_tiny_runner(model)
    setting = describe_setting(runner, "hash")
    assert load_table(setting) is None
    table = CostTable(setting, "today", 1e10, [Cost(FULL, 1, 1, 64, 0.1)], {128: Prefill(0.5, 9)}, 2e10)
    path = save_table(table)
    assert path.is_relative_to(cache_home / "strace-llm" / "costs")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_table(setting) == load_table(describe_setting(runner, "hash")) == table
    others = [describe_setting(runner, "other"), replace(setting, threads=99), replace(setting, isa="none")]
    others.append(replace(setting, graphs=setting.graphs | {"code": setting.graphs[FULL]}))
    assert [load_table(other) for other in others] == [None] * 4
    path.write_text(path.read_text()[:-9])
    assert load_table(setting) is None


@pytest.mark.skipif(not native.available(), reason="needs the native runner")
def test_a_table_holds_for_one_build_of_the_kernels(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_tiny_runner(model)
    setting, library = describe_setting(runner, "hash"), native.find_library()
    monkeypatch.setenv("STRACE_NATIVE_LIBRARY", str(tmp_path / "other.so"))
    (tmp_path / "other.so").write_bytes(library.read_bytes())
    assert describe_setting(runner, "hash") == setting
    (tmp_path / "other.so").write_bytes(library.read_bytes() + b"faster")
    assert describe_setting(runner, "hash") != setting


def invoke(*args: str) -> str:
    result = CliRunner().invoke(app, ["measure", *args], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_measure_shows_and_keeps_a_table(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 1)
    first = json.loads(invoke(str(model), "--dtype", "fp32", "--json"))
    assert list(first["setting"]["graphs"]) == [FULL, "pooled"]
    with monkeypatch.context() as patch:
        patch.setattr(cli, "measure_table", None)  # is not called
        assert json.loads(invoke(str(model), "--dtype", "fp32", "--json")) == first
        shown = invoke(str(model), "--dtype", "fp32")
    assert "…" not in shown, "a column does not fit 80 characters"
    assert all(word in shown for word in ("pooled", "fp32", "GB/s", "prefill", first["date"]))
    again = json.loads(invoke(str(model), "--dtype", "fp32", "--json", "--refresh"))
    assert again["setting"] == first["setting"]
    assert again["costs"] != first["costs"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere"], 1, "nowhere"),
        (["--runner", "gpu"], 2, f"unknown runner 'gpu'; choose one of {', '.join(RUNNERS)}"),
        (["--dtype", "int3"], 2, "unknown dtype 'int3'; choose one of auto, fp32, bf16, int8, int4"),
    ],
)
def test_bad_input_exits_with_a_message(args: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["measure", *args])
    assert result.exit_code == code
    assert result.output.startswith("error: ")
    assert message in result.output
