"""Tools and thoughts through the API: what the template is told, and what the answer's text is told apart into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from server.api.output import CALL_FORMATS
from server.api.served import Served
from server.app import create_app
from tests.server.api.fake import FakeEngine, make_served, serving
from tests.tiny import make_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }} in <tool_call>;{% endif %}{% if mood %}{{ mood }};{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %};{% endfor %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TURNS: list[Any] = [{"role": "user", "content": "?"}]
CALLING = (
    "<think>\nhm\n</think>\n\n",
    "Wait.\n<tool_",
    'call>\n{"name": "weather", "arguments": {"ci',
    'ty": "Rome"}}\n</tool_call>',
    '\n<tool_call>{"name": "time", "arguments": {}}</tool_call>',
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(pieces=CALLING)


@pytest.fixture
def served(engine: FakeEngine) -> Served:
    served = replace(make_served(engine), calls=CALL_FORMATS["hermes"], thinks=True, context=512)
    served.tokenizer.chat_template = TEMPLATE
    return served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with (
        serving(create_app(served)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


def prompt(engine: FakeEngine) -> str:
    return make_tokenizer().decode(engine.requests[-1].prompt)


def test_calls_and_thoughts_are_told_apart(client: openai.OpenAI, engine: FakeEngine) -> None:
    (choice,) = client.chat.completions.create(model="tiny", messages=TURNS, tools=[WEATHER]).choices
    assert prompt(engine) == "weather in <tool_call>;user:?;"
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
    assert getattr(choice.message, "reasoning_content") == "hm"  # noqa: B009
    called = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]
    assert called == [("weather", {"city": "Rome"}), ("time", {})]


def test_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=TURNS, tools=[WEATHER]).choices[0].message
    content, thoughts, calls, finishes = "", "", {}, []
    for chunk in client.chat.completions.create(model="tiny", messages=TURNS, tools=[WEATHER], stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        thoughts += getattr(choice.delta, "reasoning_content", None) or ""
        finishes.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            before = calls.setdefault(call.index, ["", ""])
            before[0] += (call.function and call.function.name) or ""
            before[1] += (call.function and call.function.arguments) or ""
    assert (content, thoughts) == (whole.content, "hm")
    assert list(calls.values()) == [[c.function.name, c.function.arguments] for c in whole.tool_calls or []]
    assert [finish for finish in finishes if finish] == ["tool_calls"]


def test_first_call_only(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TURNS, tools=[WEATHER], parallel_tool_calls=False)
    assert [c.function.name for c in answer.choices[0].message.tool_calls or []] == ["weather"]


@pytest.mark.parametrize("choice", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_calls_are_text(client: openai.OpenAI, engine: FakeEngine, choice: Any) -> None:
    (answer,) = client.chat.completions.create(model="tiny", messages=TURNS, **choice).choices
    assert "<tool_call>" in (answer.message.content or "")
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
    assert prompt(engine) == "user:?;"


def test_later_turns_repeat_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [
        *TURNS,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    client.chat.completions.create(model="tiny", messages=turns)
    assert prompt(engine) == "user:?;assistant:Rome;tool:sun;"


def test_variables_of_the_template(client: openai.OpenAI, engine: FakeEngine) -> None:
    extra = {"chat_template_kwargs": {"mood": "glad"}}
    client.chat.completions.create(model="tiny", messages=TURNS, extra_body=extra)
    assert prompt(engine) == "glad;user:?;"


# Qwen3's logic: thoughts of earlier turns are left out but for the last ones, and one can be asked not to think.
QWEN = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end_of_turn|>{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As of models that always think: the prompt itself begins the thoughts.
ALWAYS = QWEN.replace("{% if enable_thinking is defined", "<think>\n{% if enable_thinking is defined")
THINKING: list[tuple[str, dict[str, Any], tuple[str, ...], str | None, str]] = [
    (QWEN, {}, ("<thi", "nk>\nLet m", "e see: ", "42?\n</th", "ink>\n\nIt is ", "42."), "Let me see: 42?", "It is 42."),
    (QWEN, {"enable_thinking": True}, ("<think>\nHm\n</think>\n\nYes",), "Hm", "Yes"),
    (QWEN, {"enable_thinking": False}, ("It is ", "42."), None, "It is 42."),
    (ALWAYS, {}, ("Let me ", "see\n<", "/think>", "\n\nIt is 42."), "Let me see", "It is 42."),
    (ALWAYS, {}, ("Let me ", "see, and see"), "Let me see, and see", ""),
]


@pytest.mark.parametrize(("template", "variables", "pieces", "thoughts", "answer"), THINKING)
def test_thoughts_apart(
    template: str, variables: dict[str, Any], pieces: tuple[str, ...], thoughts: str | None, answer: str
) -> None:
    engine = FakeEngine(pieces=pieces)
    served = replace(make_served(engine), thinks=True, context=512)
    served.tokenizer.chat_template = template
    asked: Any = {"model": "tiny", "messages": TURNS, "extra_body": {"chat_template_kwargs": variables}}
    with (
        serving(create_app(served)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        whole = client.chat.completions.create(**asked)
        *chunked, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        response = client.responses.create(model="tiny", input="?") if not variables else None
    (choice,), chunks = whole.choices, [chunk.choices[0] for chunk in chunked]
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(thoughts or "")  # tokens are bytes
    assert prompt(engine).endswith("<think>\n\n</think>\n\n") == (variables.get("enable_thinking") is False)
    assert (getattr(choice.message, "reasoning_content", None), choice.message.content) == (thoughts, answer)
    assert choice.finish_reason == chunks[-1].finish_reason == "stop"
    streamed = [getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks]
    assert "".join(streamed) == (thoughts or "")
    assert "".join(chunk.delta.content or "" for chunk in chunks) == answer
    if thoughts and len(pieces) > 3:
        assert len([piece for piece in streamed if piece]) > 1, "thoughts are streamed as they come"
    if response is not None:
        assert [item.type for item in response.output] == ["reasoning", "message"][: 1 + bool(answer)]
        assert response.output_text == answer
        assert response.usage.output_tokens_details.reasoning_tokens == len(thoughts or "")


def test_thoughts_of_earlier_turns_reach_the_template(client: openai.OpenAI, engine: FakeEngine, served: Any) -> None:
    served.tokenizer.chat_template = QWEN
    turns: list[Any] = [*TURNS, {"role": "assistant", "content": "42", "reasoning_content": "hm"}, *TURNS]
    client.chat.completions.create(model="tiny", messages=turns)
    assert "<think>\nhm\n</think>\n\n42<|end_of_turn|>" in prompt(engine)


def test_response_has_an_item_per_part(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"], "strict": False}
    response = client.responses.create(model="tiny", input="?", tools=[tool])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "Wait."
    stream = client.responses.create(model="tiny", input="?", tools=[tool], stream=True)
    *_, last = stream
    assert last.type == "response.completed"
    again: Any = [{"role": "user", "content": "?"}, *(item.model_dump() for item in response.output)]
    again.append({"type": "function_call_output", "call_id": response.output[2].call_id, "output": "sun"})
    client.responses.create(model="tiny", input=again)
    told, whole = ([item.model_dump(exclude={"id", "call_id"}) for item in r.output] for r in (last.response, response))
    assert told == whole
