"""Runs in .venv-judges: asks a server through openai's client of the second major version and through litellm.

Prints one JSON document: per way of asking the text that came.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
import openai

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
    try:
        client.chat.completions.create(model="embedded", messages=MESSAGES, temperature=9)
    except openai.BadRequestError as error:
        refused = error.param
    return {
        "openai": whole.choices[0].message.content or "",
        "openai, streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "openai, raw": raw.parse().choices[0].message.content or "",
        "openai, responses": response.output_text,
        "openai, refused field": refused or "",
    }


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
    print(json.dumps(ask_openai(sys.argv[1]) | ask_litellm(sys.argv[1])))
