"""The loaded model as the routes see it: its name, what can be asked of it, and how text becomes an engine request."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from server.api.constrain import constrain, constrain_chat
from server.api.errors import ApiError, invalid, not_ready
from server.api.output import THINK, CallFormat, Reader
from server.api.protocol import ChatRequest, CompletionRequest, GenerationRequest, Message, StraceOptions
from server.engine.grammar import Grammar, Grammars, Part
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

    @property
    def ready(self) -> bool:
        """Whether it is running and the model has really produced a token."""

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
    classes: those that requests may name. mode: for requests that name none. max_queue: requests that may wait.
    cache: tokens that the KV cache holds. reload: reads the subgraphs again and gives the classes that there are then;
    it raises if that cannot be done, and nothing has changed.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int
    classes: tuple[str, ...]
    metrics: Metrics
    grammars: Grammars
    mode: Mode = Mode.AUTO
    max_queue: int = 64
    max_draft: int = 8
    cache: int = 0
    timeout: float | None = None
    calls: CallFormat | None = None
    thinks: bool = False
    reload: Callable[[], tuple[str, ...]] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """Every model name that requests may use."""
        return [self.name, *(f"{self.name}:{suffix}" for suffix in (*Mode, *self.classes))]

    def require_running(self) -> None:
        """Raise 503 unless the engine takes requests."""
        if not self.engine.running:
            raise not_ready("the engine is not running")

    def require_ready(self) -> None:
        """Raise 503 unless the engine has produced a token."""
        self.require_running()
        if not self.engine.ready:
            raise not_ready("the model has not produced a token yet")

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
        # Who names a risk asks for what is routed at it.
        default = self.mode if options.risk is None else Mode.ROUTED
        return Mode(mode or default), class_name

    def write_chat(self, messages: list[Message], generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the model's chat template writes it, ready for the answer. variables: the template's."""
        if self.tokenizer.chat_template is None:
            raise invalid(f"model {self.name!r} has no chat template; use /v1/completions", "messages")
        turns = [_as_turn(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt, **variables
            )
        except TemplateError as error:
            raise invalid(f"the model's chat template refuses these messages: {error}", "messages") from error
        return str(text)

    def write_request(self, body: ChatRequest) -> str:
        """The prompt of a chat request, its tools and template variables included."""
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys() | {"messages", "tools"}
        for name in body.chat_template_kwargs.keys() & own:
            raise invalid(f"`{name}` is not a variable of the chat template", f"chat_template_kwargs.{name}")
        if not body.callable:
            return self.write_chat(body.messages, **body.chat_template_kwargs)
        if self.calls is None or "tools" not in str(self.tokenizer.chat_template):
            raise invalid(f"`tools`: model {self.name!r} has no format of calls that this server knows", "tools")
        tools = [tool.model_dump(exclude_none=True) for tool in body.callable]
        return self.write_chat(body.messages, tools=tools, **body.chat_template_kwargs)

    def reader(self, body: ChatRequest, prompt: str) -> Reader:
        """What reads an answer to `prompt`."""
        thinking = self.thinks and prompt.rstrip().endswith(THINK)
        return Reader(self.calls if body.callable else None, self.thinks, thinking, body.parallel_tool_calls)

    def chat_grammar(self, body: ChatRequest, prompt: str) -> Grammar | None:
        """What an answer to `prompt` must follow."""
        return self._compile(constrain_chat(body, self.calls, self.tokenizer, self.thinks, prompt))

    def completion_grammar(self, body: CompletionRequest) -> Grammar | None:
        """What a continuation must follow."""
        return self._compile(constrain(body))

    def _compile(self, asked: tuple[list[Part], str] | None) -> Grammar | None:
        return None if asked is None else self.grammars.compile(*asked)

    def encode_chat(self, text: str) -> list[int]:
        """A conversation that `write_chat` wrote, as token ids."""
        return self.encode_text(text, add_special_tokens=False)

    def encode_prompt(self, prompt: str | list[int]) -> list[int]:
        """A prompt as token ids, which may be given as such."""
        if isinstance(prompt, str):
            return self.encode_text(prompt, add_special_tokens=True) if prompt else []
        if any(token >= self.vocabulary for token in prompt):
            raise invalid(f"the prompt has token ids of {self.vocabulary} or more", "prompt")
        return prompt

    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        """Text as token ids.

        Raises:
            ApiError: half a surrogate pair, which JSON can write, is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise invalid("the text has half a surrogate pair, which is no character") from None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self.encode_text(text, add_special_tokens=False)) if text else 0

    def make_requests(
        self,
        body: GenerationRequest,
        prompt: list[int],
        limit: int | None,
        default: int | None,
        param: str,
        id: str,
        grammar: Grammar | None = None,
    ) -> list[Request]:
        """The engine's requests for one prompt, one per answer asked for; a seed gives each answer one of its own.

        limit: tokens asked for; default: where none are, None for the rest of the context. param: the prompt's field.
        """
        request = replace(self._make_request(body, prompt, limit, default, param, id), grammar=grammar)
        return [
            replace(request, id=f"{id}-{i}", params=replace(request.params, seed=_seed_of(body.seed, i)))
            for i in range(body.candidates)
        ]

    def _make_request(
        self, body: GenerationRequest, prompt: list[int], limit: int | None, default: int | None, param: str, id: str
    ) -> Request:
        mode, class_name = self.route(body.model, body.strace)
        room = self.context - len(prompt)
        if not prompt:
            raise invalid("the prompt is empty", param)
        least = 1 if limit is None else limit
        if least > room:
            asked = f"{len(prompt)} tokens of prompt" + (f" and {limit} to generate" if limit else "")
            message = f"the context holds {self.context} tokens; the request needs {asked}"
            raise invalid(message, param if room < min(least, 1) else "max_tokens", "context_length_exceeded")
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
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                logit_bias=tuple(sorted((int(id), bias) for id, bias in body.logit_bias.items())),
            ),
            max_tokens=min(room, default or room) if limit is None else limit,
            stop=body.stops,
            mode=mode,
            class_name=class_name,
            threshold=body.strace.threshold,
            risk=body.strace.risk,
            max_draft=body.strace.max_draft,
            stop_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
            logprobs=body.alternatives,
            prompt_logprobs=isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None,
            specials=self.calls is not None and self.calls.special and bool(body.callable),
        )


def _as_turn(message: Message) -> dict[str, Any]:
    """A message as chat templates know it: content as one string, arguments of calls as objects where they are."""
    turn = message.model_dump(exclude_none=True) | {"content": message.text}
    for call in turn.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            continue
    return turn


def _seed_of(seed: int | None, answer: int) -> int | None:
    """The seed of an answer: the first takes the request's own."""
    return None if seed is None else (seed + answer * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63


def _agree(what: str, named: str | None, option: str | None) -> str | None:
    """What the model name and the options say together."""
    if named and option and named != option:
        raise invalid(f"the model name asks for {what} {named!r}, `strace.{what}` for {option!r}", f"strace.{what}")
    return option or named


def served_model(request: HttpRequest) -> Served:
    """The model of the app that handles `request`."""
    served: Served = request.app.state.served
    return served
