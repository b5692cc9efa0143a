"""Cutting and dealing prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from select_prompts import LONGEST, SHORTEST, select, split


@given(st.lists(st.sampled_from(["word", "\n", "\n\n", ". ", " ", "x" * 2000]), max_size=400).map("".join))
def test_pieces_are_short_and_lose_nothing(text: str) -> None:
    pieces = list(split(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= LONGEST for piece in pieces)


def test_a_paragraph_border_wins_over_a_later_line_border() -> None:
    paragraph, line = "a" * 800 + "\n\n", "b" * 300 + "\n"
    assert next(split(paragraph + line + "c" * 1000)) == paragraph
    assert next(split("a" * 800 + "\n" + "b b " * 400)) == "a" * 800 + "\n"


def test_prompts_are_dealt_round_the_sources(tmp_path: Path) -> None:
    """One large source must not crowd out the small ones; a text occurs once; both limits hold."""
    large = [{"source": "large", "text": f"{n} " + "word " * 1000} for n in range(20)]
    small = [{"source": f"small-{n}", "text": f"{n}" * SHORTEST} for n in range(4)]
    twice = [{"source": "copy", "text": "0" * SHORTEST}]
    path = tmp_path / "facts.calib.jsonl"
    path.write_text("".join(json.dumps(unit) + "\n" for unit in large + small + twice))
    chosen = select(path, openings_only=False, units=8, size=10**6)
    assert Counter(p["source"] for p in chosen)["large"] == 4
    assert len({p["text"] for p in chosen}) == len(chosen) == 8
    assert len(select(path, openings_only=False, units=8, size=3 * SHORTEST)) < 4
    assert select(path, openings_only=False, units=8, size=10**6) == chosen


def test_openings_only_gives_the_start_of_each_unit(tmp_path: Path) -> None:
    path = tmp_path / "chat.calib.jsonl"
    path.write_text("".join(json.dumps({"source": f"{n}", "text": f"{n} " + "word " * 1000}) + "\n" for n in range(5)))
    chosen = select(path, openings_only=True, units=99, size=10**6)
    assert sorted(p["text"][:2] for p in chosen) == ["0 ", "1 ", "2 ", "3 ", "4 "]
