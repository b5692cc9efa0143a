"""`analyze` on tiny models: what its rows say, that a stopped run goes on, and how bad input is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

from strace import analyze
from strace.ablate import CONTROLS, Selection, Selections, run_masked
from strace.analyze import (
    MANIFEST,
    PARTS,
    ROWS,
    Analyst,
    BadAnalysis,
    Options,
    read_manifest,
    read_parts,
    read_states,
    read_texts,
    write_rows,
)
from strace.extract import Traces, count_edges
from strace.importance import draw_weights, weigh_edges
from strace.metrics import entropy, ordered_nucleus
from strace.paper import app
from tests.tiny import VARIANTS, save_tiny, save_variant

SIZES = (1e-3, 1e-2, 0.1, 0.5, 1.0)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "bright",
    "stars",
    "fall",
    "down",
]
runner = CliRunner()


def write_prompts(path: Path, count: int = 4) -> Path:
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(count)]
    path.write_text("\n".join(json.dumps({"text": text, "source": str(i)}) for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model: Path, tmp_path: Path) -> Options:
    return Options(str(model), write_prompts(tmp_path / "p.jsonl"), tmp_path / "out", words=4, sizes=SIZES, limit=3)


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A finished analysis, which no test may change."""
    here = tmp_path_factory.mktemp("done")
    options = Options(str(model), write_prompts(here / "p.jsonl"), here / "out", words=4, sizes=SIZES, limit=3)
    run(options)
    return options


@pytest.fixture
def copied(done: Options, tmp_path: Path) -> Options:
    """A finished analysis, to be damaged."""
    copytree(done.prompts.parent, tmp_path / "copy")
    return replace(done, prompts=tmp_path / "copy" / done.prompts.name, output=tmp_path / "copy" / "out")


def run(options: Options) -> Analyst:
    analyst = Analyst(options)
    list(analyst.run())
    return analyst


def test_every_prompt_has_its_rows_and_they_add_up(done: Options) -> None:
    analyst, parts = Analyst(done), read_parts(done.output)
    assert [part.text for part in parts] == [" ".join(WORDS[i : i + 4]) for i in range(3)]
    spec = analyst.checkpoint.spec
    for part in parts:
        assert part.edges == count_edges(spec.layers, spec.heads, part.tokens)
        assert [(row.control, row.size) for row in part.rows] == [(c, s) for c in CONTROLS for s in SIZES]
        held = torch.tensor(part.attention).sum((1, 2)) + torch.tensor(part.mlp).sum(1)
        assert (held + torch.tensor(part.residual).sum(1)).tolist() == part.counts
        whole = {row.control: row for row in part.rows if row.size == 1}
        assert whole["trace"].tv < 1e-4
        assert whole["trace"].top1
        assert whole["random"].tv < 1e-4
        assert whole["inverse"].edges == 0
        assert part.cosine[-1] == pytest.approx([1.0] * spec.layers, abs=1e-4)
        assert part.distance[-1] == pytest.approx([0.0] * spec.layers, abs=1e-3)
        assert part.macs == sorted(part.macs)
        attention, mlp = sum(map(sum, part.attention[-1])), sum(part.mlp[-1])
        assert part.macs[-1] == 2 * spec.head_dim * attention + 3 * spec.hidden * spec.mlp * mlp
        states = read_states(done.output, part.index)
        assert states.shape == (len(SIZES) + 1, spec.hidden)
        assert torch.allclose(states[-2], states[-1], atol=1e-3)
        with torch.inference_mode():
            p = analyst.decoder.logits(states[-1:])[0].softmax(-1)
        assert part.entropy == pytest.approx(float(entropy(p)), abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_analyzed(tmp_path: Path, variant: str) -> None:
    model, prompts = save_variant(tmp_path / "model", variant), write_prompts(tmp_path / "p.jsonl")
    options = Options(str(model), prompts, tmp_path / "out", words=4, sizes=(0.01, 0.3, 1.0), limit=2)
    spec = run(options).checkpoint.spec
    assert read_manifest(options.output).shape.steps == spec.steps == (3 if spec.parallel else 6)
    for part in read_parts(options.output):
        unwindowed = count_edges(spec.layers, spec.heads, part.tokens, spec.parallel)
        assert (part.edges < unwindowed) == any(window and window < part.tokens for window in spec.window)
        assert [len(residual) for residual in part.residual] == [spec.steps] * 3
        whole = {row.control: row for row in part.rows if row.size == 1}
        assert max(whole["trace"].tv, whole["random"].tv) < 1e-4
        assert whole["inverse"].edges == 0
        assert part.rows[0].tv > 1e-3


def test_a_row_says_what_its_masked_run_gives(done: Options) -> None:
    """Every control's TV, likeliest token and nucleus, from edge sets made here and run one at a time."""
    analyst, part = Analyst(done), read_parts(done.output)[1]
    tokens, spec = analyst.tokens[1], analyst.checkpoint.spec
    traces = Traces(weigh_edges(analyst.decoder, tokens))
    random = Traces(draw_weights(spec, len(tokens), (1, done.seed, 1)))
    p = run_masked(analyst.decoder, tokens, None).logits[0].softmax(-1)
    agreeing = set()
    for i, row in enumerate(part.rows):
        count = part.counts[i % len(SIZES)]
        q = run_masked(
            analyst.decoder, tokens, Selections(traces, random, [Selection(row.control, count)])
        ).logits.softmax(-1)
        assert row.tv == pytest.approx(float((p - q[0]).abs().sum() / 2), abs=1e-4)
        assert row.top1 == (int(p.argmax()) == int(q[0].argmax()))
        assert row.nucleus == ordered_nucleus(p, q)[0]
        agreeing.add(row.top1)
    assert agreeing == {True, False}


def test_the_corpus_is_counted_token_by_token(done: Options, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("aab\nca\n")
    counts = Analyst(replace(done, unigrams=corpus, output=tmp_path / "out")).corpus
    ids = Analyst(done).checkpoint.tokenizer("abc")["input_ids"]
    assert counts[ids].tolist() == [3, 1, 1]
    assert int(counts.sum()) == 5


def test_rows_are_one_json_object_per_masked_run(done: Options) -> None:
    write_rows(done.output, read_parts(done.output))
    rows = [json.loads(line) for line in (done.output / ROWS).read_text().splitlines()]
    assert len(rows) == 3 * len(CONTROLS) * len(SIZES)
    assert {row["model"] for row in rows} == {done.model}
    assert all(("macs" in row) == (row["control"] == "trace") for row in rows)


def test_a_stopped_run_goes_on_and_comes_to_the_same(options: Options, done: Options) -> None:
    stopped = Analyst(options).run()
    assert next(stopped) == 0
    stopped.close()
    first = (options.output / PARTS / "00000.json").read_bytes()
    assert list(Analyst(options).run()) == [1, 2]
    assert (options.output / PARTS / "00000.json").read_bytes() == first
    for one, other in zip(read_parts(options.output), read_parts(done.output), strict=True):
        assert one.model_copy(update={"seconds": {}}) == other.model_copy(update={"seconds": {}})
    assert list(Analyst(replace(options, limit=4)).run()) == [3]


def test_processes_of_accelerate_share_the_prompts(done: Options, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--no_python", sys.executable, "-c", "from strace.paper import app; app()", "analyze", done.model]
    command += ["--prompts", str(done.prompts), "-o", str(tmp_path), "--words", "4", "--limit", "3"]
    command += ["--sizes", ",".join(map(str, SIZES))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report in") == 1
    folder = tmp_path / Path(done.model).name
    for one, other in zip(read_parts(folder), read_parts(done.output), strict=True):
        assert one.counts == other.counts
        assert [row.tv for row in one.rows] == pytest.approx([row.tv for row in other.rows], abs=1e-5)
    written = [json.loads(line)["prompt"] for line in (folder / ROWS).read_text().splitlines()]
    assert sorted(set(written)) == [0, 1, 2]


def test_every_process_takes_its_own_share(done: Options) -> None:
    analyst = Analyst(done)
    shares = []
    for process in range(2):
        analyst.state.num_processes, analyst.state.process_index = 2, process  # as accelerate would set them
        with analyst.state.split_between_processes([0, 1, 2]) as mine:
            shares.append(list(mine))
    analyst.state._reset_state()
    assert sorted(shares[0] + shares[1]) == [0, 1, 2]
    assert all(shares)


def test_means_and_other_measures_change_the_runs_and_not_the_graph(done: Options, tmp_path: Path) -> None:
    plain = read_parts(done.output)[:1]
    for change in ({"ablation": "mean"}, {"importance": "ifr"}, {"importance": "random"}):
        other = replace(done, output=tmp_path / "-".join(change.values()), limit=1, **change)
        run(other)
        changed = read_parts(other.output)
        assert [p.counts for p in changed] == [p.counts for p in plain]
        assert [r.tv for r in changed[0].rows] != [r.tv for r in plain[0].rows]
        assert changed[0].rows[len(SIZES) - 1].tv < 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"words": 3}, "words 4, not 3"),
        ({"sizes": (0.5, 1.0)}, "sizes"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"importance": "ifr"}, "importance l1, not ifr"),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused(done: Options, change: dict[str, object], named: str) -> None:
    with pytest.raises(BadAnalysis, match=named):
        Analyst(replace(done, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["{", "{}", '{"index": 0}', None])
def test_a_broken_part_is_named_and_the_others_kept(copied: Options, damage: str | None) -> None:
    broken = copied.output / PARTS / "00001.json"
    content = broken.read_text()
    broken.write_text(content[: len(content) // 2] if damage is None else damage)
    with pytest.raises(BadAnalysis, match=r"00001\.json is broken .*delete it and run again"):
        Analyst(copied).finished()
    broken.unlink()
    assert list(Analyst(copied).run()) == [1]


def test_broken_states_and_a_changed_prompt_file_are_named(copied: Options) -> None:
    states = copied.output / PARTS / "00002.safetensors"
    content = states.read_bytes()
    states.write_bytes(content[:20])
    with pytest.raises(BadAnalysis, match=r"00002\.json is broken"):
        Analyst(copied).finished()
    states.write_bytes(content)
    copied.prompts.write_text(copied.prompts.read_text().replace("quick", "slow"))
    with pytest.raises(BadAnalysis, match=r"unigram_hash|another text"):
        Analyst(copied).finished()


def test_a_part_of_another_model_or_settings_is_named(copied: Options, done: Options, tmp_path: Path) -> None:
    other = replace(done, output=tmp_path / "other", seed=1, limit=2)
    run(other)
    for kind in ("json", "safetensors"):
        (copied.output / PARTS / f"00001.{kind}").write_bytes((other.output / PARTS / f"00001.{kind}").read_bytes())
    with pytest.raises(BadAnalysis, match=r"00001\.json is of an analysis with another model or settings"):
        Analyst(copied).finished()


def test_nothing_half_written_stays(done: Options) -> None:
    names = {path.name for path in (done.output / PARTS).iterdir()}
    assert names == {f"{i:05}.{kind}" for i in range(3) for kind in ("json", "safetensors")}
    assert {(done.output / PARTS / name).stat().st_mode & 0o777 for name in names} == {
        done.prompts.stat().st_mode & 0o777
    }


@pytest.mark.parametrize("sizes", [(), (0.0, 0.5), (0.5, 1.5), (-1.0,), (0.5, 0.1), (0.1, 0.1)])
def test_bad_sizes_are_refused(options: Options, sizes: tuple[float, ...]) -> None:
    with pytest.raises(BadAnalysis, match=r"size"):
        Analyst(replace(options, sizes=sizes))
    assert not options.output.exists()


def test_texts_are_cut_to_their_first_words_with_their_own_spacing(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("  one  two\tthree four\n\nfive six seven\n")
    texts = read_texts(path, 3)
    assert [(e.line, e.text) for e in texts.excerpts] == [(1, "one  two\tthree"), (3, "five six seven")]
    path.write_text("one two three\nfour five\n")
    assert [e.line for e in read_texts(path, 3, skip_short=True).excerpts] == [1]


def test_a_line_separator_inside_json_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two three"}, ensure_ascii=False), encoding="utf-8")
    assert [e.text for e in read_texts(path, 3).excerpts] == ["one\u2028two three"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", "one two three\nfour five\n", r"a\.txt:2: 2 words, but prompts of 3"),
        ("a.jsonl", "{", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": 3}', r"a\.jsonl:1: needs an object with text or prompt"),
        ("a.jsonl", "[]", "needs an object"),
        ("missing.txt", None, "cannot read prompts"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, name: str, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadAnalysis, match=named):
        read_texts(tmp_path / name, 3)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 80)
    with pytest.raises(BadAnalysis, match=r"long\.txt:1: \d+ tokens, the model's context is 256"):
        Analyst(replace(options, prompts=path, words=80))


def test_the_command_writes_rows_a_manifest_and_the_report(options: Options, model: Path, tmp_path: Path) -> None:
    arguments = ["analyze", str(model), "--prompts", str(options.prompts), "-o", str(tmp_path / "study")]
    arguments += ["--words", "4", "--sizes", "0.5,0.01,1", "--limit", "2"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    folder = tmp_path / "study" / model.name
    assert read_manifest(folder).settings.sizes == [0.01, 0.5, 1.0]
    assert (folder / ROWS).exists()
    again = runner.invoke(app, [*arguments, "--words", "3"])
    assert again.exit_code == 1
    assert "was made with words 4, not 3" in again.output


@pytest.mark.parametrize(
    ("changed", "code", "named"),
    [
        (["--sizes", "0.5,2"], 2, "outside (0, 1]"),
        (["--sizes", "0"], 2, "outside (0, 1]"),
        (["--sizes", "half"], 2, "could not convert"),
        (["--words", "99"], 1, f"{len(WORDS)} words, but prompts of 99"),
        (["--importance", "l2"], 2, "unknown importance 'l2'"),
        (["--ablation", "noise"], 2, "unknown ablation 'noise'"),
        (["--format", "int4"], 2, "unknown format 'int4'"),
        (["-o", "/dev/null/study"], 1, "cannot write to /dev/null/study"),
    ],
)
def test_the_command_names_what_is_wrong(
    options: Options, model: Path, changed: list[str], code: int, named: str
) -> None:
    arguments = ["analyze", str(model), "--prompts", str(options.prompts), "-o", str(options.output), "--words", "4"]
    result = runner.invoke(app, arguments + changed)
    assert result.exit_code == code
    assert named in result.output
    assert not (options.output / model.name).exists()


def arguments_of(options: Options) -> list[str]:
    """The command line of some options, its report's folder above theirs."""
    given = ["analyze", options.model, "--prompts", str(options.prompts), "-o", str(options.output.parent / "study")]
    return [*given, "--words", "4", "--limit", "3", "--sizes", ",".join(map(str, SIZES))]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "the quick brown fox\nthe quick\n", "a.txt:2: 2 words, but prompts of 4 were asked for"),
        (
            "a.jsonl",
            '{"text": "the quick brown fox"}\n{"title": "the lazy dog"}',
            "a.jsonl:2: needs an object with text",
        ),
        ("a.jsonl", '{"text": "the quick', "a.jsonl:1: not JSON"),
    ],
)
def test_the_command_names_a_bad_prompt(options: Options, tmp_path: Path, name: str, content: str, named: str) -> None:
    (tmp_path / name).write_text(content)
    result = runner.invoke(app, arguments_of(replace(options, prompts=tmp_path / name)))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert not (tmp_path / "study").exists()


def test_after_a_full_disk_or_a_broken_part_the_command_keeps_what_is_finished(
    options: Options, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, parts = analyze.save_file, options.output.parent / "study" / model.name / PARTS

    def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00001" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(tensors, path)

    monkeypatch.setattr(analyze, "save_file", fill)
    result = runner.invoke(app, arguments_of(options))
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert sorted(path.name for path in parts.iterdir()) == ["00000.json", "00000.safetensors"]
    monkeypatch.undo()
    (parts / "00001.json").write_text("{")
    first = (parts / "00000.json").read_bytes()
    result = runner.invoke(app, arguments_of(options))
    assert result.exit_code == 1
    assert "00001.json is broken" in result.stderr
    assert "delete it and run again" in result.stderr
    (parts / "00001.json").unlink()
    result = runner.invoke(app, arguments_of(options))
    assert result.exit_code == 0, result.output
    assert (parts / "00000.json").read_bytes() == first
    assert len(read_parts(parts.parent)) == 3


def test_two_models_are_compared_by_the_command(options: Options, model: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "gpt_neox", seed=3)
    shared = replace(options, prompts=write_prompts(tmp_path / "q.jsonl", 7))
    result = runner.invoke(app, [*arguments_of(shared), str(other), "--limit", "7"])
    assert result.exit_code == 0, result.output
    study = tmp_path / "study"
    densities = []
    for name in (model.name, "other"):
        rows = [json.loads(line) for line in (study / name / ROWS).read_text().splitlines()]
        densities.append([row["density"] for row in rows if row["control"] == "trace" and row["size"] == 1])
    found = spearmanr(*densities).statistic
    page = re.sub(r"<[^>]+>", " ", (study / "report.html").read_text(encoding="utf-8"))
    assert re.search(rf"{model.name}, other\s+{found:.3f}\s+-?[\d.]+ to -?[\d.]+\s+7", page)
    assert (study / "figures" / "comparison.png").exists()


def test_the_command_names_an_unknown_model(options: Options) -> None:
    result = runner.invoke(app, ["analyze", "./nowhere", "--prompts", str(options.prompts), "-o", "x", "--words", "4"])
    assert result.exit_code == 1
    assert "cannot read model './nowhere'" in result.output


def test_a_broken_manifest_is_named(copied: Options) -> None:
    (copied.output / MANIFEST).write_text("{")
    with pytest.raises(BadAnalysis, match=r"cannot read .*manifest\.json"):
        Analyst(copied)
