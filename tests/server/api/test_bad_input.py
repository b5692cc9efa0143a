"""Every wrong request gets a 4xx with an OpenAI error object that names the field at fault."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Overloaded, Refused, Unavailable
from tests.server.api.fake import CONTEXT, FakeEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURN = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
GOOD_CHAT: dict[str, Any] = {"model": "tiny", "messages": [TURN]}
GOOD_COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "hi"}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


FORMATS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": schema_format({"uniqueItems": True})}, "response_format.json_schema.schema"),
    ({"response_format": schema_format({"type": "never"})}, "response_format.json_schema.schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "?"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"guided_regex": "a"}, "guided_regex"),
]
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "7"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": 3}, "stop"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"model": 3}, "model"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, "logit_bias.five"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"frobnicate": None}, "frobnicate"),
    ({"strace": {"class": "poetry"}}, "strace.class"),
    ({"strace": {"mode": "fast"}}, "strace.mode"),
    ({"strace": {"risk": 0}}, "strace.risk"),
    ({"strace": {"risk": 1.0}}, "strace.risk"),
    ({"strace": {"risk": "low"}}, "strace.risk"),
    ({"strace": {"risk": 0.1, "threshold": 0.9}}, "strace.risk"),
    ({"strace": {"risk": 0.1, "mode": "exact"}}, "strace.risk"),
    ({"strace": {"luck": 0.1}}, "strace.luck"),
    ({"strace": {"threshold": 1.1}}, "strace.threshold"),
    ({"strace": {"max_draft": -1}}, "strace.max_draft"),
    ({"strace": "exact"}, "strace"),
    ({"model": "tiny:code", "strace": {"class": "chat"}}, "strace.class"),
    ({"model": "tiny:exact", "strace": {"mode": "full"}}, "strace.mode"),
]
NAMED = {"type": "function", "function": {"name": "other"}}
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [TURN, {"role": "pirate", "content": "hi"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [TURN | {"tool_calls": []}]}, "messages[0].tool_calls"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"max_completion_tokens": -4}, "max_completion_tokens"),
    ({"messages": [TURN | {"tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [TURN | {"reasoning_content": "x"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
    ({"tools": [TOOL]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice.function.name",
    ),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"prompt": "hi"}, "prompt"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["hi", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [259]}, "prompt"),
    ({"prompt": ["hi"] * 5}, "prompt"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"best_of": 5}, "best_of"),
    ({"messages": [TURN]}, "messages"),
]
CASES = [
    *((CHAT, GOOD_CHAT | change, param) for change, param in BOTH + FORMATS + CHAT_ONLY),
    *((COMPLETIONS, GOOD_COMPLETION | change, param) for change, param in BOTH + FORMATS + COMPLETION_ONLY),
]


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> dict[str, Any]:
    """The error object of a response of which everything else is as expected."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["param"], error["code"]) == (param, code)
    return error


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_field_at_fault_is_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    error = check_error(http.post(path, json=body), 400, param)
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split("[")[0] in error["message"] or error["message"] == "the prompt is empty"


def test_unbuilt_and_unknown_fields_are_told_apart(http: httpx.Client) -> None:
    assert "not supported" in http.post(CHAT, json=GOOD_CHAT | {"reasoning_effort": "low"}).json()["error"]["message"]
    assert "unknown field" in http.post(CHAT, json=GOOD_CHAT | {"tolls": []}).json()["error"]["message"]


def test_what_is_known_is_listed(http: httpx.Client) -> None:
    message = http.post(CHAT, json=GOOD_CHAT | {"strace": {"class": "poetry"}}).json()["error"]["message"]
    assert "code" in message
    assert "chat" in message
    message = http.post(CHAT, json=GOOD_CHAT | {"strace": {"mode": "fast"}}).json()["error"]["message"]
    assert all(mode in message for mode in ("auto", "exact", "routed", "full"))


@pytest.mark.parametrize("body", ["{", '{"model": }', "", '{"model": "tiny",}', "\xff\xfe", "[" * 5000])
def test_malformed_json(http: httpx.Client, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    check_error(http.post(CHAT, content=body.encode("latin-1"), headers=headers), 400, None)


@pytest.mark.parametrize("body", [[], [1], "text", 3, None, True])
def test_body_that_is_no_object(http: httpx.Client, body: object) -> None:
    check_error(http.post(CHAT, json=body), 400, None)


def test_body_of_another_content_type(http: httpx.Client) -> None:
    check_error(http.post(CHAT, content=b'{"model": "tiny"}', headers={"Content-Type": "text/plain"}), 400, None)


@pytest.mark.parametrize("model", ["gpt-9", "tiny:", "tiny:poetry", "tiny:code:exact", "Tiny", "tin", ""])
@pytest.mark.parametrize(("path", "good"), [(CHAT, GOOD_CHAT), (COMPLETIONS, GOOD_COMPLETION)])
def test_unknown_model(http: httpx.Client, path: str, good: dict[str, Any], model: str) -> None:
    error = check_error(http.post(path, json=good | {"model": model}), 404, "model", "model_not_found")
    assert "tiny:exact" in error["message"]


def test_prompt_longer_than_the_context(http: httpx.Client) -> None:
    code = "context_length_exceeded"
    for length in (CONTEXT, CONTEXT + 1, 10 * CONTEXT):
        check_error(http.post(COMPLETIONS, json=GOOD_COMPLETION | {"prompt": "x" * length}), 400, "prompt", code)
    long = [{"role": "user", "content": "x" * CONTEXT}]
    check_error(http.post(CHAT, json=GOOD_CHAT | {"messages": long}), 400, "messages", code)
    too_many = GOOD_COMPLETION | {"max_tokens": CONTEXT - 1}
    check_error(http.post(COMPLETIONS, json=too_many), 400, "max_tokens", code)
    assert http.post(COMPLETIONS, json=GOOD_COMPLETION | {"max_tokens": CONTEXT - 2}).status_code == 200


def test_unknown_path_and_wrong_method(http: httpx.Client) -> None:
    check_error(http.get("/v1/nonsense"), 404, None, "unknown_url")
    response = http.get(CHAT)
    check_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_body_over_the_limit(http: httpx.Client) -> None:
    big = GOOD_COMPLETION | {"prompt": "x" * 30_000}
    check_error(http.post(COMPLETIONS, json=big), 413, None, "request_too_large")
    # Without a Content-Length the body is counted as it comes.
    pieces = (b" " * 1000 for _ in range(30))
    chunked = http.post(COMPLETIONS, content=pieces, headers={"Content-Type": "application/json"})
    check_error(chunked, 413, None, "request_too_large")


def test_body_declared_too_large_is_refused_unread(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20001\r\n\r\n")
        assert line.recv(12) == b"HTTP/1.1 413"


def test_message_without_chat_template(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(), chat_template=False)
    assert "no chat template" in check_error(http.post(CHAT, json=GOOD_CHAT), 400, "messages")["message"]


def test_chat_template_that_refuses(http: httpx.Client, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.tokenizer, "chat_template", "{{ raise_exception('no system turns here') }}")
    assert "no system turns here" in check_error(http.post(CHAT, json=GOOD_CHAT), 400, "messages")["message"]


def test_engine_refuses(connect: Callable[..., httpx.Client]) -> None:
    http = connect(FakeEngine(refusal=Refused("threshold is for routed", "threshold")))
    check_error(http.post(CHAT, json=GOOD_CHAT), 400, "strace.threshold")


@pytest.mark.parametrize("stream", [False, True])
def test_overload(connect: Callable[..., httpx.Client], stream: bool) -> None:
    http = connect(FakeEngine(refusal=Overloaded("the queue is full", retry_after=7)))
    response = http.post(CHAT, json=GOOD_CHAT | {"stream": stream})
    check_error(response, 429, None, "overloaded")
    assert response.headers["retry-after"] == "7"


def test_engine_that_is_not_running(connect: Callable[..., httpx.Client]) -> None:
    engine = FakeEngine()
    http = connect(engine)
    assert http.get("/health").status_code == 200
    engine.proven = False
    check_error(http.get("/health/ready"), 503, None, "not_ready")
    assert http.post(CHAT, json=GOOD_CHAT).status_code == 200
    engine.running = False
    for response in (http.post(CHAT, json=GOOD_CHAT), http.get("/health"), http.get("/health/ready")):
        check_error(response, 503, None, "not_ready")
    assert http.get("/health/live").status_code == 200


@pytest.mark.parametrize("where", ["refusal", "failure"])
def test_internal_error_is_logged_not_told(
    connect: Callable[..., httpx.Client], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    http = connect(FakeEngine(**{where: ZeroDivisionError("the secret of line 7")}))
    response = http.post(CHAT, json=GOOD_CHAT)
    check_error(response, 500, None, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "the secret of line 7" in caplog.text


def test_openai_client_sees_its_own_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], temperature=9)
    assert bad.value.param == "temperature"


@pytest.mark.parametrize(
    ("refusal", "kind", "status"),
    [
        (Refused("no", "prompt"), openai.BadRequestError, 400),
        (Overloaded("full", retry_after=3), openai.RateLimitError, 429),
        (Unavailable("stopping", retry_after=3), openai.InternalServerError, 503),
        (ZeroDivisionError(), openai.InternalServerError, 500),
    ],
)
def test_openai_clients_classes_of_what_the_engine_says(
    connect: Callable[..., httpx.Client], refusal: Exception, kind: type[openai.APIStatusError], status: int
) -> None:
    url = connect(FakeEngine(refusal=refusal), api_keys=["right"]).base_url
    asked: dict[str, Any] = {"model": "tiny", "messages": [TURN]}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(kind) as raised:
                client.chat.completions.create(**asked, stream=stream)
            assert raised.value.status_code == status
            assert raised.value.response.headers.get("retry-after") == ("3" if status in (429, 503) else None)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(**asked)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_no_json_value_in_any_field_breaks_the_server(http: httpx.Client) -> None:
    """Whatever stands in a field, the answer is a result or a 4xx error object."""
    fields = [*GOOD_CHAT, "strace", "stop", "seed", "max_tokens", "temperature", "stream_options", "metadata", "n"]

    @settings(max_examples=50)
    @given(field=st.sampled_from(fields), value=JSON)
    def check(field: str, value: object) -> None:
        response = http.post(CHAT, json=GOOD_CHAT | {field: value}) if _encodable(value) else None
        if response is not None and response.status_code != 200:
            assert 400 <= response.status_code < 500, response.text
            assert response.json()["error"]["message"]

    check()


def _encodable(value: object) -> bool:
    """Whether httpx can write it as JSON (it refuses NaN and infinities)."""
    try:
        httpx.Request("POST", "http://x", json=value)
    except ValueError:
        return False
    return True
