"""Which class a prompt is said to be of: right, sure as it says, silent about strangers, and cheap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace.checkpoint import open_checkpoint
from strace.classes import POOLED
from strace.classifier import (
    LATE,
    MANIFEST,
    NEVER,
    READ,
    TENSORS,
    BadClassifier,
    Classifier,
    Document,
    Frame,
    fit_classifier,
    read_classifier,
)
from strace.template import read_frame
from tests.tiny import save_tiny

NAMES = ("a", "b", "c")


def draw(rng: np.random.Generator, low: int, count: int, tag: str = "", length: int = 60) -> list[Document]:
    """Texts of tokens from [low, low + 40) and some common to all, two from each source."""
    return [
        (f"{tag}{low} {i // 2}", rng.choice([*range(low, low + 40), *range(20)], length).tolist()) for i in range(count)
    ]


def fit(classes: int = 3, **options: object) -> Classifier:
    rng = np.random.default_rng(0)
    known = {n: draw(rng, 40 * (i + 1), 40) for i, n in enumerate(NAMES[:classes])}
    reported = {n: draw(rng, 40 * (i + 1), 20, "apart ") for i, n in enumerate(NAMES[:classes])}
    return fit_classifier(known, reported, 300, tokenizer_hash="t", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted() -> Classifier:
    return fit()


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_told_and_doubt_is_admitted(classes: int) -> None:
    made, rng = fit(classes), np.random.default_rng(1)
    for i, name in enumerate(NAMES[:classes]):
        assert [made.choose(ids) for _, ids in draw(rng, 40 * (i + 1), 100)].count(name) >= 90
    common = [rng.choice(20, 60).tolist() for _ in range(20)]
    assert sum(made.choose(ids) == POOLED for ids in common) > 10
    assert made.choose([]) == POOLED
    assert made.probabilities([41, 42]).sum() == pytest.approx(1)


def test_a_text_of_no_class_goes_to_pooled_however_likely_one_of_them_is(fitted: Classifier) -> None:
    rng = np.random.default_rng(2)
    # Words that no class has, and a few of one class: that class is the likeliest by far.
    strange = [[*rng.choice(range(200, 300), 36).tolist(), *rng.choice(range(40, 80), 24).tolist()] for _ in range(20)]
    assert all(fitted.probabilities(ids).max() > max(fitted.manifest.least) for ids in strange)
    assert {fitted.choose(ids) for ids in strange} == {POOLED}
    assert min(fitted.manifest.strangers.values()) > 0.9
    assert set(fitted.manifest.strangers) == set(NAMES)


def test_the_matrix_counts_every_reported_text(fitted: Classifier) -> None:
    manifest = fitted.manifest
    assert [table.read for table in manifest.confusion] == [
        "the first 8 tokens",
        "the first 32 tokens",
        "the whole text",
    ]
    assert manifest.documents == dict.fromkeys(NAMES, (40, 20))
    for table in manifest.confusion:
        counts = np.array(table.counts)
        assert counts.shape == (3, 4)
        assert (counts.sum(1) == 20).all()
        assert table.answered == pytest.approx(counts[:, :3].sum() / 60)
        assert table.precision == pytest.approx(np.trace(counts[:, :3]) / counts[:, :3].sum())
        assert table.precision >= 0.9
        assert table.ece < 0.15


def test_answers_are_as_often_right_as_stated_where_classes_are_hard_to_tell() -> None:
    rng = np.random.default_rng(0)

    def mixed(name: str, tag: str, count: int) -> list[Document]:
        low = 40 * (NAMES.index(name) + 1)
        odds = rng.uniform(0, 0.3, count)  # tokens of the class; all others are anyone's
        return [
            (
                f"{tag}{name}{i}",
                [int(rng.integers(low, low + 40) if rng.random() < p else rng.integers(40, 160)) for _ in range(40)],
            )
            for i, p in enumerate(odds)
        ]

    made = fit_classifier({n: mixed(n, "", 150) for n in NAMES}, {n: mixed(n, "apart", 150) for n in NAMES}, 300)
    whole = made.manifest.confusion[-1]
    right = sum(made.probabilities(ids).argmax() == i for i, n in enumerate(NAMES) for _, ids in mixed(n, "new", 100))
    assert right / 300 < 0.9
    assert whole.precision > 0.92
    assert 0.05 < whole.answered < 0.95
    assert whole.ece < 0.1


def test_the_cost_is_bounded_and_the_latest_words_count(fitted: Classifier) -> None:
    rng = np.random.default_rng(3)
    [(_, a)], [(_, b)] = draw(rng, 40, 1, length=READ), draw(rng, 80, 1, length=READ)
    assert fitted.choose([*a, *b]) == "b"
    assert fitted.choose([*b, *a]) == "a"
    assert np.array_equal(fitted.probabilities([*a, *b]), fitted.probabilities(b))


def test_a_conversation_that_turns_to_something_else_changes_class(fitted: Classifier) -> None:
    """However much was said before; a last turn that tells nothing leaves the class as it was."""
    rng = np.random.default_rng(4)
    for (_, a), (_, b) in zip(draw(rng, 40, 20, length=4 * LATE), draw(rng, 80, 20, length=LATE), strict=True):
        assert [fitted.choose(ids) for ids in (a, [*a, *b], [*a, *b, *a])] == ["a", "b", "a"]
        assert fitted.choose([*a, *rng.choice(20, LATE).tolist()]) == "a"


@given(st.lists(st.integers(0, 400), max_size=80))
def test_any_ids_get_a_class_or_pooled(fitted: Classifier, ids: list[int]) -> None:
    assert fitted.choose(ids) in (*NAMES, POOLED)
    assert fitted.choose(ids) == fitted.choose(ids[::-1])


def test_ids_that_say_nothing_are_not_read() -> None:
    made = fit(ignored=(290, 291))
    [(_, text)] = draw(np.random.default_rng(4), 40, 1)
    assert made.choose([290, 291] * 20 + text + [290]) == made.choose(text) == "a"
    assert made.choose([290, 291]) == POOLED


def test_a_turn_is_told_as_well_as_its_text() -> None:
    frame = Frame(tuple(range(200, 230)), tuple(range(230, 250)))
    texts = [ids for _, ids in draw(np.random.default_rng(5), 40, 50)]
    told = [[made.choose(frame.around(ids[:20])) for ids in texts].count("a") for made in (fit(frame=frame), fit())]
    assert told[0] > 40 > told[1]


def test_a_class_alone_cannot_be_told_from_others() -> None:
    made = fit(1)
    assert made.manifest.least == [NEVER]
    assert made.choose(draw(np.random.default_rng(0), 40, 1)[0][1]) == POOLED


def test_what_is_saved_is_what_is_loaded(fitted: Classifier, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    loaded = Classifier.load(tmp_path, "t")
    assert loaded.manifest == read_classifier(tmp_path)
    assert loaded.manifest.model_copy(update={"tensors_hash": ""}) == fitted.manifest
    for _, ids in draw(np.random.default_rng(6), 80, 10):
        assert np.array_equal(loaded.probabilities(ids), fitted.probabilities(ids))
        assert loaded.choose(ids) == fitted.choose(ids)


def test_a_classifier_that_cannot_be_used_is_named(fitted: Classifier, tmp_path: Path) -> None:
    with pytest.raises(BadClassifier, match=r"cannot read the classifier .*classifier\.json"):
        Classifier.load(tmp_path)
    fitted.save(tmp_path)
    with pytest.raises(BadClassifier, match="another tokenizer"):
        Classifier.load(tmp_path, "another")
    path = tmp_path / TENSORS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BadClassifier, match=r"classifier\.safetensors is corrupt"):
        Classifier.load(tmp_path)
    path.write_bytes(whole)
    stored = json.loads((tmp_path / MANIFEST).read_text())
    for change, message in (
        ({"names": ["a"]}, "does not fit"),
        ({"schema_version": 2}, "schema_version"),
        ({"odd": 1}, "odd"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps(stored | change))
        with pytest.raises(BadClassifier, match=message):
            Classifier.load(tmp_path)


def test_the_frame_is_what_the_chat_template_adds(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny(tmp_path)))
    ids = checkpoint.tokenizer.encode("hello", add_special_tokens=False)
    turn = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert read_frame(checkpoint).around(ids) == checkpoint.tokenizer.encode(turn, add_special_tokens=False)
    checkpoint.tokenizer.chat_template = None
    assert read_frame(checkpoint) == Frame()
    checkpoint.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert read_frame(checkpoint) == Frame()
