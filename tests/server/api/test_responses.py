"""/v1/responses through OpenAI's client: whole, streamed, and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from server.engine.request import Update
from tests.server.api.fake import PIECES, FakeEngine
from tests.server.api.test_bad_input import check_error
from tests.tiny import make_tokenizer

TEXT = "".join(PIECES)
PATH = "/v1/responses"
GOOD: dict[str, Any] = {"model": "tiny", "input": "hi"}


def prompt(engine: FakeEngine) -> str:
    return make_tokenizer().decode(engine.requests[-1].prompt, skip_special_tokens=True)


def test_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    response = client.responses.create(model="tiny", input="hi", instructions="be brief", max_output_tokens=9)
    assert (response.output_text, response.status, response.error) == (TEXT, "completed", None)
    assert response.usage is not None
    assert (response.usage.output_tokens, response.usage.total_tokens) == (3, 3 + response.usage.input_tokens)
    assert response.usage.input_tokens_details.cached_tokens == 2
    request = engine.requests[-1]
    assert request.max_tokens == 9
    assert prompt(engine) == "system\nbe briefuser\nhiassistant\n"


def test_conversation_in_items(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.responses.create(model="tiny", input="hi")
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    items += [item.model_dump() for item in first.output]
    client.responses.create(model="tiny", input=[*items, {"role": "user", "content": "so"}])
    assert prompt(engine) == f"user\nhiassistant\n{TEXT}user\nsoassistant\n"


def test_events(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(PIECES),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    added = next(event for event in events if event.type == "response.output_item.added")
    assert added.item.model_dump(include={"status", "content"}) == {"status": "in_progress", "content": []}
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == TEXT


def test_helper_of_the_client(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == TEXT


def test_answer_cut_by_the_limit(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(updates=[Update([1], [False], "Hel", "length")]))
    response = http.post(PATH, json=GOOD).json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


def test_failure_is_the_last_event(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(failure=RuntimeError("the secret of line 7")))
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        events = list(client.responses.create(model="tiny", input="hi", stream=True))
    assert events[-1].type == "error"
    assert "secret" not in events[-1].message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"type": "picture"}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": "x" * 100}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 64}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"stop": "x"}, "stop"),
        ({"strace": {"class": "poetry"}}, "strace.class"),
    ],
)
def test_field_at_fault_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    response = http.post(PATH, json=GOOD | change)
    code = "context_length_exceeded" if "context holds" in response.text else None
    check_error(response, 400, param, code)
