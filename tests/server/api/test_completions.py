"""/v1/completions: every kind of prompt, one choice per prompt, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.fake import PIECES, FakeEngine
from tests.server.api.test_chat import read_events

TEXT = "".join(PIECES)


@pytest.mark.parametrize(
    ("prompt", "count"), [("hi", 1), (["hi"], 1), (["hi", "you"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)]
)
def test_one_choice_per_prompt(client: openai.OpenAI, engine: FakeEngine, prompt: Any, count: int) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt)
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert {(choice.text, choice.finish_reason) for choice in answer.choices} == {(TEXT, "stop")}
    requests = engine.requests[-count:]
    assert {request.max_tokens for request in requests} == {16}
    assert len({request.id for request in requests}) == count
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert answer.usage.completion_tokens == 3 * count


def test_token_ids_are_taken_as_they_are(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="tiny", prompt=[5, 258])
    assert engine.requests[-1].prompt == [5, 258]


def test_default_limit_shrinks_near_the_end_of_the_context(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="tiny", prompt=[1] * 60)
    assert engine.requests[-1].max_tokens == 4


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("include_usage", [False, True])
def test_stream(http: httpx.Client, count: int, include_usage: bool) -> None:
    body = {"model": "tiny", "prompt": ["hi"] * count, "stream": True}
    whole = http.post("/v1/completions", json=body | {"stream": False}).json()
    body |= {"stream_options": {"include_usage": include_usage}}
    with http.stream("POST", "/v1/completions", json=body) as response:
        *events, end = read_events(response)
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    texts, finishes = [""] * count, [0] * count
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        finishes[choice["index"]] += choice["finish_reason"] is not None
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert finishes == [1] * count
    assert ["strace" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["strace"] == whole["strace"]
    assert chunks[-1]["usage"] == (whole["usage"] if include_usage else None)


def test_several_prompts_give_a_report_each(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "tiny:code", "prompt": ["a", "b"]})
    assert [report["class"] for report in response.json()["strace"]] == ["code", "code"]


def test_refused_prompt_leaves_nothing_in_the_engine(http: httpx.Client, engine: FakeEngine) -> None:
    before = len(engine.requests)
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": ["fine", ""]}).status_code == 400
    assert len(engine.requests) == before
