"""Runs in .venv-judges: asks a server through openai's client of the second major version and through litellm.

Prints one JSON document: per way of asking the text that came, and under `seen` whether a client got what it expects.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import litellm
import openai
import pydantic

MESSAGES: list[Any] = [{"role": "user", "content": "I want to find a restaurant in San Jose."}]
SHAPE: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 7}


def ask_openai(url: str) -> dict[str, str]:
    """Every call shape of the client."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="embedded", messages=MESSAGES, **SHAPE)
    chunks = client.chat.completions.create(model="embedded", messages=MESSAGES, stream=True, **SHAPE)
    raw = client.chat.completions.with_raw_response.create(model="embedded", messages=MESSAGES, **SHAPE)
    response = client.responses.create(
        model="embedded",
        input="I want to find a restaurant in San Jose.",
        max_output_tokens=24,
        temperature=0.8,
        extra_body={"seed": 7},
    )
    return {
        "openai": whole.choices[0].message.content or "",
        "openai, streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "openai, raw": raw.parse().choices[0].message.content or "",
        "openai, responses": response.output_text,
    }


class Person(pydantic.BaseModel):
    """What `parse` fills."""

    age: int
    kind: Literal["guest", "host"]


def look_closer(url: str) -> dict[str, bool]:
    """Per thing that a client relies on whether it was as the client expects it."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    parsed = client.chat.completions.parse(model="embedded", messages=MESSAGES, response_format=Person, seed=1)
    answered = client.responses.parse(model="embedded", input="Who?", text_format=Person, extra_body={"seed": 1})
    completion = client.completions.create(model="embedded", prompt=["Once", "Then"], echo=True, logprobs=2, n=2)
    usage: Any = {"include_usage": True}
    chunks = list(client.completions.create(model="embedded", prompt="Once", stream=True, stream_options=usage))
    events = list(client.responses.create(model="embedded", input="Who?", stream=True, max_output_tokens=8))
    best = client.completions.create(model="embedded", prompt="Once", n=1, best_of=3)
    return {
        "parse": isinstance(parsed.choices[0].message.parsed, Person),
        "responses, parse": isinstance(answered.output_parsed, Person),
        "completions": len(completion.choices) == 4 and all(c.logprobs is not None for c in completion.choices),
        "usage of a stream": chunks[-1].usage is not None and not chunks[-1].choices,
        "best_of": len(best.choices) == 1,
        "events": events[-1].type in ("response.completed", "response.incomplete"),
        "models": client.models.retrieve("embedded").id == client.models.list().data[0].id,
        "bad request": complains(openai.BadRequestError, "temperature", lambda: ask(client, temperature=9)),
        "unbuilt field": complains(openai.BadRequestError, "suffix", lambda: complete(client, suffix="x")),
        "unknown model": complains(openai.NotFoundError, "model", lambda: ask(client, model="gpt-9")),
    }


def ask(client: openai.OpenAI, **change: Any) -> object:
    """A chat."""
    return client.chat.completions.create(**({"model": "embedded", "messages": MESSAGES} | change))


def complete(client: openai.OpenAI, **change: Any) -> object:
    """A completion."""
    return client.completions.create(**({"model": "embedded", "prompt": "Once"} | change))


def complains(kind: type[openai.APIStatusError], param: str, asked: Callable[[], object]) -> bool:
    """Whether the client raises its own error, which names the field."""
    try:
        asked()
    except kind as error:
        return error.param == param
    return False


def ask_litellm(url: str) -> dict[str, str]:
    """Whole and streamed."""
    asked: dict[str, Any] = {"model": "openai/embedded", "api_base": url, "api_key": "none", "messages": MESSAGES}
    whole = litellm.completion(**asked, **SHAPE)
    chunks = litellm.completion(**asked, **SHAPE, stream=True)
    return {
        "litellm": whole.choices[0].message.content,
        "litellm, streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    }


if __name__ == "__main__":
    print(json.dumps({**ask_openai(sys.argv[1]), **ask_litellm(sys.argv[1]), "seen": look_closer(sys.argv[1])}))
