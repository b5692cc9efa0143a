"""The loaded model as the routes see it: its name, what can be asked of it, and how text becomes an engine request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from server.api.errors import ApiError, invalid, not_ready
from server.api.protocol import GenerationRequest, Message, StraceOptions
from server.engine.request import Deliver, Mode, Request
from server.metrics import Metrics
from strace.sampling import SamplingParams


class Handle(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Stop working on it; without effect once it has finished."""


class Engine(Protocol):
    """What the API needs of an engine."""

    @property
    def running(self) -> bool:
        """Whether requests are taken and worked on."""

    def start(self) -> None:
        """Begin to work on requests."""

    def stop(self) -> None:
        """End the work; requests still in it get an exception."""

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Queue a request; `deliver` is called in the engine's thread. Raises Refused or Overloaded."""


@dataclass(frozen=True)
class Served:
    """One model behind the API.

    name: as requests call it; `name:CLASS` and `name:MODE` choose a class or mode by name alone. context: in tokens.
    classes: those with a subgraph. mode: for requests that name none. max_queue: requests that may wait.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int
    classes: tuple[str, ...]
    metrics: Metrics
    mode: Mode = Mode.AUTO
    max_queue: int = 64
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """Every model name that requests may use."""
        return [self.name, *(f"{self.name}:{suffix}" for suffix in (*Mode, *self.classes))]

    def require_ready(self) -> None:
        """Raise 503 unless the engine works."""
        if not self.engine.running:
            raise not_ready("the engine is not running")

    def route(self, model: str, options: StraceOptions) -> tuple[Mode, str | None]:
        """Mode and class that a request asks for by model name or options; a class of None is left to the engine."""
        if model not in self.names:
            message = f"model {model!r} does not exist; served: {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        suffix = model.removeprefix(self.name).removeprefix(":")
        named_mode = suffix if suffix in tuple(Mode) else None
        named_class = suffix if suffix and not named_mode else None
        mode = _agree("mode", named_mode, options.mode)
        class_name = _agree("class", named_class, options.class_name)
        if class_name is not None and class_name not in self.classes:
            known = ", ".join(self.classes) or "none"
            raise invalid(f"unknown class {class_name!r}; known: {known}", "strace.class")
        return Mode(mode or self.mode), class_name

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The conversation as the model's chat template writes it, ready for the answer."""
        turns: list[dict[str, Any]] = [
            message.model_dump(exclude_none=True) | {"content": message.text} for message in messages
        ]
        if self.tokenizer.chat_template is None:
            raise invalid(f"model {self.name!r} has no chat template; use /v1/completions", "messages")
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from error
        return self._encode(str(text), add_special_tokens=False)

    def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """A prompt as token ids, which may be given as such."""
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True) if prompt else []
        if any(token >= self.vocabulary for token in prompt):
            raise invalid(f"the prompt has token ids of {self.vocabulary} or more", "prompt")
        return prompt

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def make_request(
        self, body: GenerationRequest, prompt: list[int], limit: int | None, default: int | None, param: str, id: str
    ) -> Request:
        """The engine's request for one prompt.

        limit: tokens asked for; default: where none are, None for the rest of the context. param: the prompt's field.
        """
        mode, class_name = self.route(body.model, body.strace)
        room = self.context - len(prompt)
        if not prompt:
            raise invalid("the prompt is empty", param)
        if room < 1 or (limit or 0) > room:
            asked = f"{len(prompt)} tokens of prompt" + (f" and {limit} to generate" if limit else "")
            message = f"the context holds {self.context} tokens; the request needs {asked}"
            raise invalid(message, param if room < 1 else "max_tokens", "context_length_exceeded")
        return Request(
            id=id,
            prompt=prompt,
            params=SamplingParams(
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                seed=body.seed,
            ),
            max_tokens=limit or min(room, default or room),
            stop=body.stops,
            mode=mode,
            class_name=class_name,
            threshold=body.strace.threshold,
            max_draft=body.strace.max_draft,
        )


def _agree(what: str, named: str | None, option: str | None) -> str | None:
    """What the model name and the options say together."""
    if named and option and named != option:
        raise invalid(f"the model name asks for {what} {named!r}, `strace.{what}` for {option!r}", f"strace.{what}")
    return option or named


def served_model(request: HttpRequest) -> Served:
    """The model of the app that handles `request`."""
    served: Served = request.app.state.served
    return served
