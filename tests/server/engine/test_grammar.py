"""Grammars: every text follows its own, in every mode and on every runner, and what has no text is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.engine.grammar import (
    Grammar,
    Grammars,
    Part,
    behind_thoughts,
    choice_part,
    grammar_part,
    json_part,
    regex_part,
)
from server.engine.guard import Guard
from server.engine.options import Options
from server.engine.request import Mode, Refused, Request
from strace import native
from strace.graphs import make_runner as run_graphs
from strace.linear import Linear
from strace.runner import FULL
from tests.server.engine.harness import (
    FixedCost,
    Got,
    decode,
    drain,
    graphs,
    make_engine,
    make_request,
    make_runner,
    submit,
)
from tests.tiny import make_tokenizer

VOCABULARY, EOS = 300, 257
TOKENIZER = make_tokenizer()
RUNNERS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


@cache
def grammars() -> Grammars:
    return Grammars(TOKENIZER.backend_tokenizer, VOCABULARY, [EOS])


def compile(*parts: Part) -> Grammar:
    return grammars().compile(list(parts), "field")


def ids_of(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text).ids


def ask(grammar: Grammar, max_tokens: int = 120, **params: Any) -> Request:
    request = make_request(max_tokens=max_tokens, **{"temperature": 1.0, "seed": 1} | params)
    return replace(request, grammar=grammar)


def run(*requests: Request, options: Options | None = None, kind: str = "torch") -> list[Got]:
    runner = make_runner(kind=kind)
    return decode(make_engine(options or Options(seed=0), runner=runner, stop_ids=[EOS]), *requests)


names = st.sampled_from(["a", "b2", "né", "x y"])
leaves = st.one_of(
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 250}, st.integers(-50, 50)),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": ["null", "boolean"]},
            {"enum": ["p", "q\n", 3, None]},
            {"const": {"k": [1]}},
            {"type": "string", "pattern": "^[a-c]{2,3}$"},
            {"type": "string", "format": "date"},
        ]
    ),
)


def _object(properties: dict[str, Any], required: int) -> dict[str, Any]:
    needed = list(properties)[:required]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(lambda *options: {"anyOf": list(options)}, inner, leaves),
    ),
    max_leaves=4,
)


@settings(max_examples=40, derandomize=True)
@given(schemas, st.integers(0, 2**32), st.sampled_from([None, 3]))
def test_text_follows_a_schema(schema: dict[str, Any], seed: int, length: int | None) -> None:
    request = ask(compile(json_part(schema)), max_tokens=240, seed=seed)
    (got,) = run(request, options=Options(draft_length=length, seed=0))
    assume(got.finish != "length")
    assert got.finish == "stop"
    assert jsonschema_rs.is_valid(schema, json.loads(got.text)), (schema, got.text)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("class_name", ["pooled", "lame", "stranger"])
def test_drafts_change_nothing(kind: str, class_name: str) -> None:
    """Seeded and greedy text of `exact`, which drafts, is that of `full`; and drafts do stand."""
    schema = _object({"name": {"type": "string", "maxLength": 30}, "tags": {"enum": ["one", "two"]}}, 2)
    grammar = compile(json_part(schema))
    requests = [ask(grammar, seed=s, temperature=t, class_name=class_name) for s in range(6) for t in (0.0, 0.7, 1.0)]
    drafted = run(*requests, options=Options(draft_length=4, seed=0), kind=kind)
    plain = run(*[replace(request, mode=Mode.FULL, class_name=None) for request in requests], kind=kind)
    assert [got.outcome for got in drafted] == [got.outcome for got in plain]
    assert sum(got.ran.accepted for got in drafted) > 20


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("guarded", [False, True])
def test_a_short_head_without_an_allowed_token_drafts_nothing(kind: str, guarded: bool) -> None:
    """Alone in its step, which the guard then books, and beside a text that drafts."""
    full = graphs()[FULL]
    kept = torch.tensor(sorted(ids_of("xyz!")))
    head = Linear(full.head.dense()[kept], None, full.dtype)
    runner = run_graphs({**graphs(), "lame": replace(full, token_ids=kept, head=head)}, 64, kind)
    request = ask(compile(regex_part("[a-c]{8}")), class_name="lame")
    plain = run(replace(request, mode=Mode.FULL, class_name=None), kind=kind)[0]
    for others in ([], [replace(ask(compile(regex_part("[xyz]{20}"))), class_name="lame")]):
        guard = Guard(FixedCost().table(FULL)) if guarded else None
        engine = make_engine(runner=runner, stop_ids=[EOS], guard=guard)
        got = decode(engine, request, *others)
        assert got[0].outcome == plain.outcome
        assert got[0].ran.drafted == 0
        assert guarded or all(other.ran.drafted > 0 for other in got[1:])


def test_routed_runs_as_exact() -> None:
    (got,) = run(replace(ask(compile(regex_part("[a-f]{9}"))), mode=Mode.ROUTED, threshold=0.0))
    assert (got.ran.mode, got.ran.unverified) == (Mode.EXACT, 0)


@pytest.mark.parametrize("class_name", ["pooled", "stranger"])
def test_unseeded_law(class_name: str) -> None:
    """Drafts of a law restricted in the same way leave the full model's restricted law as it is."""
    grammar = compile(choice_part(["ab", "ac", "ba", "bc"]))
    request = ask(grammar, max_tokens=8, seed=None, class_name=class_name)
    options = Options(draft_length=2, max_running=100, max_waiting=4000, seed=3)
    counts = []
    for mode in (Mode.EXACT, Mode.FULL):
        engine = make_engine(options, stop_ids=[EOS], blocks=100)
        texts = [got.text for got in decode(engine, *[replace(request, mode=mode)] * 1200)]
        counts.append(np.array([texts.count(text) for text in ("ab", "ac", "ba", "bc")]))
    assert sum(counts[0]) == sum(counts[1]) == 1200
    expected = (counts[0] + counts[1]) / 2
    assert sum(((count - expected) ** 2 / expected).sum() for count in counts) < 21  # chi-square, 3 degrees: 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_regex_grammar_choice(seed: int) -> None:
    texts = [
        got.text
        for got in run(
            ask(compile(regex_part(r"\d{3}/[xyz]+!")), seed=seed),
            ask(compile(grammar_part('start: "<" /[a-c]{1,4}/ ">"')), seed=seed),
            ask(compile(grammar_part('root ::= "go " ("left" | "right")')), seed=seed),
            ask(compile(choice_part(["yes", "nó", 'qu"ote\n'])), seed=seed),
        )
    ]
    assert re.fullmatch(r"\d{3}/[xyz]+!", texts[0])
    assert re.fullmatch("<[a-c]{1,4}>", texts[1])
    assert texts[2] in ("go left", "go right")
    assert texts[3] in ("yes", "nó", 'qu"ote\n')


def test_thoughts_come_first() -> None:
    parts = [json_part({"enum": [7]})]
    opened = compile(*behind_thoughts(parts, "<think>", "</think>", True)).begin(frozenset([EOS]))
    unopened = compile(*behind_thoughts(parts, "<think>", "</think>", False)).begin(frozenset([EOS]))
    assert all(opened.append(id) for id in ids_of("so { it </think>\n\n7"))
    assert all(unopened.append(id) for id in ids_of("<think>\nhm</think>7"))
    assert opened.complete
    assert unopened.complete
    plain = compile(*behind_thoughts(parts, "<think>", "</think>", False)).begin(frozenset([EOS]))
    assert plain.append(ids_of("7")[0])
    assert plain.complete


@settings(max_examples=40, derandomize=True)
@given(st.data())
def test_looking_ahead_leaves_no_trace(data: st.DataObject) -> None:
    """Whatever drafts were looked at, what may follow is what a fresh matcher says."""
    grammar = compile(json_part({"type": "array", "items": {"enum": [1, 12, "ab"]}}))
    constraint, text = grammar.begin(frozenset([EOS])), list[int]()
    symbols = st.lists(st.sampled_from(ids_of('[],12"ab ')), max_size=6)
    for _ in range(8):
        for drafts in data.draw(st.lists(symbols, max_size=3)):
            constraint.allowed(drafts)
        fresh = grammar.begin(frozenset([EOS]))
        assert all(fresh.append(token) for token in text)
        row = constraint.allowed()
        assert np.array_equal(row, fresh.allowed())
        choices = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        text.append(int(data.draw(st.sampled_from(choices.tolist()))))
        assert constraint.append(text[-1])
        if constraint.complete:
            return


def test_ends_and_limits() -> None:
    number = compile(regex_part("[a-b]+"))
    short, least, endless, stopped = run(
        ask(compile(json_part({"type": "string"})), max_tokens=4),
        replace(ask(number, max_tokens=40), min_tokens=20),
        replace(ask(number, max_tokens=30), ignore_eos=True),
        replace(ask(number, max_tokens=40), stop=("ab",), min_tokens=0),
    )
    assert (short.finish, len(short.ids)) == ("length", 4)
    assert len(least.ids) > 20
    assert (endless.finish, EOS in endless.ids) == ("length", False)
    assert (stopped.finish, "ab" in stopped.text) == ("stop", False)
    # Where the grammar has nothing but its end, no minimum goes on.
    (whole,) = run(replace(ask(compile(choice_part(["abc"]))), min_tokens=50, ignore_eos=True))
    assert (whole.text, whole.finish) == ("abc", "stop")


def test_logit_bias_chooses_among_what_is_allowed() -> None:
    letters = {letter: ids_of(letter)[0] for letter in "abz"}
    bias = tuple(sorted({letters["b"]: 100.0, letters["z"]: 100.0, letters["a"]: -100.0}.items()))
    (got,) = run(ask(compile(regex_part("[ab]{4}")), logit_bias=bias, frequency_penalty=1.0))
    assert got.text == "bbbb"


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_dead_end_ends_the_request_alone(kind: str) -> None:
    engine = make_engine(Options(draft_length=3, seed=0), runner=make_runner(kind=kind), stop_ids=[EOS])
    dead = submit(engine, ask(compile(grammar_part('start: "ab" loop\nloop: loop "x"'))))
    well = submit(engine, ask(compile(regex_part("[a-c]{7}"))))
    drain(engine)
    (error,) = dead.errors
    assert isinstance(error, Refused)
    assert (error.param, str(error)) == ("field", "the grammar allows nothing behind 2 tokens of the text")
    assert (len(well.text), engine.stats().blocks_used) == (7, 0)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (json_part({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_part({"not": {}}), "not"),
        (json_part({"enum": []}), "empty"),
        (json_part({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (json_part({"$ref": "#"}), "no text"),
        (json_part({"$ref": "https://example.org/schema"}), "example.org"),
        (json_part({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (regex_part("(a"), "unclosed"),
        (regex_part(r"[^\s\S]"), "no text"),
        (grammar_part("start: nothing"), "nothing"),
        (grammar_part('start: start "a"'), "no text"),
        (regex_part("a" * 2**17), "characters"),
        (grammar_part("start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(1500)) + 'r1500: "y"'), "lines"),
        (json_part({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(300)}}), "references"),
        (json_part({"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(14)]}), "field"),
        (json_part({"type": "integer", "multipleOf": 999999937}), "fuel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_text_is_refused(part: Part, told: str) -> None:
    with pytest.raises(Refused, match=re.escape(told)) as caught:
        compile(part)
    assert caught.value.param == "field"


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"items": schema}
    with pytest.raises(Refused):
        compile(json_part(schema))


def test_the_largest_chains_do_no_harm() -> None:
    """llguidance goes down them on the stack."""
    refs = {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(249)}
    compile(json_part({"$defs": refs | {"d249": {}}, "$ref": "#/$defs/d0"}))
    compile(grammar_part("start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(990)) + 'r990: "y"'))


def test_a_tokenizer_larger_than_the_model_has_no_grammars() -> None:
    with pytest.raises(Refused, match="tokenizer"):
        Grammars(TOKENIZER.backend_tokenizer, 100, [7]).compile([regex_part("a")], "field")
