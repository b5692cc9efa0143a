"""The comparison with other engines: its figures, its line-up, and the processes it asks."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import peers
import pytest
import shapes
from lineup import Model, list_entries, open_model
from peers import Round, equal_share, repeated_share, run_rounds, summarise
from transformers import AutoModelForCausalLM, LlamaConfig
from workers import PEERS_PYTHON, start

from strace.checkpoint import open_checkpoint, resolve
from strace.costs import ReadMeter
from strace.gguf import convert
from tests.tiny import save_tiny

PROMPT = list(range(40, 60))


def texts(*many: list[int], seconds: float = 1.0, read: float | None = 100.0) -> Round:
    """A round of texts, one per class, each of so many seconds."""
    made = {
        str(i): {"ids": ids, "decoded": len(ids) - 1, "decode_s": seconds, "prefill_s": 0.5, "bytes": read}
        for i, ids in enumerate(many)
    }
    return Round(made)


def test_equal_share_counts_places_of_the_reference() -> None:
    reference = [texts([1, 2, 3, 4], [5, 6])]
    assert equal_share(reference, reference) == 1
    assert equal_share([texts([1, 2, 9, 4], [5])], reference) == 4 / 6


def test_repeated_share() -> None:
    assert repeated_share([texts(list(range(20)))]) == 0
    assert repeated_share([texts([7] * 20)]) == 1 - 1 / 13
    assert repeated_share([texts([1, 2])]) == 0, "too short to repeat anything"


def test_figures_are_medians_over_rounds() -> None:
    found = {
        "strace full bf16": [texts([0] * 11), texts([0] * 21), texts([0] * 31)],
        "slow": [texts([0] * 6), texts([0] * 11), texts([0] * 11, read=None)],
    }
    row = summarise(found, "strace full bf16", bandwidth=1000.0, judged=True)
    assert (row["tokens_per_s"], row["ms"], row["over_full"]) == (20, 50, 1)
    assert (row["gb_s"], row["bandwidth_share"], row["equal"]) == (0, 0.1, None)
    row = summarise(found, "slow", bandwidth=1000.0, judged=True)
    assert (row["tokens_per_s"], row["over_full"], row["gb_s"]) == (10, 0.5, None)


def test_nothing_guesses_tokens_of_random_weights(tmp_path: Path) -> None:
    made = {
        name: list_entries(Model(name, "folder", tmp_path, (0,), {}), threads=2) for name in ("embedded", "Qwen3-0.6B")
    }
    names = {name: {entry.name for entry in entries} for name, entries in made.items()}
    guessers = names["embedded"] - names["Qwen3-0.6B"]
    assert names["Qwen3-0.6B"] < names["embedded"]
    assert guessers == {n for n in names["embedded"] if "exact" in n or "routed" in n or "lookup" in n}
    processes = {entry.name: entry.process for entry in made["embedded"]}
    assert processes["strace full bf16"] == processes["strace routed subgraphs"] != processes["strace exact int4 draft"]


def test_apart_every_other_engine_meets_ours_alone(tmp_path: Path) -> None:
    entries = list_entries(Model("Qwen3-0.6B", "folder", tmp_path, (0,), {}), threads=2)
    assert peers.list_groups(entries, apart=False) == [entries]
    groups = peers.list_groups(entries, apart=True)
    assert [{entry.engine for entry in group} for group in groups] == [
        {"strace", other} for other in ("transformers", "llama.cpp", "openvino")
    ]
    assert {entry.name for group in groups for entry in group} == {entry.name for entry in entries}
    assert peers.list_groups(groups[0], apart=True) == [groups[0]]


def test_shape_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", LlamaConfig(vocab_size=9000, bos_token_id=0, eos_token_id=0, **sizes))
    folder = shapes.write_shape("tiny", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes.write_shape("tiny", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.spec.vocabulary, checkpoint.spec.layers) == (9000, 2)


def test_engines_take_turns_on_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ReadMeter", partial(ReadMeter, megabytes=4))
    folder = str(save_tiny(tmp_path / "tiny"))
    model = Model("Qwen3-0.6B", folder, tmp_path, (257,), {"random": [PROMPT, PROMPT[::-1]]})
    entries = [entry for entry in list_entries(model, threads=1) if entry.engine in ("strace", "transformers")][::2]
    assert [entry.worker for entry in entries] == ["ours", "huggingface"]
    with start("ours", 1) as ours, start("huggingface", 1) as hugging:
        workers = {entries[0].process: ours, entries[1].process: hugging}
        for entry in entries:
            assert workers[entry.process].ask("load", **entry.load)["bytes_per_step"] > 0
        arguments = argparse.Namespace(rounds=2, tokens=9)
        found, bandwidths = run_rounds(model, entries, workers, arguments, temperature=0.0)
        passes = peers.time_passes(model, entries[0], ours, [(1, 2, 64), (2, 1, 9999)], 1, 1)
        memory = ours.ask("memory")
        with pytest.raises(RuntimeError, match=r"generate: .*mode"):
            ours.ask("generate", prompt=PROMPT, tokens=2, stop=[], temperature=0.0, seed=0)
    assert len(bandwidths) == 2
    for entry in entries:
        assert len(found[entry.name]) == 2, "the round of warm-up is counted"
        for done in found[entry.name]:
            text = done.texts["random"]
            assert len(text["ids"]) == 9 or text["ids"][-1] == 257
            assert text["decoded"] == len(text["ids"]) - 1
            assert text["decode_s"] > 0 < text["bytes"]
    assert equal_share(found[entries[0].name], found[entries[1].name]) > 0.5
    assert {(row["sequences"], row["tokens"], row["context"]) for row in passes} == {(1, 2, 64), (2, 1, 240)}
    assert memory["peak_mb"] >= memory["resident_mb"] > 0


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no .venv-peers: make bench-peers")
def test_llama_cpp_runs_what_was_converted(tmp_path: Path) -> None:
    """The same ids for the same text, and nearly always the same next token: both round to bf16, each in its way."""
    path, model = tmp_path / "embedded.gguf", open_model("embedded", 4)
    convert("embedded", path)
    reference = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    tokenizer = open_checkpoint("embedded").tokenizer
    alike = judged = 0
    with start("llamacpp", 1) as llama:
        llama.ask("load", path=str(path), threads=1, context=1024)
        for prompts in model.prompts.values():
            for ids in prompts:
                text = tokenizer.decode(ids)
                assert llama.ask("tokenize", text=text)["ids"] == tokenizer(text)["input_ids"]
                done = llama.ask("generate", prompt=ids, tokens=24, stop=list(model.stop), temperature=0.0, seed=0)
                both = reference.dummy_inputs["input_ids"].new_tensor([ids + done["ids"]])
                best = reference(both).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
                alike += sum(a == b for a, b in zip(best, done["ids"], strict=True))
                judged += len(best)
    assert alike / judged > 0.97


def test_embedded_folder_is_the_model() -> None:
    assert open_model("embedded", 1).folder == resolve("embedded")
