"""Every parameter over a socket and a real engine: streamed and whole say the same, drafts change nothing, and all of
it has the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai.types.chat as chat_types
import openai.types.responses as response_types
import pytest
from openai.types import Completion
from pydantic import TypeAdapter

from server.api.output import CALL_FORMATS
from server.api.protocol import ChatRequest, CompletionRequest
from server.app import create_app
from server.engine.options import Options
from tests.server.api.fake import serving
from tests.server.api.real import EOS, KIND, make_real
from tests.server.api.test_bad_input import check_error
from tests.server.api.test_chat import read_events
from tests.server.engine.harness import make_engine, make_runner

TEMPLATE = (
    "{% if tools %}<tool_call>{% endif %}{% if mood %}{{ mood }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "?"}]},
    COMPLETIONS: {"prompt": "?:"},
    RESPONSES: {"input": "?"},
}
FIXED: dict[str, Any] = {"seed": 7, "temperature": 1.3}
LONG = {"max_tokens": 40}
# ASCII letters only, so that stop strings find something.
LETTERS = {"logit_bias": {str(id): 9 for id in range(64, 92)}}
BOTH: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 9},
    "min_p": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.5},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "logit_bias": LETTERS,
    "seed": {"seed": -3},
    "n": {"n": 3},
    "stop": {"stop": ["a", "bc"], **LETTERS, **LONG},
    "stop_token_ids": {"stop_token_ids": list(range(64, 100)), **LONG},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {str(EOS): 6}, **LONG},
    "min_tokens": {"min_tokens": 12, "stop": ["a", "b"], "stop_token_ids": [*range(70, 90)], **LETTERS, **LONG},
    "max_tokens": {"max_tokens": 3},
    "regex": {"structured_outputs": {"regex": r"[a-f]{3,9}é\d{2}"}},
    "json_object": {"response_format": {"type": "json_object"}, "max_tokens": 30},
    "mode": {"strace": {"mode": "exact"}},
    "class": {"strace": {"class": "lame", "max_draft": 2}},
    "routed": {"strace": {"mode": "routed", "class": "lame", "threshold": 0.02}, **LONG},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    CHAT: {
        "max_completion_tokens": {"max_completion_tokens": 5},
        "logprobs": {"logprobs": True, "top_logprobs": 3},
        "tools": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        "chat_template_kwargs": {"chat_template_kwargs": {"mood": "glad"}},
    },
    COMPLETIONS: {
        "logprobs": {"logprobs": 3},
        "echo": {"echo": True},
        "echo, logprobs": {"echo": True, "logprobs": 2, "n": 2},
        "echo alone": {"echo": True, "logprobs": 2, "max_tokens": 0},
        "best_of": {"best_of": 2, "n": 2},
        "prompts": {"prompt": [[1, 2], [3]], "n": 2},
    },
    RESPONSES: {
        "temperature": {"temperature": 0.6},
        "top_p": {"top_p": 0.7},
        "max_output_tokens": {"max_output_tokens": 5},
        "text": {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 30},
    },
}
CASES = [(path, name, change) for path in (CHAT, COMPLETIONS) for name, change in {**BOTH, **OWN[path]}.items()]
CASES += [(RESPONSES, name, change) for name, change in OWN[RESPONSES].items()]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    # Without shared blocks, whose number in `usage` depends on what was asked before.
    options = Options(draft_length=3, seed=0, prefix_cache=False)
    engine = make_engine(options, stop_ids=[EOS], runner=make_runner(kind=KIND))
    served = make_real(engine, TEMPLATE, CALL_FORMATS["hermes"])
    with serving(create_app(served)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, path: str, change: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A whole answer."""
    response = http.post(path, json={"model": "tiny", **PROMPTS[path], **FIXED, **change, **more})
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    return whole


def stream(http: httpx.Client, path: str, change: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer, usage among them."""
    body = {"model": "tiny", **PROMPTS[path], **FIXED, **change, "stream": True}
    body |= {} if path == RESPONSES else {"stream_options": {"include_usage": True}}
    with http.stream("POST", path, json=body) as response:
        events = read_events(response)
    if path != RESPONSES:
        assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def add(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """A delta into what was told before: texts and lists grow, calls are told apart by their index."""
    for name, value in piece.items():
        before = whole.get(name)
        if name == "tool_calls":
            for call in value:
                add(whole.setdefault(name, {}).setdefault(call.pop("index"), {}), call)
        elif isinstance(value, dict):
            add(whole.setdefault(name, {}), value)
        elif (isinstance(before, str) and name not in ("role", "id", "type", "name")) or isinstance(before, list):
            whole[name] = before + value
        elif value is not None:
            whole[name] = value


def put_together(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that chunks say."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        add(choices.setdefault(choice["index"], {}), choice)
    return [choices[index] for index in sorted(choices)]


def strip(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice, whole or put together, without what differs between the two by design or by chance."""
    told = {name: value for name, value in choice.items() if value is not None}
    message = told.pop("message", None) or told.pop("delta", None)
    if message is not None:
        calls = message.get("tool_calls") or {}
        functions = [call["function"] for call in (calls.values() if isinstance(calls, dict) else calls)]
        told |= {"content": message.get("content") or "", "calls": functions}
    if (logprobs := told.get("logprobs")) is not None:
        told["logprobs"] = {name: value for name, value in logprobs.items() if value}
    return told


@pytest.mark.parametrize(("path", "name", "change"), CASES)
def test_streamed_is_whole_is_plain(http: httpx.Client, path: str, name: str, change: dict[str, Any]) -> None:
    whole, chunks = ask(http, path, change), stream(http, path, change)
    plain = ask(http, path, {**change, "strace": {"mode": "full"}})
    check_types(path, whole, chunks)
    if path == RESPONSES:
        last = chunks[-1]["response"]
        texts = [each["output"][0]["content"][0]["text"] for each in (whole, last, plain)]
        assert texts == [texts[0]] * 3
        assert (last["usage"], last["status"]) == (whole["usage"], whole["status"])
        assert "".join(e["delta"] for e in chunks if e["type"] == "response.output_text.delta") == texts[0]
        return
    told = [strip(choice) for choice in whole["choices"]]
    assert [strip(choice) for choice in put_together(chunks)] == told
    assert chunks[-1]["usage"] == whole["usage"]
    if name != "routed":
        assert [strip(choice) for choice in plain["choices"]] == told
    if name in ("stop", "stop_token_ids", "min_tokens", "regex"):
        assert "stop" in {choice["finish_reason"] for choice in whole["choices"]}, "the case shows nothing"


def check_types(path: str, whole: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
    """Raise where an answer is not of the openai package's types."""
    if path == RESPONSES:
        response_types.Response.model_validate(whole)
        events: TypeAdapter[Any] = TypeAdapter(response_types.ResponseStreamEvent)
        for chunk in chunks:
            events.validate_python(chunk)
    elif path == CHAT:
        chat_types.ChatCompletion.model_validate(whole)
        for chunk in chunks:
            chat_types.ChatCompletionChunk.model_validate(chunk)
    else:
        # The type has no null for an echoed prompt's first token, of which OpenAI's own answers say nothing either.
        Completion.model_validate_json(json.dumps(whole).replace("[null, ", "["))


def test_no_parameter_is_left_out() -> None:
    """Whoever adds a field to the API adds it here, or says here why it can change nothing."""
    idle = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    for path, body in ((CHAT, ChatRequest), (COMPLETIONS, CompletionRequest)):
        asked = {name for change in {**BOTH, **OWN[path]}.values() for name in change}
        asked |= {*PROMPTS[path], *FIXED, "model", "stream", "stream_options"}
        assert body.model_fields.keys() - asked - idle == set()


def score(choice: dict[str, Any]) -> float:
    logprobs: list[float] = choice["logprobs"]["token_logprobs"]
    return sum(logprobs) / len(logprobs)


def test_the_best_of_several(http: httpx.Client) -> None:
    """By log-probability per token, whose number is not the same for all; the text and its order are those of `n`."""
    change: dict[str, Any] = {"prompt": ["?:", "!"], "max_tokens": 12, "stop_token_ids": list(range(99, 140))}
    every = ask(http, COMPLETIONS, {**change, "n": 5, "logprobs": 0})
    best = ask(http, COMPLETIONS, {**change, "n": 2, "best_of": 5})
    wanted = []
    for first in (0, 5):
        ranked = sorted(every["choices"][first : first + 5], key=score, reverse=True)
        wanted += [choice["text"] for choice in ranked[:2]]
    assert [choice["text"] for choice in best["choices"]] == wanted
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"] == every["usage"]
    assert len(best["strace"]) == 4
    lengths = {len(choice["logprobs"]["tokens"]) for choice in every["choices"]}
    assert len(lengths) > 1


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_prompt_alone(http: httpx.Client, count: int) -> None:
    """What one token more says of the prompt, and nothing else."""
    shared = {"prompt": list(range(60, 60 + count)), "echo": True, "logprobs": 2}
    alone, more = (ask(http, COMPLETIONS, {**shared, "max_tokens": n}) for n in (0, 1))
    (choice,), (longer,) = alone["choices"], more["choices"]
    assert choice["logprobs"] == {name: values[:count] for name, values in longer["logprobs"].items()}
    assert (choice["finish_reason"], alone["usage"]["completion_tokens"]) == ("length", 0)
    assert longer["text"].startswith(choice["text"])
    assert len(choice["text"]) == count
    report = alone["strace"]
    assert (report["mode"], report["bypass"], report["realised_speedup"]) == (
        "full",
        "nothing is to be generated",
        None,
    )
    filled = ask(http, COMPLETIONS, {"prompt": [5] * 256, "max_tokens": 0, "echo": True})
    assert filled["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ],
)
def test_refused(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    check_error(http.post(COMPLETIONS, json={"model": "tiny", "prompt": "?", **change}), 400, param)


def test_log_probabilities_are_the_full_models_in_routed_too(http: httpx.Client) -> None:
    routed = {"strace": {"mode": "routed", "threshold": 0.0}, "max_tokens": 20, "logprobs": 1}
    whole = ask(http, COMPLETIONS, routed)
    assert whole["strace"]["mode"] == "exact"
    assert "log-probabilities are the full model's" in whole["strace"]["bypass"]
    plain = ask(http, COMPLETIONS, {**routed, "strace": {"mode": "full"}})
    assert whole["choices"] == plain["choices"]
    formed = ask(http, COMPLETIONS, {"strace": routed["strace"], **BOTH["regex"]})
    assert "structured output" in formed["strace"]["bypass"]
    assert ask(http, COMPLETIONS, {"strace": routed["strace"]})["strace"]["mode"] == "routed"


def test_the_bytes_of_a_text_are_those_of_its_tokens(http: httpx.Client) -> None:
    """Also where a character is split between tokens."""
    forced = {"structured_outputs": {"choice": ["größe 日本 🎉"]}, "logprobs": True, "top_logprobs": 1}
    (choice,) = ask(http, CHAT, forced)["choices"]
    spelt = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
    assert spelt.decode().startswith(choice["message"]["content"])
    assert choice["message"]["content"] == "größe 日本 🎉"
    deltas = [c["delta"].get("content") or "" for e in stream(http, CHAT, forced) for c in e["choices"]]
    assert not any("\ufffd" in delta for delta in deltas)
    assert len([delta for delta in deltas if delta]) > 3
