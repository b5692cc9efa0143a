"""Prompts that repeat an earlier part's."""

from __future__ import annotations

from strace.classes import Parts, Prompt
from strace.duplicates import drop_repeats


def test_a_prompt_that_says_the_same_again_is_left_out_whatever_its_source() -> None:
    words = [f"word{i}" for i in range(60)]
    original = Prompt(" ".join(words), "a")
    near = Prompt("Another start. " + "  ".join(words[4:]).upper(), "b")
    half = Prompt(" ".join([*words[:25], *(f"else{i}" for i in range(40))]), "c")
    short, other = Prompt("too short to say", "d"), Prompt("quite another thing", "e")
    found = drop_repeats(Parts([original, short], [near, half, other], [Prompt("Too short  to say", "f"), near]))
    assert found.parts == Parts([original, short], [half, other], [])
    assert found.repeats == {"fit": 0, "choose": 1, "report": 2}
