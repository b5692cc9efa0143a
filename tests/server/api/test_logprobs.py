"""Log-probabilities in OpenAI's shapes, whole and streamed, with the prompt's where it is echoed."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest

from server.engine.logprobs import TokenLogprob
from server.engine.request import Update
from tests.server.api.fake import FakeEngine
from tests.tiny import make_tokenizer

H, I, A = (make_tokenizer().convert_tokens_to_ids(letter) for letter in "hia")
FIRST = TokenLogprob(A, -0.5, ((A, -0.5), (H, -1.5)))
LAST = TokenLogprob(I, -1.0, ((A, -0.25), (I, -1.0)))


@pytest.fixture
def client(connect: Callable[..., httpx.Client]) -> openai.OpenAI:
    prompt = [TokenLogprob(I, -2.0, ((H, -1.0), (I, -2.0)))]
    engine = FakeEngine(
        updates=[
            Update([A], [False], "", None, None, [FIRST], prompt),
            Update([I], [False], "ai", "stop", None, [LAST]),
        ]
    )
    return openai.OpenAI(base_url=f"{connect(engine).base_url}/v1", api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    told = answer.choices[0].logprobs.content
    assert [(each.token, each.logprob, each.bytes) for each in told] == [("a", -0.5, [97]), ("i", -1.0, [105])]
    assert [(top.token, top.logprob) for top in told[1].top_logprobs] == [("a", -0.25), ("i", -1.0)]
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        logprobs=True,
        top_logprobs=2,
        stream=True,  # type: ignore[arg-type]
    )
    streamed = [each for chunk in stream for c in chunk.choices if c.logprobs for each in c.logprobs.content]
    assert streamed == told


def test_completion_behind_its_prompt(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(model="tiny", prompt="hi", logprobs=2, echo=True).choices
    assert (choice.text, choice.logprobs.tokens) == ("hiai", ["h", "i", "a", "i"])
    assert choice.logprobs.token_logprobs == [None, -2.0, -0.5, -1.0]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.top_logprobs[1:] == [{"h": -1.0, "i": -2.0}, {"a": -0.5, "h": -1.5}, {"a": -0.25, "i": -1.0}]


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_completion(client: openai.OpenAI, echo: bool) -> None:
    choices = [
        choice
        for chunk in client.completions.create(
            model="tiny", prompt="hi", echo=echo, logprobs=None if echo else 2, stream=True
        )
        for choice in chunk.choices
    ]
    assert "".join(choice.text for choice in choices) == ("hiai" if echo else "ai")
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    assert offsets == ([] if echo else [0, 1])
