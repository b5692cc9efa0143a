"""Classes found in a log: the texts that belong together, and names that a folder can bear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strace.classes import NAME, RESERVED, BadPrompts, Prompt, read_prompts
from strace.cluster import cluster_prompts, name_clusters, save_clusters

TOPICS = {
    "kitchen": ["bake", "bread", "oven", "flour", "butter", "sugar", "kitchen", "stir", "recipe", "dough"],
    "sea": ["sail", "harbour", "anchor", "storm", "captain", "vessel", "tide", "wave", "crew", "mast"],
    "court": ["judge", "law", "verdict", "witness", "trial", "jury", "appeal", "lawyer", "evidence", "oath"],
}


def make_log(topics: int = 3, each: int = 20) -> list[Prompt]:
    rng = np.random.default_rng(0)
    texts = [
        " ".join(rng.choice([*words, "the", "and", "of"], 25))
        for words in list(TOPICS.values())[:topics]
        for _ in range(each)
    ]
    return [Prompt(texts[i], f"s{i}", f"log:{i}") for i in rng.permutation(len(texts))]


@pytest.mark.parametrize("asked", [None, 3])
def test_texts_of_one_kind_come_together_under_their_words(asked: int | None) -> None:
    found = cluster_prompts(make_log(), asked)
    assert len(found.classes) == 3
    assert found.silhouette > 0.3
    for name, prompts in found.classes.items():
        assert len(prompts) == 20
        [topic] = [words for words in TOPICS.values() if set(words) & set(prompts[0].text.split())]
        assert set(name.split("-")) <= set(topic)
        assert all(set(p.text.split()) <= {*topic, "the", "and", "of"} for p in prompts)
    assert cluster_prompts(make_log(), asked) == found


def test_fewer_or_more_clusters_can_be_asked_for() -> None:
    assert len(cluster_prompts(make_log(), 2).classes) == 2
    assert sum(map(len, cluster_prompts(make_log(), 5).classes.values())) == 60


@pytest.mark.parametrize(
    ("log", "asked", "message"),
    [
        (make_log()[:15], None, "15 different prompts make no two classes of at least 8"),
        (make_log(), 9, "60 different prompts make 2 to 7 classes of at least 8, not 9"),
        ([Prompt(f"{i}" * 3, f"{i}") for i in range(40)], None, "no words in common"),
        (
            [Prompt(p.text, "one") for p in make_log()],
            None,
            "every number of clusters leaves one with less than 8 .* 3 so",
        ),
    ],
)
def test_a_log_that_makes_no_classes_is_told_why(log: list[Prompt], asked: int | None, message: str) -> None:
    with pytest.raises(BadPrompts, match=message):
        cluster_prompts(log, asked)


@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 4), min_size=5, max_size=20),
    st.integers(0, 99),
)
def test_any_words_give_names_that_a_folder_can_bear(words: list[str], labels: list[int], seed: int) -> None:
    _, labels_ = np.unique([*labels, 0, 1], return_inverse=True)
    names = name_clusters(np.random.default_rng(seed).random((len(labels_), len(words))), words, labels_)
    assert len(set(names)) == len(names) == labels_.max() + 1
    assert all(NAME.fullmatch(name) and name not in RESERVED for name in names)


def test_what_was_found_can_be_read_again(tmp_path: Path) -> None:
    found = cluster_prompts(make_log())
    assert read_prompts(save_clusters(tmp_path, found)) == found.classes


def test_a_name_is_the_words_that_tell_most() -> None:
    words = ["rare", "common", "telling", "second", "other", "ab1"]
    telling = np.array([[0.1, 0.9, 0.8, 0.5, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0, 0.3, 0.9], [0.0, 0.9, 0.0, 0.0, 0.1, 0.0]])
    assert name_clusters(telling, words, np.array([0, 1, 1])) == ["telling-second", "ab-other"]
    assert name_clusters(0 * telling, words, np.array([0, 1, 1])) == ["cluster", "cluster-2"]
