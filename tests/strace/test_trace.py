"""The pipeline: from a tiny model and prompts to a folder that loads, is finished once, and says what it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from strace import material
from strace import subgraph as stored
from strace import trace as pipeline
from strace.checkpoint import BadCheckpoint, load_decoder, open_checkpoint
from strace.classes import BadPrompts, Parts, Prompt, read_prompts, split_classes
from strace.classifier import Classifier
from strace.decoder import Decoder
from strace.distill import Distilled, distill
from strace.graphs import choose_dtype, load_drafts
from strace.head import measure_mass
from strace.keep import Plan
from strace.linear import Codes, Linear
from strace.material import gather_material
from strace.measure import measure_acceptance
from strace.native_runner import NativeRunner
from strace.onpolicy import Positions, conditional_acceptance
from strace.search import StepCosts
from strace.subgraph import MANIFEST, TENSORS, Manifest, list_unpaying, load_subgraphs, read_manifest
from strace.template import write_chat
from strace.texts import batch_texts
from strace.trace import Options, plan_candidates, trace
from strace.verdict import find_front, judge
from tests.tiny import KINDS, make_tokenizer, random_tokens, save_tiny


def write_prompts(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, alphabet in (("letters", "abcdefgh "), ("digits", "0123456 ")):
        lines = [{"text": "".join(rng.choice(list(alphabet), 70)), "source": f"{name} {i}"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


Traced = tuple[Options, dict[str, Manifest]]
TRACED = choose_dtype("cpu", runner="torch")  # of the full model while it is traced


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with pytest.MonkeyPatch.context() as patch:
        cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
        patch.setattr(pipeline, "price_steps", lambda *_: cheap)
        patch.setattr(pipeline, "WRITTEN", 24)
        yield _trace(tmp_path_factory)


def _trace(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    here = tmp_path_factory.mktemp("traced")
    options = Options(str(save_tiny(here / "model")), here / "out", write_prompts(here / "prompts"), size=0.25)
    return options, trace(options, lambda line: None)


def test_every_class_and_pooled_get_a_folder_that_loads(traced: Traced) -> None:
    options, made = traced
    assert sorted(made) == ["digits", "letters", "pooled"]
    checkpoint = open_checkpoint(options.model)
    full = load_decoder(checkpoint, TRACED)
    graphs = load_subgraphs(options.output, checkpoint, full)
    assert "pooled" in graphs
    assert sorted(graphs) == sorted(name for name, manifest in made.items() if manifest.pays)
    assert Classifier.load(options.output).choose(checkpoint.tokenizer.encode("0123 4560 1234")) == "digits"
    texts = batch_texts([random_tokens(40, seed=s).tolist() for s in range(3)])
    for name, graph in graphs.items():
        assert graph.bytes_per_step == made[name].measured.bytes_per_step
        assert 0.05 < measure_acceptance(full, graph, texts).mean < 1


@pytest.mark.parametrize("family", KINDS)
def test_every_family_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
    monkeypatch.setattr(pipeline, "price_steps", lambda *_: cheap)
    monkeypatch.setattr(pipeline, "WRITTEN", 4)
    monkeypatch.setattr(pipeline, "plan_candidates", lambda *_: [Plan("half", mlp=0.5, coverage=0.9, units="refit")])
    model = str(save_tiny(tmp_path / "model", family))
    prompts = write_prompts(tmp_path / "prompts")
    made = trace(Options(model, tmp_path / "out", prompts, classes=("digits",)), lambda line: None)
    checkpoint = open_checkpoint(model)
    graphs = load_subgraphs(tmp_path / "out", checkpoint, load_decoder(checkpoint, TRACED))
    assert {name: graph.bytes_per_step for name, graph in graphs.items()} == {
        name: manifest.measured.bytes_per_step for name, manifest in made.items()
    }
    assert all(0 < layer.neurons < checkpoint.spec.mlp for layer in made["digits"].kept)


def test_the_manifest_says_what_was_tried_and_what_was_measured(traced: Traced) -> None:
    options, made = traced
    for name, manifest in made.items():
        assert read_manifest(options.output / name) == manifest
        assert any(c.best for c in manifest.candidates)
        assert 1 < len(manifest.candidates) <= len(plan_candidates(options.size, options.format))
        [best] = [c for c in manifest.candidates if c.plan == manifest.plan]
        assert best.speedup >= 0.99 * max(c.speedup for c in manifest.candidates)
        assert best.greedy == max(c.greedy for c in manifest.candidates if c.speedup >= best.speedup)
        assert f"{best.speedup:.2f}" in manifest.why
        assert manifest.measured.bytes_share == best.bytes_share
        # The size bounds the matrices; norms and biases come on top, which is much only in a model as tiny as this.
        assert all(c.bytes_share < 0.25 + 0.05 for c in manifest.candidates)
        assert len(manifest.measured.accepted) == len(manifest.measured.agreement) == 8
        assert manifest.measured.positions == manifest.data["report"].tokens
        assert 0.9 < manifest.measured.coverage <= 1
        assert {d.hash for d in manifest.data.values()} == {d.hash for d in manifest.data.values() if d.tokens > 60}
    assert (
        made["pooled"].data["fit"].prompts == made["letters"].data["fit"].prompts + made["digits"].data["fit"].prompts
    )


def test_a_fit_that_loses_is_not_served(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(full: Decoder, subgraph: Decoder, *rest: object) -> Decoder:
        weight = subgraph.head.weight
        assert isinstance(weight, Codes)
        return replace(subgraph, head=Linear(replace(weight, codes=torch.zeros_like(weight.codes)), None, full.dtype))

    monkeypatch.setattr(pipeline, "fit_head", forget)
    said: list[str] = []
    made = trace(replace(traced[0], output=tmp_path, classes=("digits",)), said.append)["digits"]
    [told] = [line for line in said if line.startswith("digits: fitted on all texts: ")]
    [best] = [c for c in made.candidates if c.plan == made.plan]
    assert np.mean(best.accepted) > 0.1 + float(told.split("accepted ")[1].split(",")[0])
    assert np.mean(made.measured.accepted) > 0.5 * np.mean(best.accepted)


def test_a_finished_class_is_not_made_again_but_a_damaged_one_is(traced: Traced) -> None:
    options, made = traced
    said: list[str] = []
    assert trace(options, said.append) == {}
    assert said == [f"{name}: finished before" for name in ("digits", "letters", "pooled")]
    path = options.output / "digits" / TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    said.clear()
    again = trace(options, said.append)
    assert list(again) == ["digits"]
    assert any("corrupt" in line for line in said)
    # The same recipe gives the same tensors; only the timed costs differ.
    if again["digits"].plan == made["digits"].plan:
        assert again["digits"].tensors_hash == made["digits"].tensors_hash


def test_another_recipe_is_made_again(traced: Traced) -> None:
    options, _ = traced
    checkpoint = open_checkpoint(options.model)
    tracers = [
        pipeline.Tracer(checkpoint, load_decoder(checkpoint, TRACED), o, print)
        for o in (options, Options(options.model, options.output, options.prompts, size=0.3))
    ]
    parts = split_classes(read_prompts(options.prompts))["digits"]
    recipes = [t.recipe(gather_material(checkpoint, parts, seed)) for t in tracers for seed in (0, 1)]
    assert len(set(recipes)) == 4
    assert tracers[0].finished("digits", recipes[0])
    assert not tracers[1].finished("digits", recipes[2])
    assert not (options.output / "none" / MANIFEST).exists()
    assert not tracers[0].finished("none", recipes[0])


def test_without_a_size_several_are_tried() -> None:
    plans = plan_candidates(None, "int8")
    assert len({(p.mlp, p.coverage, p.repaired) for p in plans}) == len(plans) >= 12
    assert len({p.name for p in plans}) == len(plans)
    assert not plans[0].repaired
    assert plans[0].mlp == plans[0].coverage == 1
    assert {p.format for p in plans} == {"int8"}


def try_one(tracer: pipeline.Tracer, said: list[str]) -> None:
    parts = split_classes(read_prompts(tracer.options.prompts))["digits"]
    said.clear()
    tracer.trace_class("digits", gather_material(tracer.checkpoint, parts, tracer.options.seed))


def test_a_trace_cut_off_goes_on_where_it_was(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, made = traced
    said: list[str] = []
    checkpoint = open_checkpoint(options.model)
    full = load_decoder(checkpoint, TRACED)
    tracer = pipeline.Tracer(checkpoint, full, replace(options, output=tmp_path), said.append)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_subgraph", fail)
        with pytest.raises(OSError, match="disk full"):
            try_one(tracer, said)
    assert sum("repairing" in line for line in said) >= 2
    assert not (tmp_path / "digits").exists()
    damaged = sorted((tmp_path / ".work").glob("*/*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    try_one(tracer, said)
    assert sum("repairing" in line for line in said) == 1
    assert not list((tmp_path / ".work").glob("*"))
    assert read_manifest(tmp_path / "digits").tensors_hash == made["digits"].tensors_hash


def test_a_head_that_is_the_embedding_too_is_packed_once_whatever_torch_made_of_it(
    traced: Traced, tmp_path: Path
) -> None:
    model = str(save_tiny(tmp_path / "model", tie_word_embeddings=True))
    checkpoint = open_checkpoint(model)
    tracer = pipeline.Tracer(
        checkpoint, load_decoder(checkpoint, TRACED), replace(traced[0], model=model, runner="native"), print
    )
    packed = []
    for _ in range(2):
        assert isinstance(tracer.runner, NativeRunner)
        packed.append(tracer.runner.packed_bytes)
        tracer.rest()
        measure_mass(tracer.full, batch_texts([random_tokens(40).tolist()]))
    assert packed[0] == packed[1]


def test_what_does_not_pay_is_not_served(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = traced
    dear = StepCosts((2.0, 0.0, 0.0), {1: 1.0, 9: 1.0}, "dear")
    monkeypatch.setattr(pipeline, "price_steps", lambda *_: dear)
    checkpoint = open_checkpoint(options.model)
    full = load_decoder(checkpoint, TRACED)
    try_one(pipeline.Tracer(checkpoint, full, replace(options, output=tmp_path), print), [])
    manifest = read_manifest(tmp_path / "digits")
    assert not manifest.pays
    assert manifest.why.startswith("no subgraph: ")
    assert "below 1.05" in manifest.why
    assert list_unpaying(tmp_path) == {"digits": manifest.why}
    assert load_subgraphs(tmp_path, checkpoint, full) == {}
    assert sorted(load_drafts(checkpoint, full, tmp_path)) == ["pooled"]


def test_a_class_that_does_not_surely_gain_over_pooled_is_drafted_for_by_it(traced: Traced) -> None:
    _, made = traced
    pooled = made["pooled"]
    assert pooled.beside is None
    for name in ("digits", "letters"):
        beside, record = made[name].beside, made[name].candidates[0].model_copy(update={"speedup": 2.0})
        assert beside.pooled == pooled.tensors_hash
        assert beside.sources == made[name].data["report"].sources
        low, high = beside.interval
        assert low <= beside.gain <= high
        assert made[name].pays == (low > 0)
        assert not judge(record, [record], beside.model_copy(update={"interval": (1, 1), "sources": 1}))[0]
        assert f"{beside.gain:+.2f}" in made[name].why
        for interval, pays in (((0.01, 0.2), True), ((0.0, 0.2), False), ((-0.2, -0.1), False)):
            judged, why = judge(record, [record], beside.model_copy(update={"interval": interval}))
            assert judged == pays
            assert why.startswith("no subgraph: ") != pays
            assert why.endswith("which serves as well") != pays


def test_another_pooled_is_compared_anew(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, made = traced
    shutil.copytree(options.output, tmp_path / "out")
    asked, said = replace(options, output=tmp_path / "out"), []
    pooled = read_manifest(asked.output / "pooled")
    stored.save_manifest(asked.output / "pooled", pooled.model_copy(update={"recipe": "another"}))
    stale = made["digits"].beside.model_copy(update={"pooled": "another"})
    doubted = made["digits"].model_copy(update={"beside": stale, "pays": not made["digits"].pays})
    stored.save_manifest(asked.output / "digits", doubted)
    again = trace(asked, said.append)
    assert sorted(again) == ["digits", "pooled"]
    assert again["digits"] == made["digits"]
    assert read_manifest(asked.output / "digits") == made["digits"]
    assert "letters: finished before" in said


def test_where_plain_rounding_is_best_there_is_no_subgraph(traced: Traced) -> None:
    record = traced[1]["digits"].candidates[0].model_copy(update={"speedup": 2.0})
    plain = record.model_copy(update={"plan": replace(record.plan, repaired=False), "speedup": 2.1})
    assert judge(record, [record, plain])[0]
    pays, why = judge(plain, [record, plain])
    assert not pays
    assert "the whole model in int4 needs none" in why


def test_the_front_holds_what_nothing_beats(traced: Traced) -> None:
    record = traced[1]["digits"].candidates[0]
    sizes = [(0.1, 1.2), (0.2, 1.1), (0.2, 1.5), (0.3, 1.5), (0.05, 1.0)]
    records = [record.model_copy(update={"bytes_share": b, "speedup": s}) for b, s in sizes]
    assert find_front(records) == [True, False, True, False, True]


def test_the_table_beside_the_subgraph_gives_what_the_manifest_says(traced: Traced) -> None:
    options, made = traced
    for name, manifest in made.items():
        table = Positions.load(options.output / name)
        assert set(manifest.measured.on_policy) == {"1", "0.7", "0"}
        for temperature, said in manifest.measured.on_policy.items():
            rows = table.at(float(temperature))
            assert said.positions == len(rows) > 0
            assert said.accepted == pytest.approx(conditional_acceptance(rows), abs=1e-5)
            assert 0 <= said.ece <= 1


def test_texts_are_drawn_up_to_the_budget(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = traced
    monkeypatch.setattr(material, "BUDGETS", {"choose": 100, "report": 10**6})
    checkpoint = open_checkpoint(options.model)
    parts = split_classes(read_prompts(options.prompts))["letters"]
    data = gather_material(checkpoint, parts, 0, 200).data
    assert data["fit"].tokens == 210
    assert data["choose"].tokens == 140
    assert data["report"].tokens == 70 * len(parts.report)
    for budget in (200, 10**6):
        data = gather_material(checkpoint, parts, 0, budget).data
        assert gather_material(checkpoint, parts, 0, data["fit"].tokens).data == data, "as certify reads them again"


def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="no prompts at"):
        trace(Options("nowhere", tmp_path / "out", tmp_path / "none"))
    with pytest.raises(BadCheckpoint, match="nowhere"):
        trace(Options(str(tmp_path / "nowhere"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    model = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"size 0\.001 allows 0\.00 MB per step: too little for attention and head"):
        trace(Options(model, tmp_path / "out", write_prompts(tmp_path / "prompts"), size=0.001), lambda line: None)


def test_distilling_goes_on_after_its_last_round(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, made = traced
    checkpoint = open_checkpoint(options.model)
    full = load_decoder(checkpoint, TRACED)
    asked = replace(options, output=tmp_path, distill=10.0)
    said: list[str] = []
    tracer = pipeline.Tracer(checkpoint, full, asked, said.append)
    calls: list[float] = []

    def one_step(*args: Any) -> Distilled:
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        ticks = iter((0.0, 0.0, 400.0))
        return distill(*args[:4], seed=args[4], clock=lambda: next(ticks))

    monkeypatch.setattr(pipeline, "distill", one_step)
    with pytest.raises(KeyboardInterrupt):
        try_one(tracer, said)
    try_one(tracer, said)
    assert calls == [300.0] * 3
    assert sum("round 2 of 2" in line for line in said) == 1
    assert not any("round 1 of 2" in line for line in said)
    assert read_manifest(tmp_path / "digits").recipe != made["digits"].recipe


def full_disk(after: int) -> Callable[..., None]:
    """A stand-in for safetensors' save_file: so many files fit."""
    written = []

    def save(tensors: dict[str, torch.Tensor], path: Path, *rest: object) -> None:
        written.append(path)
        Path(path).write_bytes(b"the part that still fits")
        if len(written) > after:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    return save


@pytest.mark.parametrize("after", [1, 4])
def test_a_disk_that_fills_up_leaves_what_was_done(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    options, made = traced
    asked = replace(options, output=tmp_path / "out")
    said: list[str] = []
    shares: list[float] = []
    cheap = StepCosts((0.0, 0.0, 1e-9), {1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, "a clock of ours")
    monkeypatch.setattr(pipeline, "price_steps", lambda *_: cheap)
    monkeypatch.setattr(pipeline, "WRITTEN", 24)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "save_file", full_disk(after))
        with pytest.raises(OSError, match=r"No space left on device.*the same command goes on there"):
            trace(asked, said.append, shares.append)
    repaired = [line for line in said if "repairing" in line]
    left = {path.name for path in asked.output.rglob("*") if path.is_file()}
    assert not [name for name in left if name.startswith(".") or name.endswith(".partial")]
    finished = [name for name in made if (asked.output / name).exists()]
    for name in finished:
        read_manifest(asked.output / name)
    said.clear()
    again = trace(asked, said.append, shares.append)
    assert {*again, *finished} == {*made}  # what was finished is compared with pooled again
    assert {name: m.tensors_hash for name, m in again.items()} == {name: made[name].tensors_hash for name in again}
    assert len(repaired) > 1
    assert not set(repaired[:-1]) & set(said)
    assert not (asked.output / ".work").exists()
    assert shares[-1] == 1.0


def test_progress_goes_over_all_classes_and_plans(traced: Traced) -> None:
    shares: list[float] = []
    trace(traced[0], lambda line: None, shares.append)
    assert shares == [pytest.approx(share) for share in (1 / 3, 2 / 3, 1)]


def test_what_is_wrong_with_a_class_is_told_before_anything_is_written(tmp_path: Path) -> None:
    model, out = str(save_tiny(tmp_path / "model")), tmp_path / "out"
    lines = [{"text": " ".join(f"word{i}" for i in range(40)) + f" {n}", "source": str(n)} for n in range(12)]
    place = tmp_path / "same.jsonl"
    place.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadPrompts, match="class same: all prompts to choose by repeat those of earlier parts"):
        trace(Options(model, out, place, class_name="same"))
    with pytest.raises(BadPrompts, match="--classes auto finds classes in the prompts of --prompts"):
        trace(Options(model, out, classes=("auto",)))
    place.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n}"}]}) for n in range(12)))
    tokenizer = make_tokenizer(None)
    tokenizer.save_pretrained(model)
    (Path(model) / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(BadPrompts, match=r"same\.jsonl:1: messages need a chat template"):
        trace(Options(model, out, place, class_name="same"))
    assert not out.exists()


def test_conversations_are_written_as_they_are_served(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path)))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    asked, answered = (write_chat(checkpoint, turns[:n]) for n in (1, 2))
    assert asked.endswith("assistant\n")
    assert answered.endswith("ho<|end_of_turn|>")
    checkpoint.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(BadPrompts, match="refuses the messages: no such role"):
        write_chat(checkpoint, turns)


def test_prompts_longer_than_the_context_are_cut_and_told(traced: Traced) -> None:
    options, _ = traced
    checkpoint = open_checkpoint(options.model)
    made = [
        Prompt("".join(chr(97 + (i * j) % 26) for j in range(1, 301)), f"s{i}", f"a.jsonl:{i}") for i in range(1, 4)
    ]
    parts = Parts(made[:1], made[1:2], [*made[2:], Prompt("short enough to be read", "t", "a.jsonl:9")])
    material = gather_material(checkpoint, parts, 0)
    assert material.long == ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3")
    assert max(t.shape[1] for texts in material.texts.values() for t in texts) <= checkpoint.spec.context
