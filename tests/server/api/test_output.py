"""Thoughts, answers and calls are told apart, wherever the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.output import CALL_FORMATS, Call, Reader, Told, find_call_format, put_together

HERMES, MISTRAL, LLAMA = CALL_FORMATS["hermes"], CALL_FORMATS["mistral"], CALL_FORMATS["llama3_json"]
ARGUMENTS = {"city": 'Par}is "x} y"\\', "days": [1, {"a": None}]}
RAW = json.dumps(ARGUMENTS)
ONE = f'{{"name": "weather", "arguments": {RAW}}}'
TWO = '{"name": "time", "arguments": {}}'


def read(reader: Reader, text: str, cuts: Sequence[int] = ()) -> Told:
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])]
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return put_together([*parts, *reader.feed("", final=True)])


def calls(told: Told) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for _, name, arguments in told.calls]


TEXTS = [
    (HERMES, f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>", "Let me see.", 1),
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "", 2),
    (HERMES, f"<tool_call>{ONE}</tool_call>\nDone.", "Done.", 1),
    (HERMES, f'<tool_call>{{"arguments": {RAW}, "name": "weather"}}</tool_call>', "", 1),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", "", 2),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}]", "", 1),
    (MISTRAL, f"[TOOL_CALLS]weather[ARGS]{RAW}[TOOL_CALLS]time[CALL_ID]ab12[ARGS]{{}}", "", 2),
    (LLAMA, ONE.replace("arguments", "parameters"), "", 1),
    (LLAMA, f"\n{ONE}; {TWO}", "", 2),
]


@pytest.mark.parametrize(("form", "text", "answer", "count"), TEXTS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_calls_however_the_text_is_cut(data: st.DataObject, form: Any, text: str, answer: str, count: int) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    told = read(Reader(form), text, cuts)
    assert told.answer == answer
    assert calls(told) == [("weather", ARGUMENTS), ("time", {})][:count]
    assert len({id for id, _, _ in told.calls}) == count


PLAIN = [
    (HERMES, "a < b <tool_"),
    (HERMES, '<tool_call>{"name": 3}'),
    (HERMES, "<tool_call>no call"),
    (MISTRAL, "[TOOL_CALL"),
    (LLAMA, 'well, {"name": "x", "parameters": {}}'),
    (LLAMA, '{"answer": 42} is it'),
    (LLAMA, '{"name": "x"'),
    (None, f"<tool_call>{ONE}</tool_call>"),
]


@pytest.mark.parametrize(("form", "text"), PLAIN)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_no_call_comes_out_as_it_is(data: st.DataObject, form: Any, text: str) -> None:
    told = read(Reader(form), text, data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert (told.answer, told.calls, told.thoughts) == (text, [], "")


@given(text=st.text(alphabet='<tool_cal/>{}"name:,[]\\ x\n', max_size=80), cut=st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_cuts_never_matter(text: str, cut: int) -> None:
    def told(cuts: list[int]) -> Any:
        found = read(Reader(HERMES), text, cuts)
        return found.answer, [(name, arguments) for _, name, arguments in found.calls]

    assert told([]) == told([min(cut, len(text))]) == told(list(range(len(text))))


@pytest.mark.parametrize(
    ("text", "thinking", "thoughts", "answer"),
    [
        ("<think>\nHm.\nYes.\n</think>\n\nSo: 4.", False, "Hm.\nYes.", "So: 4."),
        ("Hm.\n</think>\n4", True, "Hm.", "4"),
        ("<think>\n\n</think>\n\n4", False, "", "4"),
        ("<think>never ends", False, "never ends", ""),
        ("4 <think> 5", False, "", "4 <think> 5"),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
    ],
)
def test_thoughts_however_the_text_is_cut(text: str, thinking: bool, thoughts: str, answer: str) -> None:
    for cuts in ([], list(range(len(text))), [len(text) // 2]):
        told = read(Reader(thinks=True, thinking=thinking), text, cuts)
        assert (told.thoughts, told.answer) == (thoughts, answer)


def test_call_behind_thoughts() -> None:
    told = read(Reader(HERMES, thinks=True), f"<think>\nask\n</think>\n\n<tool_call>{ONE}</tool_call>")
    assert (told.thoughts, told.answer, calls(told)) == ("ask", "", [("weather", ARGUMENTS)])


def test_only_the_first_call_where_they_may_not_be_parallel() -> None:
    told = read(Reader(HERMES, parallel=False), f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>")
    assert calls(told) == [("weather", ARGUMENTS)]


def test_arguments_are_streamed() -> None:
    reader = Reader(HERMES)
    reader.feed('<tool_call>{"name": "f", "arguments": ')
    begin, *pieces = [part for piece in ('{"a":', ' "b', '"}') for part in reader.feed(piece)]
    assert isinstance(begin, Call)
    assert begin.name == "f"
    assert pieces == [Call(0, '{"a":'), Call(0, ' "b'), Call(0, '"}')]


@pytest.mark.parametrize(("template", "name"), [("x <tool_call> y", "hermes"), ("[TOOL_CALLS]", "mistral"), ("", None)])
def test_format_is_found_in_the_template(template: str, name: str | None) -> None:
    found = find_call_format(template)
    assert (found and found.name) == name
