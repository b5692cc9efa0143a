"""What a model's text says, part by part as it comes: thoughts, answer, calls of tools.

Models write all three into one text, each kind of model with marks of its own. A `Reader` takes the text in pieces of
any size and gives parts; the parts of a text do not depend on how it was cut, and no text is ever lost: what looked
like a call and is none comes out as answer.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

_WHITE = " \t\r\n"
_NAMED = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_TAGGED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)")


@dataclass(frozen=True)
class Thought:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True)
class Call:
    """The beginning of call number `index` (it has `id` and `name`), or a piece of its arguments, which are JSON."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Part = Thought | Answer | Call


@dataclass(frozen=True)
class CallFormat:
    """How a kind of model writes a call.

    begin, end: its marks; without a mark a text that begins with `{` is a call. sign: what in a chat template tells the
    format. special: the marks are special tokens, which decoding must not leave out.
    """

    name: str
    begin: str
    end: str
    sign: str
    special: bool


CALL_FORMATS = {
    form.name: form
    for form in (
        CallFormat("hermes", "<tool_call>", "</tool_call>", "<tool_call>", False),
        CallFormat("mistral", "[TOOL_CALLS]", "", "[TOOL_CALLS]", True),
        CallFormat("llama3_json", "", "", '"parameters": dictionary', False),
    )
}
THINK, THOUGHT = "<think>", "</think>"


def find_call_format(chat_template: str) -> CallFormat | None:
    """The format that a chat template teaches its model, if it is one of those known."""
    return next((form for form in CALL_FORMATS.values() if form.sign in chat_template), None)


class Reader:
    """Reads one text.

    calls: the format of tool calls, None to take them for answer. thinks: whether thoughts are told apart; thinking:
    the prompt has opened them already. parallel: whether calls after the first are given.
    """

    def __init__(
        self, calls: CallFormat | None = None, thinks: bool = False, thinking: bool = False, parallel: bool = True
    ) -> None:
        self._thoughts = _Thoughts(thinking) if thinks else None
        self._calls = _Calls(calls) if calls else None
        self._parallel = parallel

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that `text` completes; `final`: nothing follows."""
        parts: list[Part] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, final)
            parts += [Thought(thought)] if thought else []
        rest = self._calls.feed(text, final) if self._calls else [Answer(text)]
        parts += [part for part in rest if not isinstance(part, Answer) or part.text]
        return [part for part in parts if self._parallel or not isinstance(part, Call) or part.index == 0]


class _Thoughts:
    """Tells `<think>...</think>` at the front of a text from what follows, newlines around the marks left out."""

    def __init__(self, inside: bool) -> None:
        self._inside, self._before = inside, not inside
        self._held, self._trim = "", inside

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        """What is new of the thoughts, and of the text behind them."""
        self._held += text
        if self._before:
            begun = self._held.lstrip(_WHITE)
            if not final and THINK.startswith(begun[: len(THINK)]) and len(begun) < len(THINK):
                return "", ""
            self._before, self._inside = False, begun.startswith(THINK)
            if self._inside:
                self._held, self._trim = begun[len(THINK) :], True
        if not self._inside:
            return "", self._take(len(self._held))
        thought, closed, rest = self._held.partition(THOUGHT)
        if closed:
            self._held = thought
            thought = self._take(len(thought)).rstrip("\n")
            self._inside, self._trim, self._held = False, True, rest
            return thought, self._take(len(rest))
        sure = self._held if final else self._held[: len(self._held) - _overlap(self._held, THOUGHT)].rstrip("\n")
        return self._take(len(sure)), ""

    def _take(self, length: int) -> str:
        """So much of what is held, without newlines at the very front of its section."""
        text, self._held = self._held[:length], self._held[length:]
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text


class _Calls:
    """Tells calls from answer: a machine of four states, each a method that gives parts, or None for want of text."""

    def __init__(self, form: CallFormat) -> None:
        self._form, self._state = form, self._answer
        self._held, self._index = "", -1
        self._spoken = False
        self._scan = _ObjectScanner()
        self._wrapped = False

    def feed(self, text: str, final: bool) -> list[Part]:
        """Parts in order."""
        self._held += text
        parts: list[Part] = []
        while (found := self._state(final)) is not None:
            parts += found
        return parts

    def _answer(self, final: bool) -> list[Part] | None:
        """Text until a call begins."""
        begin = self._form.begin
        # White space alone between calls, or before the first, says nothing.
        held = self._held if self._spoken else self._held.lstrip(_WHITE)
        if not held:
            return None
        if not begin and not self._spoken and held.startswith("{"):
            self._held, self._state = held, self._header
            return []
        if begin and (at := held.find(begin)) >= 0:
            before, self._held = held[:at].rstrip(_WHITE), held[at + len(begin) :]
            self._state = self._header
            return [Answer(before)]
        sure = len(held) if final or not begin else len(held[: len(held) - _overlap(held, begin)].rstrip(_WHITE))
        text, self._held = held[:sure], held[sure:]
        if not text:
            return None
        self._spoken = True
        return [Answer(text)]

    def _header(self, final: bool) -> list[Part] | None:
        """The name of a call, up to its arguments."""
        held = self._held.lstrip(_WHITE + "[,;")
        for pattern, wrapped in ((_NAMED, True), (_TAGGED, False)):
            if match := pattern.match(held):
                name = json.loads(match[1]) if wrapped else match[1]
                self._held, self._wrapped = held[match.end() :], wrapped
                self._scan, self._state = _ObjectScanner(), self._arguments
                return [self._begin(name)]
        end = _ObjectScanner().feed(held) if held.startswith("{") else None
        if end is not None:
            return self._whole(held[:end], held[end:])
        if not final:
            return None
        self._state = self._answer
        self._spoken, raw, self._held = True, self._form.begin + self._held, ""
        return [Answer(raw)] if raw else None

    def _whole(self, raw: str, rest: str) -> list[Part]:
        """A complete object that is written in an unusual order: a call if it reads like one, else answer."""
        self._held = rest
        try:
            call = json.loads(raw)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError):
            name = None
        if not isinstance(name, str):
            self._state, self._spoken = self._answer, True
            return [Answer(self._form.begin + raw)]
        self._wrapped, self._state = False, self._tail
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [self._begin(name), Call(self._index, text)]

    def _begin(self, name: str) -> Call:
        self._index += 1
        return Call(self._index, id=f"call_{uuid.uuid4().hex[:24]}", name=name)

    def _arguments(self, final: bool) -> list[Part] | None:
        """Arguments as they are written, to their closing brace."""
        if not self._held:
            return None
        end = self._scan.feed(self._held)
        text, self._held = self._held[:end], self._held[len(self._held) if end is None else end :]
        if end is not None:
            self._state = self._tail
        return [Call(self._index, text)]

    def _tail(self, final: bool) -> list[Part] | None:
        """What closes a call; then the next one of a list, or text again."""
        held = self._held.lstrip(_WHITE)
        if self._wrapped and held.startswith("}"):
            self._wrapped, held = False, held[1:].lstrip(_WHITE)
        self._held, end = held, self._form.end
        if not final and (not held or (end.startswith(held) and held != end)):
            return None
        if held.startswith((",", ";")):
            self._state = self._header
        else:
            self._held = held.removeprefix(end) if end else held.removeprefix("]")
            self._state, self._spoken = self._answer, False
        return []


class _ObjectScanner:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, text: str) -> int | None:
        """Where in `text` the object ends (behind its brace), None while it goes on."""
        for at, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


@dataclass
class Told:
    """All parts of a text put together; `calls` as (id, name, arguments)."""

    thoughts: str
    answer: str
    calls: list[tuple[str, str, str]]


def put_together(parts: Iterable[Part]) -> Told:
    """What a whole text says."""
    told = Told("", "", [])
    for part in parts:
        match part:
            case Thought(text):
                told.thoughts += text
            case Answer(text):
                told.answer += text
            case Call(index, arguments, id, name):
                if name is not None:
                    told.calls.append((id or "", name, ""))
                known, called, before = told.calls[index]
                told.calls[index] = (known, called, before + arguments)
    return told
