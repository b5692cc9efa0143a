"""The API's types: OpenAI's requests and responses as far as they are served, and the `strace` extension.

A request field that is not declared here is refused by name, whether OpenAI knows it (`UNBUILT`) or nobody does. A null
stands for an absent field, as at OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

UNBUILT = frozenset(
    {
        "audio",
        "background",
        "conversation",
        "function_call",
        "functions",
        "include",
        "max_tool_calls",
        "modalities",
        "moderation",
        "prediction",
        "previous_response_id",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "suffix",
        "verbosity",
        "web_search_options",
    }
)
"""Fields of OpenAI's that this server does not have yet."""

StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$", description="a token id")]
ModeName = Literal["auto", "exact", "routed", "full"]
FinishReason = Literal["stop", "length", "tool_calls"]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Body(BaseModel):
    """What clients send: exact types, nothing undeclared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Reply(BaseModel):
    """What the server sends."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False


class StraceOptions(Body):
    """How to decode this request; what is left out is the server's choice."""

    mode: ModeName | None = Field(None, description="exact, routed, full or auto")
    class_name: str | None = Field(None, alias="class", description="prompt class whose subgraph drafts")
    threshold: float | None = Field(
        None, ge=0, le=1, description="routed: confidence from which a token is emitted unverified; promises nothing"
    )
    risk: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="routed: most mean divergence, kept with 95 % confidence; exact where not certified",
    )
    max_draft: int | None = Field(None, ge=0, description="most tokens drafted before a full pass; 0: none")
    metrics: bool = Field(False, description="whether the response has `metrics.speculative_decoding`, as vLLM's has")

    @model_validator(mode="after")
    def check_risk(self) -> StraceOptions:
        """A risk that nothing looks at would be a promise that nobody keeps."""
        if self.risk is not None and self.threshold is not None:
            raise PydanticCustomError("risk", "not with `threshold`, which promises none", {"field": "risk"})
        if self.risk is not None and self.mode in ("exact", "full"):
            raise PydanticCustomError("risk", "only with the mode `routed`", {"field": "risk"})
        return self


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """What an assistant called."""

    name: str
    arguments: str = Field(description="JSON")


class ToolCall(Body):
    """A call of a tool, as an answer has it and as later turns repeat it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of a conversation; the model's chat template decides which roles it takes."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    reasoning_content: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def check_role(self) -> Message:
        """Only an assistant that calls tools says nothing; only an assistant calls tools; an answer names its call."""
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            field = "tool_calls" if self.tool_calls else "reasoning_content"
            raise PydanticCustomError("role", "only an assistant has it", {"field": field})
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "is missing", {"field": "content"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool", "a tool's message needs it", {"field": "tool_call_id"})
        return self

    @property
    def text(self) -> str:
        """The content as one string, parts on lines of their own."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())


class Function(Body):
    """A function the model may call; `parameters` is a JSON schema, which it is held to where it must call or where any
    tool is `strict`."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool the model may use."""

    type: Literal["function"]
    function: Function


class FunctionChoice(Body):
    """The function that must be called."""

    name: FunctionName


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionChoice


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema; the answer follows it whether `strict` or not."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """What the text must follow, as vLLM has it: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(None, description="Lark as llguidance has it, or GBNF")
    json_object: Literal[True] | None = None

    @property
    def kind(self) -> str:
        """The one that is given."""
        return next(iter(self.model_dump(exclude_none=True, by_alias=True)))

    @model_validator(mode="after")
    def check_one(self) -> StructuredOutputs:
        """Several would contradict each other."""
        if len(self.model_dump(exclude_none=True)) != 1:
            names = ", ".join(field.alias or name for name, field in type(self).model_fields.items())
            message = f"exactly one of {names} is needed"
            raise PydanticCustomError("structured_outputs", message, {"param": "structured_outputs"})
        return self


class AnyRequest(Body):
    """What all generation endpoints take."""

    model: str
    stream: bool = False
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    strace: StraceOptions = StraceOptions()
    # These cannot change the output, so they are taken and left alone.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body: Any) -> Any:
        """A known field that is null counts as absent."""
        if not isinstance(body, dict):
            return body
        known = cls.model_fields.keys() | UNBUILT
        return {name: value for name, value in body.items() if value is not None or name not in known}


class GenerationRequest(AnyRequest):
    """What chat and text completions take."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(default_factory=list)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10, description="over prompt and answer; 1: none")
    min_p: float = Field(0.0, ge=0, le=1, description="least probability as a share of the greatest")
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = Field(False, description="go on behind the model's own end of text")
    min_tokens: int = Field(0, ge=0, description="tokens before which nothing of the two above may end the text")
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def check_formats(self) -> GenerationRequest:
        """Two formats would contradict each other."""
        if self.structured_outputs is not None and not isinstance(self.response_format, TextFormat | None):
            raise PydanticCustomError(
                "structured_outputs", "not with `response_format`", {"param": "structured_outputs"}
            )
        return self

    @model_validator(mode="after")
    def check_stream_options(self) -> GenerationRequest:
        """`stream_options` without a stream would be silently ignored otherwise."""
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "only allowed when `stream` is true", {"param": "stream_options"}
            )
        return self

    @property
    def callable(self) -> list[Tool]:
        """The tools that the model is told of."""
        return []

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are told beside a token's log-probability; None: not even that."""
        return None

    @property
    def candidates(self) -> int:
        """Texts to generate per prompt."""
        return self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`; without a token limit the answer may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to the chat template")

    @model_validator(mode="after")
    def check_limits(self) -> ChatRequest:
        """The old and the new name of the token limit must not contradict each other."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise PydanticCustomError("limits", "contradicts `max_tokens`", {"param": "max_completion_tokens"})
        return self

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatRequest:
        """Alternatives without log-probabilities would be silently ignored otherwise."""
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "only allowed with `logprobs`", {"param": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def check_tools(self) -> ChatRequest:
        """A choice among no tools would be silently ignored otherwise."""
        if self.tool_choice is not None and self.tools is None:
            raise PydanticCustomError("tool_choice", "only allowed with `tools`", {"param": "tool_choice"})
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tool_choice", "is not one of `tools`", {"param": "tool_choice.function.name"})
        return self

    @property
    def alternatives(self) -> int | None:
        """See GenerationRequest."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def callable(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def limit(self) -> int | None:
        """The token limit by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`: one prompt or several, as text or as token ids."""

    DEFAULT_LIMIT: ClassVar[int] = 16

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0, description="0 only with `echo`: the prompt is read and nothing added")
    echo: bool = Field(False, description="whether the text begins with the prompt")
    logprobs: int | None = Field(None, ge=0, le=20, description="alternatives beside each token's log-probability")
    best_of: int | None = Field(
        None, ge=1, le=128, description="texts per prompt of which the `n` most probable per token are answered"
    )

    @model_validator(mode="after")
    def check_empty(self) -> CompletionRequest:
        """Without the prompt there would be nothing in the answer."""
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "must be at least 1 without `echo`", {"param": "max_tokens"})
        return self

    @model_validator(mode="after")
    def check_best_of(self) -> CompletionRequest:
        """Which texts are the best is known at their ends."""
        if self.candidates < self.n:
            raise PydanticCustomError("best_of", "must be at least `n`", {"param": "best_of"})
        if self.candidates > self.n and self.stream:
            raise PydanticCustomError("best_of", "more than `n` cannot be streamed", {"param": "best_of"})
        return self

    @property
    def alternatives(self) -> int | None:
        """See GenerationRequest."""
        return 0 if self.logprobs is None and self.candidates > self.n else self.logprobs

    @property
    def candidates(self) -> int:
        """See GenerationRequest."""
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one per choice of the response."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]


class PromptDetails(Reply):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(0, description="tokens that were not read, since a text before began alike")


class CompletionDetails(Reply):
    """Of the answers' tokens."""

    reasoning_tokens: int = Field(0, description="of the thoughts, by encoding their text")


class Usage(Reply):
    """Token counts of a response, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: CompletionDetails = CompletionDetails()


class StraceReport(Reply):
    """What ran for one text, and how much faster than the full model alone."""

    mode: Literal["exact", "routed", "full"] = Field(description="the mode that ran")
    class_name: str = Field(alias="class")
    drafts: int = Field(description="rounds of drafting")
    drafted: int = Field(description="tokens proposed by the subgraph")
    accepted: int = Field(description="drafted tokens that the full model let stand")
    fallbacks: int = Field(description="full passes caused by low confidence or a rejected draft")
    unverified: int = Field(description="tokens emitted before a full pass saw them")
    divergent: float = Field(
        description="unverified tokens other than the full model's choice, their expected number if sampled"
    )
    realised_speedup: float | None = Field(description="the full model's time for these tokens / time taken")
    risk: float | None = Field(description="the mean divergence promised, if one is")
    bypass: str | None = Field(description="why the mode asked for, or drafting, was done without")


class SpeculativeDecoding(Reply):
    """Acceptance of one text in vLLM's shape; a step is a full pass over drafts, a length counts its own token too."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int] = Field(description="[j]: steps that accepted exactly j drafts")
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int = Field(description="most drafts of a step")


class RequestMetrics(Reply):
    """Measurements of one text."""

    speculative_decoding: SpeculativeDecoding | None = Field(description="null where nothing was drafted")


def is_none(value: object) -> bool:
    """For fields that are left out where they have nothing to say."""
    return value is None


class Logprob(Reply):
    """A token and its log-probability by the full model, before temperature and penalties."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="null where they are not known")


class TokenLogprobs(Logprob):
    """A token of the answer, with the best at its place."""

    top_logprobs: list[Logprob]


class ChatLogprobs(Reply):
    """Of an answer, or of a chunk's share of it."""

    content: list[TokenLogprobs]
    refusal: None = None


class CompletionLogprobs(Reply):
    """Of a continuation, behind an echoed prompt's; nothing is known of a prompt's first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AssistantMessage(Reply):
    """The answer of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=is_none)


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(Reply):
    """Response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    strace: StraceReport | list[StraceReport] = Field(description="one report, or for several answers one each")
    metrics: RequestMetrics | None = Field(None, exclude_if=is_none)


class FunctionDelta(Reply):
    """What a chunk adds to a call."""

    name: str | None = Field(None, exclude_if=is_none)
    arguments: str | None = Field(None, exclude_if=is_none)


class CallDelta(Reply):
    """A call that begins, or more of its arguments."""

    index: int
    id: str | None = Field(None, exclude_if=is_none)
    type: Literal["function"] | None = Field(None, exclude_if=is_none)
    function: FunctionDelta


class Delta(Reply):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = Field(None, exclude_if=is_none)
    content: str | None = Field(None, exclude_if=is_none)
    reasoning_content: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[CallDelta] | None = Field(None, exclude_if=is_none)


class ChunkChoice(Reply):
    """One answer's share of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Reply):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    strace: StraceReport | list[StraceReport] | None = Field(None, exclude_if=is_none)
    metrics: RequestMetrics | None = Field(None, exclude_if=is_none)


class CompletionChoice(Reply):
    """One prompt's continuation, or in a stream the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(Reply):
    """Response of `/v1/completions`, and each event of its stream, where `usage` and `strace` come last.

    `strace` is one report, or for several prompts a list with one per choice.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    strace: StraceReport | list[StraceReport] | None = Field(None, exclude_if=is_none)
    metrics: RequestMetrics | None = Field(None, exclude_if=is_none)


class TokenizeRequest(Body):
    """Body of `/tokenize`: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = Field(True, description="of a text; a chat template writes its own")
    add_generation_prompt: bool = Field(True, description="of a conversation")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def check_source(self) -> TokenizeRequest:
        """There must be one thing to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "either `prompt` or `messages` is needed", {"param": "prompt"})
        return self


class Tokenized(Reply):
    """Response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(Reply):
    """Response of `/detokenize`."""

    prompt: str


class ModelCard(Reply):
    """A name that requests may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["strace-llm"] = "strace-llm"
    max_model_len: int = Field(description="context in tokens")


class ModelList(Reply):
    """Response of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Reply):
    """Response of the health endpoints."""

    status: Literal["ok"] = "ok"


class Version(Reply):
    """Response of `/version`."""

    version: str


class ErrorDetail(Reply):
    """What was wrong, with the request's field at fault where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Reply):
    """Every error response."""

    error: ErrorDetail
