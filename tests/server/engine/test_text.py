"""Text from tokens: whole characters, stop strings over token borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.engine.text import Text
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer().backend_tokenizer


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def stream(text: Text, tokens: list[int]) -> list[str]:
    """What each token made showable, up to a stop string; then what the end did."""
    pieces = []
    for token in tokens:
        stopped = text.push(token)
        pieces.append(text.take())
        if stopped:
            break
    return [*pieces, text.take(final=True)]


def test_characters_are_never_split() -> None:
    assert [piece for piece in stream(Text(TOKENIZER, []), encode("aß日🎉")) if piece] == ["a", "ß", "日", "🎉"]


def test_an_unfinished_character_is_dropped_at_the_end() -> None:
    assert "".join(stream(Text(TOKENIZER, []), encode("ab日")[:-1])) == "ab"


@pytest.mark.parametrize("cut", [1, 2])
def test_a_prompt_that_ends_within_a_character(cut: int) -> None:
    tokens = encode("xy日")
    assert "x" not in "".join(stream(Text(TOKENIZER, tokens[:-cut]), tokens[-cut:] + encode("z")))


def test_what_may_become_a_stop_string_is_held_back() -> None:
    text = Text(TOKENIZER, [], ("STOP",))
    assert stream(text, encode("aSTOx")) == ["a", "", "", "", "STOx", ""]
    assert stream(Text(TOKENIZER, [], ("STOP",)), encode("aST")) == ["a", "", "", "ST"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_cut_before_the_stop_string_that_is_complete_first(content: str, stop: list[str]) -> None:
    ends = [content.find(s) + len(s) for s in stop if s in content]
    starts = [content.find(s) for s in stop if s in content and content.find(s) + len(s) == min(ends)]
    text = Text(TOKENIZER, [], tuple(stop))
    pieces = stream(text, encode(content))
    assert "".join(pieces) == (content[: min(starts)] if ends else content)
    assert text.stopped == bool(ends)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(0, 9))
def test_stop_strings_complete_too_early_are_text(content: str, stop: list[str], least: int) -> None:
    """Each letter is a token, so a stop string counts from where it would end behind the `least`th."""
    hits = [(i + len(s), i) for s in stop for i in range(len(content)) if content.startswith(s, i)]
    end, _ = min(((end, i) for end, i in hits if end > least), default=(None, 0))
    text = Text(TOKENIZER, [], tuple(stop), least=least)
    pieces = stream(text, encode(content))
    assert "".join(pieces) == (content if end is None else content[: min(i for e, i in hits if e == end)])
    assert text.stopped == (end is not None)


@given(st.text(max_size=12), st.text(min_size=1, max_size=2))
def test_looking_ahead_changes_nothing(content: str, stop: str) -> None:
    text = Text(TOKENIZER, [], (stop,))
    for token in encode(content):
        ahead = text.completes_stop(token)
        assert ahead == text.completes_stop(token) == text.push(token)
        if ahead:
            break


def test_the_prompt_decides_about_a_leading_space() -> None:
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1}, unk_token="▁the"))
    words.decoder = decoders.Metaspace()
    assert "".join(stream(Text(words, [0]), [1])) == " cat"
    assert "".join(stream(Text(words, []), [1])) == "cat"
