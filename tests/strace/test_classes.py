"""Prompt classes: what is read and refused, how sources are kept apart, which class a prompt is said to be of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace.classes import (
    POOLED,
    BadPrompts,
    Classifier,
    Prompt,
    read_prompts,
    shipped_prompts,
    split_classes,
)


def write(folder: Path, name: str, records: Sequence[object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return folder


def records(count: int, tag: str = "t") -> list[dict[str, str]]:
    return [{"text": f"{tag} {i}", "source": f"{tag}-{i // 2}"} for i in range(count)]


def test_both_formats_are_read(tmp_path: Path) -> None:
    write(tmp_path, "code.jsonl", [*records(8), {"prompt": "no source"}, "", {"text": "t 0", "source": "again"}])
    write(tmp_path, "prose.txt", [f"a paragraph {i}\nof two lines\n\n" for i in range(9)])
    write(tmp_path, "NOTICES.txt", ["about the folder"])
    classes = read_prompts(tmp_path)
    assert list(classes) == ["code", "prose"]
    assert len(classes["code"]) == 9
    assert classes["code"][8] == Prompt("no source", "no source")
    assert classes["prose"][3].text == "a paragraph 3\nof two lines"
    assert list(read_prompts(tmp_path, ["prose"])) == ["prose"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("code.jsonl", [*records(8), "{broken"], r"code\.jsonl:9: not JSON"),
        ("code.jsonl", [*records(8), {"txet": "a"}], r"code\.jsonl:9: needs an object with either text or prompt"),
        ("code.jsonl", [*records(8), {"text": "a", "prompt": "b"}], r"code\.jsonl:9: needs an object with either"),
        ("code.jsonl", [*records(8), ["a"]], r"code\.jsonl:9: needs an object"),
        ("code.jsonl", [*records(8), {"text": "a", "sorce": "b"}], r"code\.jsonl:9: unknown field sorce"),
        ("code.jsonl", [*records(8), {"text": " "}], r"code\.jsonl:9: text must be a string that is not empty"),
        ("code.jsonl", [*records(8), {"text": 3}], r"code\.jsonl:9: text must be a string"),
        ("code.jsonl", [*records(8), {"text": "a", "source": 3}], r"code\.jsonl:9: .*source a string"),
        ("code.jsonl", [], r"code\.jsonl holds no prompt"),
        ("code.txt", ["\n\n \n"], r"code\.txt holds no prompt"),
        ("code.jsonl", records(7), r"has 7 different prompts of 4 sources.* at least 8 of 3"),
        ("code.jsonl", [{"text": str(i), "source": "one"} for i in range(20)], r"20 different prompts of 1 sources"),
        ("code.jsonl", records(4) * 5, r"has 4 different prompts"),
        ("pooled.jsonl", records(8), r"class name 'pooled' is reserved"),
        ("full.txt", records(8), r"class name 'full' is reserved"),
        ("exact.txt", records(8), r"class name 'exact' is reserved"),
        ("Co de.jsonl", records(8), r"class name 'Co de' is not lower-case"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, name: str, content: list[object], message: str) -> None:
    with pytest.raises(BadPrompts, match=message):
        read_prompts(write(tmp_path, name, content))


def test_folders_and_classes_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match=r"no prompt folder .*nowhere"):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(BadPrompts, match=r"has no CLASS\.jsonl and no CLASS\.txt"):
        read_prompts(tmp_path)
    write(tmp_path, "code.jsonl", records(8))
    with pytest.raises(BadPrompts, match="has no class math; it has code"):
        read_prompts(tmp_path, ["math"])
    write(tmp_path, "code.txt", ["a"])
    with pytest.raises(BadPrompts, match=r"both as \.jsonl and as \.txt"):
        read_prompts(tmp_path)
    (tmp_path / "code.txt").unlink()
    (tmp_path / "code.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadPrompts, match="cannot read"):
        read_prompts(tmp_path)


def test_a_text_in_two_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "code.jsonl", records(8))
    write(tmp_path, "math.jsonl", [*records(8, "m"), {"text": "t 5"}])
    with pytest.raises(BadPrompts, match="same text is in the classes code and math: 't 5'"):
        read_prompts(tmp_path)


prompts = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 10**6)), min_size=8, max_size=60, unique_by=lambda p: p[1]
)


@given(prompts.filter(lambda ps: len({s for s, _ in ps}) >= 3), st.integers(0, 5))
def test_parts_share_no_source_and_lose_no_prompt(drawn: list[tuple[int, int]], seed: int) -> None:
    made = [Prompt(str(text), f"source {source}") for source, text in drawn]
    parts = split_classes({"a": made}, seed)["a"]
    uses = [parts.fit, parts.choose, parts.report]
    sources = [{p.source for p in use} for use in uses]
    assert all(sources)
    assert not sources[0] & sources[1]
    assert not sources[0] & sources[2]
    assert not sources[1] & sources[2]
    assert sorted(p.text for use in uses for p in use) == sorted(p.text for p in made)


def test_a_source_that_two_classes_share_lies_in_one_part() -> None:
    a = [Prompt(f"a{i}", f"s{i}") for i in range(30)]
    b = [Prompt(f"b{i}", f"s{i}") for i in range(20, 50)]
    split = split_classes({"a": a, "b": b})
    pooled = split[POOLED]
    assert len(pooled.fit) + len(pooled.choose) + len(pooled.report) == 60
    for one, other in ((pooled.fit, pooled.choose), (pooled.fit, pooled.report), (pooled.choose, pooled.report)):
        assert not {p.source for p in one} & {p.source for p in other}
    assert 0.5 < len(split["a"].fit) / 30 < 0.8


def test_a_split_depends_on_the_seed_only() -> None:
    a = [Prompt(f"a{i}", f"s{i}") for i in range(40)]
    assert split_classes({"a": a}, 1) == split_classes({"a": a}, 1)
    assert split_classes({"a": a}, 1) != split_classes({"a": a}, 2)


def test_the_shipped_prompts_can_be_read_and_split() -> None:
    split = split_classes(read_prompts(shipped_prompts()))
    assert sorted(split) == ["chat", "code", "facts", "math", POOLED, "stories"]
    assert all(len(parts.report) >= 20 for parts in split.values())


def draw(rng: np.random.Generator, low: int, count: int) -> list[list[int]]:
    """Prompts of tokens from [low, low + 40) and some common to all."""
    return [rng.choice([*range(low, low + 40), *range(20)], 60).tolist() for _ in range(count)]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_classifier_tells_classes_and_admits_doubt(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b", "c"][:classes]
    fitted = Classifier.fit({n: draw(rng, 40 * (i + 1), 30) for i, n in enumerate(names)}, 300)
    for i, name in enumerate(names):
        assert [fitted.choose(ids) for ids in draw(rng, 40 * (i + 1), 20)] == [name] * 20
    common = [rng.choice(20, 60).tolist() for _ in range(20)]
    assert sum(fitted.choose(ids) == POOLED for ids in common) > 10
    assert fitted.choose([]) == POOLED
    assert fitted.probabilities([41, 42]).sum() == pytest.approx(1)
    fitted.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert loaded.names == tuple(names)
    assert np.array_equal(loaded.weights, fitted.weights)
    assert [loaded.choose(ids) for ids in common] == [fitted.choose(ids) for ids in common]


def test_one_class_alone_cannot_be_told_from_others() -> None:
    assert Classifier.fit({"a": [[1, 2, 3]]}, 10).choose([1, 2, 3]) == POOLED


def test_a_classifier_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the classifier .*classifier\.safetensors"):
        Classifier.load(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot read the classifier"):
        Classifier.load(tmp_path)
