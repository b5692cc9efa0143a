"""Grammars: what a text may be, compiled once, and where each text is in its own.

The grammars and the automata are llguidance's. A part is one grammar in its words, `{"json_schema": ...}` or
`{"lark_grammar": ...}`; of several parts the first begins the text and names the others as `@name`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from tokenizers import Tokenizer

from server.engine.request import Refused

Part = dict[str, Any]

_MOST_TEXT = 2**16  # characters of a grammar
_MOST_LINES = 1000  # llguidance goes down a chain of rules, or of references, on the stack
_MOST_REFERENCES = 250
_KEPT = 32  # compiled grammars
_LIMITS = LLParserLimits(max_lexer_states=16_000, verbose_errors=False)  # about 32 MB for one grammar
# At most one space, or one line break and an indent, where JSON lets white space stand: a model that is not sure what
# comes next must not fill its limit with blanks.
_WHITE_SPACE = r" |\n[ \t]{0,40}"


def json_part(schema: dict[str, Any]) -> Part:
    """JSON that follows a schema."""
    return {"json_schema": schema | {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}}


def regex_part(pattern: str) -> Part:
    """What a regular expression matches as a whole."""
    (part,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
    return {"lark_grammar": part["lark_grammar"]}


def choice_part(choices: Iterable[str]) -> Part:
    """One of several texts."""
    return {"lark_grammar": "start: " + " | ".join(map(json.dumps, choices))}


def grammar_part(text: str) -> Part:
    """A context-free grammar in llguidance's Lark or in GBNF.

    Raises:
        ValueError: if it is GBNF that cannot be read.
    """
    return {"lark_grammar": grammar_from("grammar", text)}


def behind_thoughts(parts: list[Part], begin: str, end: str, opened: bool) -> list[Part]:
    """The same behind thoughts between two marks; opened: the prompt has the first mark, else there may be none."""
    start = "thoughts @answer" if opened else f"({json.dumps(begin)} thoughts)? @answer"
    closing = end.replace("/", "\\/")
    lark = f"start: {start}\nthoughts: closed blank\nclosed[lazy]: /(.|\\n)*{closing}/\nblank: /\\n{{0,2}}/"
    return [{"lark_grammar": lark}, {**parts[0], "name": "answer"}, *parts[1:]]


class Grammar:
    """A compiled grammar. param: the request's field that it came from."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: Iterable[int], param: str) -> None:
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, frozenset(ends)
        self.param = param

    def begin(self, stop_ids: frozenset[int] = frozenset(), least: int = 0) -> Constraint:
        """The state of a new text, which `stop_ids` end, but none of them before `least` tokens."""
        never, early = (_as_bits(ids, self._vocabulary) for ids in (self._ends - stop_ids, stop_ids))
        return Constraint(self, never, early, least)

    def fork(self) -> LLMatcher:
        """A matcher at the beginning."""
        return self._matcher.deep_copy()


class Constraint:
    """Where one text is in its grammar, and what may come next."""

    def __init__(self, grammar: Grammar, never: np.ndarray, early: np.ndarray, least: int) -> None:
        self.grammar = grammar
        self._matcher, self._never, self._early, self._least = grammar.fork(), never, early, least
        self._text: list[int] = []
        self._ahead: list[int] = []  # drafts that the matcher has taken behind the text
        self._rows: dict[int, np.ndarray] = {}  # what may follow so many of them

    @property
    def complete(self) -> bool:
        """Whether nothing can follow the text but its end."""
        return not self._ahead and self._matcher.is_stopped()

    def allowed(self, drafts: Sequence[int] = ()) -> np.ndarray:
        """What may follow the text and `drafts`, as bits uint32 [ceil(V / 32)]: none at a dead end, all behind a draft
        that the grammar itself does not take, since that one will not stand.

        Ids that must not end the text here are left out, unless the grammar has nothing else.
        """
        self._go_back(_count_common(self._ahead, drafts))
        for token in drafts[len(self._ahead) :]:
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
                return np.full_like(self._never, 2**32 - 1)
            self._ahead.append(token)
        if len(drafts) not in self._rows:
            self._rows[len(drafts)] = self._compute()
        return self._rows[len(drafts)]

    def append(self, token: int) -> bool:
        """Add a token to the text; False if the grammar does not take it."""
        if self._ahead[:1] == [token]:
            del self._ahead[0]
            self._rows = {depth - 1: row for depth, row in self._rows.items() if depth > 0}
        else:
            self._go_back(0)
            self._rows = {}
            if not self._matcher.try_consume_tokens([token]):
                return False
        self._text.append(token)
        return True

    def _compute(self) -> np.ndarray:
        bits = np.zeros_like(self._never)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            self._revive()
            return np.zeros_like(bits)
        early = len(self._text) + len(self._ahead) < self._least
        open_ended = bits & ~(self._never | self._early if early else self._never)
        return open_ended if open_ended.any() else bits

    def _go_back(self, depth: int) -> None:
        if depth < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - depth)
            del self._ahead[depth:]
            self._rows = {d: row for d, row in self._rows.items() if d <= depth}

    def _revive(self) -> None:
        """A matcher that ran into a dead end stays there, but the drafts that led there may not stand."""
        self._matcher = self.grammar.fork()
        self._matcher.try_consume_tokens([*self._text, *self._ahead])


class Grammars:
    """Compiles grammars over the tokens of one model, and keeps the latest. May be called from any thread.

    stop_ids: tokens that end a text. vocabulary: rows of the model's head, at least the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: Iterable[int]) -> None:
        self._source, self._vocabulary, self._stop_ids = tokenizer, vocabulary, sorted(stop_ids)
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._source.to_str(), n_vocab=self._vocabulary, eos_token=self._stop_ids or None)

    def compile(self, parts: list[Part], param: str) -> Grammar:
        """The grammar of `parts`, which the field `param` asks for.

        Raises:
            Refused: if it is no grammar, too large, nothing follows it, or it uses what llguidance does not have.
        """
        try:
            text = json.dumps({"grammars": parts})
        except RecursionError as error:
            raise Refused(f"`{param}` is nested too deeply", param) from error
        _check_size(parts, text, param)
        with self._lock:
            try:
                tokenizer = self._tokenizer
            except ValueError as error:
                raise Refused(f"`{param}`: this model's tokenizer has no grammars: {error}", param) from error
            if text not in self._kept:
                self._kept[text] = _compile(tokenizer, text, param)
            self._kept.move_to_end(text)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return Grammar(self._kept[text], self._vocabulary, tokenizer.eos_tokens, param)


def _check_size(parts: list[Part], text: str, param: str) -> None:
    lines = sum(part.get("lark_grammar", "").count("\n") for part in parts)
    for count, most, what in (
        (len(text), _MOST_TEXT, "characters"),
        (lines, _MOST_LINES, "lines"),
        (text.count('"$ref"'), _MOST_REFERENCES, "references"),
    ):
        if count > most:
            raise Refused(f"`{param}`: the grammar has {count} {what}, more than {most}", param)


def _compile(tokenizer: LLTokenizer, text: str, param: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        if trial.is_error():
            raise Refused(f"`{param}`: no text follows this grammar: {_first_lines(trial.get_error())}", param)
        return matcher
    raise Refused(f"`{param}`: {_first_lines(matcher.get_error())}", param)


def _first_lines(message: str) -> str:
    return message.replace("<non-verbose/>", "").strip()[:500]


def _as_bits(ids: Iterable[int], vocabulary: int) -> np.ndarray:
    bits = np.zeros(-(-vocabulary // 32) * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
