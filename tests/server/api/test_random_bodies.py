"""Two hundred random bodies, sensible and not, to all endpoints of a real engine: an answer or a clear 4xx, in time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.output import CALL_FORMATS
from server.app import create_app
from server.engine.options import Options
from tests.server.api.fake import serving
from tests.server.api.real import EOS, KIND, make_real
from tests.server.api.test_bad_input import JSON
from tests.server.api.test_chat import read_events
from tests.server.engine.harness import make_engine, make_runner

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)
TURN = {"role": "user", "content": "größe"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1'}}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMAS: list[Any] = [
    {"enum": ["é", 1, None]},
    {"type": "array", "maxItems": 2},
    {"not": {}},
    {"type": 3},
    {"$ref": "#"},
]
SHARED: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1, 1.7, 2, 3],
    "top_p": [1, 0.3, 0, 1e-9],
    "top_k": [0, 1, 10**9, -1],
    "seed": [0, -1, 2**63 - 1, 2**63],
    "stream": [True, True, False],
    "strace": [
        {"mode": "exact", "metrics": True},
        {"mode": "routed", "threshold": 0.1, "class": "lame"},
        {"mode": "routed"},
        {"max_draft": 0},
        {"risk": 0.5},
        {"class": "none"},
    ],
    "user": ["me"],
    "metadata": [{"a": "b"}, {"a": 1}],
    "model": ["tiny:exact", "tiny:lame", "gpt"],
}
GENERATION: dict[str, list[Any]] = {
    "max_tokens": [1, 3, 40, 10**6, 0, -1],
    "stop": ["é", ["a", "b", "\ud800"], [], [""], ["x"] * 5],
    "presence_penalty": [2, -2, 0.5, 9],
    "frequency_penalty": [2, -2, 0.5],
    "repetition_penalty": [0.01, 10, 1.2, 0],
    "min_p": [1, 0.5, 2],
    "logit_bias": [{"5": 100, "7": -100}, {"300": 1}, {"x": 1}, {"5": 101}],
    "stop_token_ids": [[5], [300], [-1], list(range(64))],
    "ignore_eos": [True],
    "min_tokens": [1, 5, 10**6],
    "n": [2, 4, 128],
    "stream_options": [{"include_usage": True}, {}],
    "response_format": [
        {"type": "json_object"},
        {"type": "text"},
        *({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in SCHEMAS),
    ],
    "structured_outputs": [
        *({"regex": regex} for regex in ("[a-c]{1,9}", "(", "(a|b)*c", "\\p{L}+", "a{99999}", "(?=a)")),
        *({"grammar": grammar} for grammar in ('root ::= "a" | "b"', "start: start", "start: /x+/", "?")),
        {"choice": ["é", "日本"]},
        {"json": '{"type": "null"}'},
    ],
}
FIELDS: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": {
        **SHARED,
        **GENERATION,
        "messages": [
            [TURN],
            [TURN, {"role": "assistant", "tool_calls": [CALL]}],
            [{"role": "tool", "content": "x"}],
            [],
        ],
        "max_completion_tokens": [1, 9],
        "logprobs": [True],
        "top_logprobs": [0, 20, 21],
        "tools": [[TOOL], [TOOL, TOOL], []],
        "tool_choice": ["auto", "required", "none", {"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": [False],
        "chat_template_kwargs": [{"tools": 1}, {"add_generation_prompt": False}, {"x": [1]}],
    },
    "/v1/completions": {
        **SHARED,
        **GENERATION,
        "prompt": ["hi", ["a", "b"], [1, 2], [[1], [299]], [300], "", [], ["a"] * 99, "x" * 300],
        "echo": [True],
        "logprobs": [0, 20],
        "best_of": [1, 3, 9],
    },
    "/v1/responses": {
        **SHARED,
        "input": [
            "hi",
            [{"role": "user", "content": "hi"}],
            [{"type": "function_call_output", "call_id": "c", "output": "x"}],
        ],
        "instructions": ["be brief"],
        "max_output_tokens": [1, 30, 10**6],
        "tools": [[{"type": "function", **FUNCTION}], []],
        "tool_choice": ["required", {"type": "function", "name": "f"}],
        "text": [{"format": {"type": "json_object"}}, {"format": {"type": "json_schema", "name": "s", "schema": {}}}],
    },
    "/tokenize": {"prompt": ["hi", "\ud800", "x" * 999], "messages": [[TURN]], "return_token_strs": [True]},
    "/detokenize": {"tokens": [[1, 2], [], [299], [258, 300], [10**20]]},
}
NEEDED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}


@st.composite
def asked(draw: Any) -> tuple[str, Any]:
    """A path and a body: a few fields with values of theirs, now and then any JSON in one, or for all of it."""
    path = draw(st.sampled_from([*list(FIELDS)[:3] * 3, *list(FIELDS)[3:]]))
    if draw(st.integers(0, 19)) == 0:
        return path, draw(JSON)
    fields = FIELDS[path]
    names = draw(st.sets(st.sampled_from(sorted(fields)), max_size=5)) | ({NEEDED[path]} if path in NEEDED else set())
    body = {name: draw(st.sampled_from(fields[name])) for name in sorted(names)}
    body = {"model": "tiny"} | body
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from([*fields, "frobnicate", "audio"]))] = draw(JSON)
    return path, body


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    engine = make_engine(Options(draft_length=2, seed=0, max_waiting=8), stop_ids=[EOS], runner=make_runner(kind=KIND))
    served = make_real(engine, TEMPLATE, CALL_FORMATS["hermes"], context=96)
    with serving(create_app(served)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def test_an_answer_or_a_clear_4xx(http: httpx.Client) -> None:
    statuses: Counter[int] = Counter()

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(asked())
    def check(request: tuple[str, Any]) -> None:
        path, body = request
        # Lone surrogates and infinities too, which JSON's grammar allows or Python's parser takes.
        content = json.dumps(body).encode()
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        statuses[response.status_code] += 1
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, response.text
            error = response.json()["error"]
            assert error["message"]
            assert error["type"] == "invalid_request_error"
        elif response.headers["content-type"].startswith("text/event-stream"):
            check_stream(path, read_events(response))
        else:
            assert response.json()

    check()
    assert http.get("/health/ready").status_code == 200
    assert statuses[200] > 30, statuses
    assert statuses[400] > 30, statuses


def check_stream(path: str, events: list[str]) -> None:
    """It ends as it should, and what went wrong on the way is the request's fault."""
    if path != "/v1/responses":
        assert events.pop() == "[DONE]"
    told = [json.loads(event) for event in events]
    for event in told:
        if "error" in event and isinstance(event["error"], dict):
            assert event["error"]["type"] == "invalid_request_error", event
    if path == "/v1/responses":
        assert told[-1]["type"] in ("response.completed", "response.incomplete", "error")
