"""`strace-llm certify`: which prompts it takes, what it writes, that it goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from server import certify as certifying
from server.certify import Asked, certify, find_unseen, read_documents, run_texts
from server.cli import app
from server.engine.build import Placement, build_engine
from server.engine.cost import CostModel
from server.engine.request import Mode
from strace.certificate import Setting
from strace.checkpoint import open_checkpoint
from strace.classes import BadPrompts, read_prompts, split_classes
from strace.classifier import fit_classifier
from strace.losses import Losses
from strace.material import gather_material
from strace.subgraph import read_manifest
from tests.server.engine.harness import decode, make_engine, make_request
from tests.strace.test_subgraph import make as make_subgraph
from tests.strace.test_trace import write_prompts

TOKENS = 8
WHERE = Placement(dtype="bf16", runner="torch", kv_memory=10**7)


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Two thresholds, at one of which nothing and at the other everything is emitted; a risk 24 prompts can certify. No
    step is timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strace.losses.THRESHOLDS", (1.0, 0.0))
        patch.setattr(certifying, "THRESHOLDS", (1.0, 0.0))
        patch.setattr(certifying, "RISKS", (0.02, 0.13))
        patch.setattr(
            "server.engine.build.measure_start",
            lambda runner, _: CostModel({g: {1: 1.0, 8: 1.0} for g in runner.graphs}),
        )
        yield


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """A model with a subgraph for letters; digits go to `pooled`, of which there is no folder."""
    folder, checkpoint, *_ = make_subgraph(tmp_path)
    prompts = write_prompts(tmp_path / "prompts")
    texts = read_prompts(prompts)
    known = {
        name: [(p.source, checkpoint.tokenizer(p.text)["input_ids"]) for p in texts[kind]]
        for name, kind in (("code", "letters"), ("digits", "digits"))
    }
    made = fit_classifier(known, known, checkpoint.spec.vocabulary, tokenizer_hash=checkpoint.tokenizer_hash)
    made.save(folder.parent)
    model = str(tmp_path / "model")
    return Asked(model, folder.parent, prompts, (), (0.0,), TOKENS, placement=WHERE)


def find_table(asked: Asked) -> Path:
    """Where `certify` keeps what it measured."""
    assert asked.subgraphs is not None
    setting = Setting("torch", torch.backends.cpu.get_cpu_capability(), "bf16")
    return setting.path(asked.subgraphs / "code").with_suffix(".safetensors")


def test_measured_certified_and_served(asked: Asked) -> None:
    assert asked.subgraphs is not None
    heard: list[tuple[str, float]] = []
    found, whole = certify(asked, lambda doing, share: heard.append((doing, share)))
    assert whole
    assert list(found) == ["code"]
    assert heard[0] == ("code, T 0, threshold 1", 0.0)
    certificate = found["code"]
    assert certificate.prompts == 24
    losses = Losses.load(find_table(asked))
    assert losses.unverified[losses.threshold == 1].sum() == 0
    assert losses.unverified[losses.threshold == 0].sum() > 0
    strictest = certificate.tested[0]
    assert (strictest.threshold, strictest.divergence) == (1.0, 0.0)
    # Two dozen without loss certify 13 %, not 2 %.
    reasons = {level.risk: level for level in certificate.levels}
    assert (reasons[0.02].threshold, reasons[0.13].threshold) != (None, None)
    assert reasons[0.02].why == "too few documents: 24 of at least 153 needed"

    engine, _ = build_engine(asked.model, asked.subgraphs, placement=WHERE)
    prompt = read_documents(open_checkpoint(asked.model), asked.prompts, asked.subgraphs, 100)
    letters = next(ids for ids in prompt if engine.choose(ids) == "code")
    request = replace(make_request(letters, Mode.ROUTED, TOKENS, class_name=None), risk=0.13)
    (got,) = decode(engine, request)
    assert (got.ran.mode, got.ran.class_name, got.ran.risk) == (Mode.ROUTED, "code", 0.13)
    engine, _ = build_engine(asked.model, asked.subgraphs, placement=replace(WHERE, dtype="fp32"))
    assert decode(engine, request)[0].ran.mode == Mode.EXACT


def test_it_goes_on_where_time_was_up(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked.subgraphs is not None
    whole, _ = certify(asked)
    shutil.rmtree(find_table(asked).parent)
    cut, done = certify(replace(asked, seconds=0.0))
    assert not done
    assert {level.threshold for level in cut["code"].levels} == {None}
    monkeypatch.setattr(certifying, "BETWEEN_SAVES", 5)
    ran: list[int] = []

    def run(engine: Any, requests: Any) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(len(requests))
        return run_texts(engine, requests)

    monkeypatch.setattr(certifying, "run_texts", run)
    with pytest.raises(KeyboardInterrupt):
        certify(asked)
    assert len(Losses.load(find_table(asked)).document) == 15
    monkeypatch.setattr(certifying, "run_texts", lambda e, r: ran.append(len(r)) or run_texts(e, r))
    again, done = certify(asked)
    assert done
    assert sum(ran) == 48
    assert again["code"].tested == whole["code"].tested
    certify(asked)
    assert sum(ran) == 48
    certify(replace(asked, tokens=TOKENS + 1))
    assert sum(ran) == 96


def test_no_looser_threshold_once_every_risk_has_failed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certifying, "RISKS", (0.02, 0.05))
    found, whole = certify(asked)
    assert whole
    assert [tested.threshold for tested in found["code"].tested] == [1.0]


def test_prompts_that_the_trace_used_are_left_out(asked: Asked) -> None:
    """Only what a trace reported on is left of the prompts it was made from; unknown ones are taken as they are."""
    assert asked.subgraphs is not None
    assert asked.prompts is not None
    checkpoint = open_checkpoint(asked.model)
    assert {name: len(own) for name, own in find_unseen(checkpoint, asked.prompts, asked.subgraphs).items()} == {
        "digits": 24,
        "letters": 24,
    }
    split = split_classes(read_prompts(asked.prompts), 0)
    folder = asked.subgraphs / "letters"
    (asked.subgraphs / "code").rename(folder)
    manifest = read_manifest(folder)
    data = gather_material(checkpoint, split["letters"], 0).data
    traced = manifest.model_copy(update={"class_name": "letters", "data": data})
    (folder / "subgraph.json").write_text(traced.model_dump_json(by_alias=True))
    unseen = find_unseen(checkpoint, asked.prompts, asked.subgraphs)
    assert unseen["letters"] == split["letters"].report
    assert len(unseen["digits"]) == 24
    with pytest.raises(ValueError, match="not traced on the prompts shipped"):
        read_documents(checkpoint, None, asked.subgraphs, 100)


def test_one_prompt_of_every_source(asked: Asked, tmp_path: Path) -> None:
    assert asked.subgraphs is not None
    folder = tmp_path / "few"
    folder.mkdir()
    lines = "".join(f'{{"text": "text number {i}", "source": "{i % 4}"}}\n' for i in range(12))
    (folder / "prose.jsonl").write_text(lines)
    documents = read_documents(open_checkpoint(asked.model), folder, asked.subgraphs, 5)
    assert len(documents) == 4
    assert all(len(ids) <= 5 for ids in documents)


def test_a_failed_text_is_no_loss() -> None:
    engine = make_engine()
    engine._decode = lambda running: 1 / 0
    with pytest.raises(ValueError, match="1 texts failed"):
        run_texts(engine, [make_request()])


def test_refused(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no subgraph is served for class poetry; there are code"):
        certify(replace(asked, classes=("poetry",)))
    with pytest.raises(ValueError, match="leave no room"):
        certify(replace(asked, tokens=256))
    with pytest.raises(ValueError, match="no subgraphs to certify"):
        certify(replace(asked, subgraphs=None))
    with pytest.raises(BadPrompts, match="no prompts at"):
        certify(replace(asked, prompts=tmp_path / "none"))


def test_command(asked: Asked) -> None:
    flags = ["--subgraphs", asked.subgraphs, "--prompts", asked.prompts, "--tokens", TOKENS, "--runner", "torch"]
    command = ["certify", asked.model, *flags, "--temperature", 0, "--time-limit", 0]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "code" in result.stdout
    assert "exact" in result.stdout
    assert "time was up" in result.stderr
    result = CliRunner().invoke(app, ["certify", asked.model])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
