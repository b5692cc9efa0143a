"""/v1/chat/completions through the openai client: whole answers, streams, and clients that leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from server.app import create_app
from server.engine.request import Mode
from tests.server.api.fake import CONTEXT, PIECES, FakeEngine, make_served, serving, wait_for

TEXT = "".join(PIECES)
TURNS: list[Any] = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "tiny", "messages": TURNS}
PROMPT = "<|begin|>user\nhi<|end_of_turn|><|begin|>assistant\n"


def read_events(response: httpx.Response) -> list[str]:
    """The data of every server-sent event."""
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def test_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TURNS)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    prompt = engine.requests[-1].prompt
    assert engine.requests[-1].max_tokens == CONTEXT - len(prompt)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 3)
    assert answer.usage.total_tokens == len(prompt) + 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert engine.requests[-1].id == f"{answer.id}-0"


def test_raw_response(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=TURNS, extra_headers={"X-Request-Id": "job-7"}
    )
    assert raw.headers["x-request-id"] == "job-7"
    answer = raw.parse()
    assert (answer.id, answer.choices[0].message.content) == ("chatcmpl-job-7", TEXT)
    with client.completions.with_streaming_response.create(model="tiny", prompt="hi", stream=True) as response:
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def test_prompt_is_the_chat_template(client: openai.OpenAI, engine: FakeEngine, served: Any) -> None:
    client.chat.completions.create(model="tiny", messages=TURNS)
    assert served.tokenizer.decode(engine.requests[-1].prompt) == PROMPT


def test_text_parts_read_as_their_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    in_parts = engine.requests[-1].prompt
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a\nb"}])
    assert engine.requests[-1].prompt == in_parts


def test_every_parameter_reaches_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=TURNS,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=-3,
        stop=["x", "y"],
        presence_penalty=1,
        frequency_penalty=-1,
        n=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={"top_k": 7, "strace": {"mode": "routed", "class": "code", "threshold": 0.8, "max_draft": 3}},
    )
    request = engine.requests[-1]
    shape = request.params
    assert (shape.temperature, shape.top_p, shape.top_k, shape.seed) == (0.5, 0.9, 7, -3)
    assert (shape.presence_penalty, shape.frequency_penalty) == (1, -1)
    assert (request.max_tokens, request.stop, request.mode) == (5, ("x", "y"), Mode.ROUTED)
    assert (request.class_name, request.threshold, request.max_draft) == ("code", 0.8, 3)


def test_defaults_are_openais(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model="tiny", messages=TURNS, extra_body={"temperature": None, "tools": None})
    request = engine.requests[-1]
    assert (request.params.temperature, request.params.top_p, request.params.seed, request.stop) == (1, 1, None, ())
    assert (request.mode, request.class_name, request.threshold, request.max_draft) == (Mode.AUTO, None, None, None)


@pytest.mark.parametrize(
    ("name", "mode", "class_name"),
    [("tiny", Mode.AUTO, None), ("tiny:code", Mode.AUTO, "code"), ("tiny:full", Mode.FULL, None)],
)
def test_model_name_chooses(
    client: openai.OpenAI, engine: FakeEngine, name: str, mode: Mode, class_name: str | None
) -> None:
    assert client.chat.completions.create(model=name, messages=TURNS).model == name
    assert (engine.requests[-1].mode, engine.requests[-1].class_name) == (mode, class_name)


def test_response_says_what_ran(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json=BODY | {"strace": {"class": "code"}})
    assert response.json()["strace"] == {
        "mode": "exact",
        "class": "code",
        "drafts": 2,
        "drafted": 4,
        "accepted": 3,
        "fallbacks": 1,
        "unverified": 0,
        "divergent": 0,
        "realised_speedup": 2,
        "risk": None,
        "bypass": None,
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream(http: httpx.Client, include_usage: bool) -> None:
    body = BODY | {"stream": True, "stream_options": {"include_usage": include_usage}}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end = read_events(response)
    chunks = [json.loads(event) for event in events]
    assert end == "[DONE]"
    assert {(c["id"], c["created"], c["object"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "chat.completion.chunk")
    }
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    with_text = [c["choices"][0] for c in chunks if c["choices"]]
    assert [c["delta"].get("content") for c in with_text] == ["", *PIECES, None]
    assert [c["finish_reason"] for c in with_text] == [None] * 4 + ["stop"]
    assert ["strace" in c for c in chunks] == [False] * (len(chunks) - 1) + [True]
    usages = [c["usage"] for c in chunks]
    assert usages[:-1] == [None] * (len(chunks) - 1)
    if include_usage:
        prompt_tokens = usages[-1]["prompt_tokens"]
        assert chunks[-1]["choices"] == []
        assert usages[-1] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 3,
            "total_tokens": prompt_tokens + 3,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
    else:
        assert usages[-1] is None


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=TURNS, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    whole = client.chat.completions.create(model="tiny", messages=TURNS)
    assert "".join(pieces) == whole.choices[0].message.content


def test_update_without_text_is_no_event(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(pieces=("a", "", "b")))
    with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
        assert len(read_events(response)) == len(["role", "a", "b", "finish", "[DONE]"])


def test_stream_that_breaks(connect: Callable[..., httpx.Client]) -> None:
    engine = FakeEngine(failure=RuntimeError("the secret of line 7"))
    http = connect(engine)
    with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
        *chunks, error, end = read_events(response)
    assert len(chunks) == 2
    assert json.loads(error)["error"]["code"] == "internal_error"
    assert "secret" not in error
    assert end == "[DONE]"
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=TURNS, stream=True)
        with pytest.raises(openai.APIError, match="log says why"):
            list(stream)


def test_client_that_leaves_a_stream(connect: Callable[..., httpx.Client]) -> None:
    engine = FakeEngine(endless=True)
    http = connect(engine)
    with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        while "Hel" not in next(lines):
            pass
        assert not engine.handles[0].cancelled.is_set()
    assert engine.handles[0].cancelled.wait(10)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_client_that_leaves_before_the_answer(connect: Callable[..., httpx.Client], path: str) -> None:
    engine = FakeEngine(endless=True)
    http = connect(engine)
    body = BODY if path.startswith("/v1/chat") else {"model": "tiny", "prompt": ["a", "b"]}
    with pytest.raises(httpx.ReadTimeout):
        http.post(path, json=body, timeout=0.5)
    wait_for(lambda: bool(engine.handles))
    assert all(handle.cancelled.wait(10) for handle in engine.handles)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_acceptance_in_vllms_shape(http: httpx.Client, path: str, stream: bool) -> None:
    body = {"messages": TURNS} if path.startswith("/v1/chat") else {"prompt": "hi"}
    body |= {"model": "tiny", "stream": stream, "strace": {"metrics": True}}
    if stream:
        with http.stream("POST", path, json=body) as response:
            *_, last, _ = read_events(response)
        answer = json.loads(last)
    else:
        answer = http.post(path, json=body).json()
    assert answer["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 2.5,
        "draft_acceptance_rate": 0.75,
        "acceptance_histogram": [0, 1, 1, 0, 0, 0, 0, 0, 0],
        "num_spec_steps": 2,
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 4,
        "num_spec_tokens": 8,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TURNS, n=3, seed=2**63 - 1, stream=stream)
    seeds = [request.params.seed for request in engine.requests[-3:]]
    if stream:
        texts = ["", "", ""]
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens == 9
        assert answer.usage.prompt_tokens == len(engine.requests[-1].prompt)
    assert texts == ["".join(PIECES)] * 3
    assert seeds[0] == 2**63 - 1
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up(stream: bool) -> None:
    engine = FakeEngine(endless=True)
    served = replace(make_served(engine), timeout=0.2)
    with serving(create_app(served)) as url, httpx.Client(base_url=url, timeout=20) as http:
        response = http.post("/v1/chat/completions", json=BODY | {"stream": stream})
        assert response.status_code == (200 if stream else 408)
        assert "0.2 seconds" in response.text
        assert engine.handles[0].cancelled.wait(10)
