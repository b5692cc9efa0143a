"""Structured output and constrained tools through OpenAI's client, over a real engine of a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from tokenizers import AddedToken

from server.api.constrain import Calls
from server.api.output import CALL_FORMATS, Call, Reader, put_together
from server.api.protocol import Function
from server.api.served import Served
from server.app import create_app
from server.engine.grammar import Grammars
from server.engine.options import Options
from tests.server.api.fake import serving
from tests.server.api.real import EOS, make_real
from tests.server.engine.harness import VOCABULARY, make_engine
from tests.tiny import make_tokenizer

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)
TURNS: list[Any] = [{"role": "user", "content": "?"}]
CITY = {"type": "string", "enum": ["Rome", "Oslo"]}
WEATHER = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "time"}},
]


class Verdict(BaseModel):
    """What `parse` fills."""

    kind: Literal["good", "bad"]
    score: Annotated[int, Field(ge=0, le=20)]
    tags: Annotated[list[Literal["a", "b"]], Field(max_length=2)]
    note: Annotated[str, Field(max_length=3)] | None


@pytest.fixture(scope="module")
def served() -> Served:
    engine = make_engine(Options(draft_length=3, seed=0), stop_ids=[EOS])
    return make_real(engine, TEMPLATE, CALL_FORMATS["hermes"])


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with (
        serving(create_app(served)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("seed", range(3))
def test_parse(client: openai.OpenAI, seed: int) -> None:
    chat = client.chat.completions.parse(model="tiny", messages=TURNS, response_format=Verdict, seed=seed)
    assert isinstance(chat.choices[0].message.parsed, Verdict)
    response = client.responses.parse(model="tiny", input="?", text_format=Verdict, extra_body={"seed": seed})
    assert isinstance(response.output_parsed, Verdict)
    with client.chat.completions.stream(model="tiny", messages=TURNS, response_format=Verdict, seed=seed) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == chat.choices[0].message.parsed


def test_json_object_and_its_cut(client: openai.OpenAI) -> None:
    kind: Any = {"type": "json_object"}
    bias = {str(make_tokenizer().encode(mark)[0]): 9 for mark in '"}:'}
    chat = client.chat.completions.create(
        model="tiny", messages=TURNS, response_format=kind, seed=0, max_tokens=200, logit_bias=bias
    )
    assert chat.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(chat.choices[0].message.content or ""), dict)
    cut = client.chat.completions.create(model="tiny", messages=TURNS, response_format=kind, seed=0, max_tokens=1)
    assert (cut.choices[0].finish_reason, (cut.choices[0].message.content or "")[0]) == ("length", "{")
    response = client.responses.create(model="tiny", input="?", text={"format": kind}, max_output_tokens=1)
    assert (response.status, response.output_text[0]) == ("incomplete", "{")


STRUCTURED: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"\d{2}-[a-f]{1,5}!"}, r"\d{2}-[a-f]{1,5}!"),
    ({"choice": ["left", "right"]}, "left|right"),
    ({"grammar": 'root ::= "a" ("b" | "c")'}, "ab|ac"),
    ({"grammar": 'start: "x" /[yz]{2}/'}, "x[yz]{2}"),
    ({"json": {"enum": [1, 22]}}, "1|22"),
    ({"json": '{"const": null}'}, "null"),
]


@pytest.mark.parametrize(("asked", "pattern"), STRUCTURED)
@pytest.mark.parametrize("mode", ["exact", "full"])
def test_structured_outputs(client: openai.OpenAI, asked: dict[str, Any], pattern: str, mode: str) -> None:
    body: Any = {"structured_outputs": asked}
    shared: Any = {"model": f"tiny:{mode}", "max_tokens": 60, "seed": 4, "extra_body": body}
    text = client.completions.create(prompt="?:", **shared).choices[0].text
    assert re.fullmatch(pattern, text)
    assert client.chat.completions.create(messages=TURNS, **shared).choices[0].message.content == text
    pieces = [chunk.choices[0] for chunk in client.completions.create(prompt="?:", stream=True, **shared)]
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish_reason == "stop"


def check_call(name: str, arguments: str) -> None:
    told = json.loads(arguments)
    assert name in ("weather", "time")
    assert told.get("city") in ("Rome", "Oslo") if name == "weather" else told == {}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_required_tools(client: openai.OpenAI, seed: int, parallel: bool) -> None:
    shared: Any = {"model": "tiny", "messages": TURNS, "tools": TOOLS, "tool_choice": "required", "seed": seed}
    (choice,) = client.chat.completions.create(**shared, parallel_tool_calls=parallel).choices
    calls = choice.message.tool_calls or []
    assert choice.message.content is None or choice.finish_reason == "length"
    if not parallel:
        assert (len(calls), choice.finish_reason) == (1, "tool_calls")
    for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:  # the limit may have cut the last
        check_call(call.function.name, call.function.arguments)
    streamed = ""
    for chunk in client.chat.completions.create(**shared, parallel_tool_calls=parallel, stream=True):
        streamed += "".join(c.function.arguments or "" for c in chunk.choices[0].delta.tool_calls or [])
    assert streamed == "".join(call.function.arguments for call in calls)


def test_named_tool(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    (choice,) = client.chat.completions.create(model="tiny", messages=TURNS, tools=TOOLS, tool_choice=named).choices
    (call,) = choice.message.tool_calls or []
    assert (call.function.name, choice.finish_reason) == ("weather", "stop")
    check_call("weather", call.function.arguments)
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    chosen: Any = {"type": "function", "name": "time"}
    response = client.responses.create(model="tiny", input="?", tools=tools, tool_choice=chosen)
    assert [(item.type, item.name) for item in response.output] == [("function_call", "time")]


def test_an_answer_that_follows_a_schema_or_calls(client: openai.OpenAI) -> None:
    """Both at once, as OpenAI has it."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "v", "schema": {"enum": ["yes", "no"]}}}
    shared: Any = {"model": "tiny", "messages": TURNS, "tools": TOOLS, "response_format": schema}
    answering, calling = ({str(make_tokenizer().encode(mark)[0]): 50} for mark in '"<')
    (choice,) = client.chat.completions.create(**shared, logit_bias=answering).choices
    assert json.loads(choice.message.content or "") in ("yes", "no")
    (choice,) = client.chat.completions.create(**shared, logit_bias=calling, parallel_tool_calls=False).choices
    (call,) = choice.message.tool_calls or []
    check_call(call.function.name, call.function.arguments)


FUNCTIONS = [Function(**tool["function"]) for tool in TOOLS]
GOOD = {
    "hermes": '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
    "llama3_json": '{{"name": "{name}", "parameters": {arguments}}}',
    "mistral": '[TOOL_CALLS][{{"name": "{name}", "arguments": {arguments}}}]',
    "mistral tagged": "[TOOL_CALLS]{name}[ARGS]{arguments}",
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", GOOD)
def test_formats_of_calls(kind: str, special: bool) -> None:
    """Each format's grammar takes what its reader reads, and no other arguments; special tokens stand by themselves."""
    tokenizer = make_tokenizer("{{ '[ARGS]' }}" if kind == "mistral tagged" else "")
    form = CALL_FORMATS[kind.split()[0]]
    if special:
        tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]", "<tool_call>")])
    grammars = Grammars(tokenizer.backend_tokenizer, VOCABULARY, [EOS])

    def takes(text: str, free: bool, single: bool = False) -> bool:
        calls = Calls(form, tokenizer, single)
        parts = calls.permit(FUNCTIONS) if free else calls.demand(FUNCTIONS)
        constraint = grammars.compile(parts, "tools").begin(frozenset([EOS]))
        ids = tokenizer.encode(text, add_special_tokens=False)
        return all(constraint.append(id) for id in ids) and (constraint.complete or constraint.append(EOS))

    good = GOOD[kind].format(name="weather", arguments='{"city": "Rome"}')
    bad = GOOD[kind].format(name="weather", arguments='{"city": "Bonn"}')
    for free in (True, False):
        assert takes(good, free)
        assert takes(GOOD[kind].format(name="time", arguments="{}"), free)
        assert not takes(bad, free)
        assert not takes(GOOD[kind].format(name="other", arguments="{}"), free)
    assert takes(good, False, single=True)
    assert takes("Just text.", True)
    assert not takes("Just text.", False)
    (call,) = put_together(Reader(form).feed(good, final=True)).calls
    assert call[1:] == ("weather", '{"city": "Rome"}')
    assert isinstance(Reader(form).feed(good, final=True)[0], Call)


def test_tools_without_a_format_are_refused(served: Served) -> None:
    with (
        serving(create_app(replace(served, calls=None, engine=make_engine()))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        pytest.raises(openai.BadRequestError, match="format of calls"),
    ):
        client.chat.completions.create(model="tiny", messages=TURNS, tools=TOOLS, tool_choice="required")
