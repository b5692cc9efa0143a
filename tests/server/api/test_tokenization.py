"""/tokenize and /detokenize undo each other and count what generation counts."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.api.fake import CONTEXT
from tests.server.api.test_bad_input import check_error


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(http: httpx.Client, text: str) -> None:
    told = http.post("/tokenize", json={"prompt": text}).json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), CONTEXT)
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}


def test_conversation_counts_as_it_is_billed(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    told = http.post("/tokenize", json={"model": "tiny:code", "messages": messages, "return_token_strs": True}).json()
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}).json()
    assert told["count"] == answer["usage"]["prompt_tokens"] == len(told["token_strs"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)
def test_field_at_fault_is_named(http: httpx.Client, path: str, body: Any, param: str) -> None:
    check_error(http.post(path, json=body), 400, param)


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    body = '{"prompt": "before \\ud800 after"}'
    answer = http.post("/tokenize", content=body, headers={"Content-Type": "application/json"})
    assert "surrogate" in check_error(answer, 400, None)["message"]
