"""The prompts that the package and the benchmarks ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED, BENCHMARKS = ROOT / "strace" / "prompts", ROOT / "benchmarks" / "prompts"
CLASSES = ["chat", "code", "facts", "math", "stories"]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("folder", [SHIPPED, BENCHMARKS], ids=["shipped", "benchmarks"])
def test_every_class_has_valid_distinct_prompts(folder: Path) -> None:
    assert sorted(path.stem for path in folder.glob("*.jsonl")) == CLASSES
    texts = []
    for name in CLASSES:
        prompts = read(folder / f"{name}.jsonl")
        assert len(prompts) >= 40
        assert all(set(p) == {"source", "text"} and p["source"] and p["text"].strip() for p in prompts)
        assert all(len(p["text"]) <= 1500 for p in prompts)
        texts += [p["text"] for p in prompts]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", CLASSES)
def test_benchmarks_share_no_source_and_no_text_with_the_shipped(name: str) -> None:
    shipped, benchmarks = read(SHIPPED / f"{name}.jsonl"), read(BENCHMARKS / f"{name}.jsonl")
    for field in ("source", "text"):
        assert not {p[field] for p in shipped} & {p[field] for p in benchmarks}
