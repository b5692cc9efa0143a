"""Prompt classes: what is read and refused, how sources are kept apart, which class a prompt is said to be of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace.classes import (
    POOLED,
    BadPrompts,
    Prompt,
    _parse_text,
    read_log,
    read_prompts,
    shipped_prompts,
    split_classes,
)

TURN = {"role": "user", "content": "hello"}


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
        (
            "code.jsonl",
            [*records(8), {"txet": "a"}],
            r"code\.jsonl:9: needs an object with one of text, prompt, messages",
        ),
        ("code.jsonl", [*records(8), {"text": "a", "prompt": "b"}], r"code\.jsonl:9: needs an object with one of"),
        ("code.jsonl", [*records(8), ["a"]], r"code\.jsonl:9: needs an object"),
        ("code.jsonl", [*records(8), {"text": "a", "sorce": "b"}], r"code\.jsonl:9: unknown field sorce"),
        ("code.jsonl", [*records(8), {"text": " "}], r"code\.jsonl:9: text must be a string that is not empty"),
        ("code.jsonl", [*records(8), {"text": 3}], r"code\.jsonl:9: text must be a string"),
        ("code.jsonl", [*records(8), {"text": "a", "source": 3}], r"code\.jsonl:9: .*source a string"),
        (
            "code.jsonl",
            [*records(8), {"text": "a", "class": "math"}],
            r"code\.jsonl:9: names the class 'math' in a file",
        ),
        (
            "code.jsonl",
            [*records(8), {"messages": []}],
            r"code\.jsonl:9: messages must be objects with role and content",
        ),
        ("code.jsonl", [*records(8), {"messages": [{"role": "user"}]}], r"code\.jsonl:9: messages must be objects"),
        ("code.jsonl", [*records(8), {"messages": [TURN]}], r"code\.jsonl:9: messages need a model with a chat"),
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
    with pytest.raises(BadPrompts, match=r"no prompts at .*nowhere"):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(BadPrompts, match=r"has no CLASS\.jsonl, no CLASS\.txt and no folder CLASS"):
        read_prompts(tmp_path)
    write(tmp_path, "code.jsonl", records(8))
    with pytest.raises(BadPrompts, match="has no class math; it has code"):
        read_prompts(tmp_path, ["math"])
    write(tmp_path, "code.txt", ["a"])
    with pytest.raises(BadPrompts, match=r"has the class code twice: code\.jsonl and code\.txt"):
        read_prompts(tmp_path)
    (tmp_path / "code.txt").unlink()
    (tmp_path / "code.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadPrompts, match="cannot read"):
        read_prompts(tmp_path)


def test_a_text_in_two_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "code.jsonl", records(8))
    write(tmp_path, "math.jsonl", [*records(8, "m"), {"text": "t 5"}])
    with pytest.raises(
        BadPrompts, match=r"in the classes code \(.*code\.jsonl:6\) and math \(.*math\.jsonl:9\): 't 5'"
    ):
        read_prompts(tmp_path)


def test_a_file_of_labelled_lines_is_read(tmp_path: Path) -> None:
    lines = [r | {"class": name} for name in ("code", "math") for r in records(8, name)]
    place = (
        write(tmp_path, "all.jsonl", [*lines, {"messages": [TURN], "class": "chat"}, *records(7, "more")]) / "all.jsonl"
    )
    classes = read_prompts(place, class_name="chat", write_chat=lambda messages: f"<{messages[0]['content']}>")
    assert {name: len(prompts) for name, prompts in classes.items()} == {"chat": 8, "code": 8, "math": 8}
    assert classes["chat"][0] == Prompt("<hello>", "<hello>")
    assert classes["math"][0].place == f"{place}:9"
    assert list(read_prompts(place, ["math"], "chat", lambda messages: "hello")) == ["math"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "x.jsonl",
            [*records(8), {"text": "a", "class": "Code"}],
            {"class_name": "a"},
            r"x\.jsonl:9: the class name 'Code'",
        ),
        (
            "x.jsonl",
            [*records(8), {"text": "a", "class": "full"}],
            {"class_name": "a"},
            r"x\.jsonl:9: .*'full' is reserved",
        ),
        (
            "x.jsonl",
            [*records(8), {"text": "a", "class": 3}],
            {"class_name": "a"},
            r"x\.jsonl:9: class must be a string",
        ),
        (
            "x.jsonl",
            [*records(8), {"text": "a", "class": "b"}],
            {"class_name": "a"},
            r"x\.jsonl, class b has 1 different",
        ),
        ("x.jsonl", records(8), {}, r"x\.jsonl:1: names no class; say --class NAME"),
        ("x.jsonl", records(8), {"class_name": "pooled"}, r"x\.jsonl: the class name 'pooled' is reserved"),
        ("x.jsonl", [], {"class_name": "a"}, r"x\.jsonl holds no prompt"),
        ("Long Name.txt", ["a", "b"], {}, r"the class name 'Long Name' is not lower-case"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: list[object], options: dict[str, str], message: str
) -> None:
    with pytest.raises(BadPrompts, match=message):
        read_prompts(write(tmp_path, name, content) / name, **options)


def test_a_text_file_holds_lines_or_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("\n".join(f"  line {i} " for i in range(9)) + "\n\n")
    lines = read_prompts(tmp_path / "notes.log")["notes"]
    assert [p.text for p in lines] == [f"  line {i} " for i in range(9)]
    assert lines[8].place.endswith("notes.log:9")
    (tmp_path / "a.txt").write_text("\n".join(f"  head {i}\n\n  \ntail\nof it\n" for i in range(8)))
    paragraphs = read_prompts(tmp_path / "a.txt", class_name="verse")["verse"]
    assert [p.text for p in paragraphs][:3] == ["  head 0", "tail\nof it", "  head 1"]
    assert paragraphs[2].place.endswith("a.txt:7")


def test_a_subfolder_holds_the_documents_of_a_class(tmp_path: Path) -> None:
    code = write(tmp_path, "ignored.md", []) / "code"
    write(code, "more.jsonl", records(4))
    (code / "inner").mkdir()
    (code / ".git").mkdir()
    (code / ".git" / "config").write_bytes(b"\xff")
    for i in range(5):
        (code / "inner" / f"{i}.py").write_text(f"def f{i}():\n\n    pass\n")
    prompts = read_prompts(tmp_path)["code"]
    assert len(prompts) == 9
    assert Prompt("def f3():\n\n    pass", "inner/3.py") in prompts
    with pytest.raises(BadPrompts, match="--class names the class of one file"):
        read_prompts(tmp_path, class_name="code")
    (code / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(BadPrompts, match=r"cannot read .*picture\.png"):
        read_prompts(tmp_path)


def test_a_log_is_read_without_classes(tmp_path: Path) -> None:
    place = write(tmp_path, "log.jsonl", [*records(8), *records(3)])
    assert (
        [p.text for p in read_log(place)]
        == [p.text for p in read_log(place / "log.jsonl")]
        == [f"t {i}" for i in range(8)]
    )
    write(tmp_path, "log.jsonl", [*records(8), {"text": "a", "class": "b"}])
    with pytest.raises(BadPrompts, match=r"log\.jsonl:9: names the class 'b'; leave --classes auto out"):
        read_log(tmp_path)
    write(tmp_path, "log.jsonl", [])
    with pytest.raises(BadPrompts, match="holds no prompt"):
        read_log(tmp_path)
    with pytest.raises(BadPrompts, match="no prompts at"):
        read_log(tmp_path / "nowhere")


@given(st.lists(st.text(), max_size=12), st.sampled_from(["\n", "\n\n", "\n \n"]))
def test_no_word_of_a_text_file_is_lost(parts: list[str], between: str) -> None:
    content = between.join(parts)
    found = list(_parse_text(Path("a.txt"), content))
    assert " ".join(p.text for p in found).split() == content.split()
    assert all(p.text.strip() for p in found)


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
