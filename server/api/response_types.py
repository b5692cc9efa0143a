"""The types of `/v1/responses`, as far as they are served: stateless, text and functions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol import (
    AnyRequest,
    Body,
    CalledFunction,
    ChatRequest,
    Function,
    FunctionChoice,
    FunctionName,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedSchema,
    NamedTool,
    PromptDetails,
    Reply,
    RequestMetrics,
    StraceReport,
    TextFormat,
    Tool,
    ToolCall,
    is_none,
)

Status = Literal["in_progress", "completed", "incomplete"]


class Item(Body):
    """A piece of the input. Clients repeat what they were given, fields that are null and unknown here among it."""

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body: Any) -> Any:
        """A null counts as absent."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class InputText(Item):
    """A piece of a message, the client's own or one that it repeats from an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Item):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText], Field(min_length=1)]
    id: str | None = None
    status: Status | None = None


class InputCall(Item):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class InputCallOutput(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: Status | None = None


class InputReasoning(Item):
    """Thoughts of an earlier answer; they are left out, as OpenAI does."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = Field(default_factory=list)
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Body):
    """A function the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: FunctionName


class SchemaFormat(NamedSchema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]


class TextOptions(Item):
    """How the answer is written."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] = TextFormat(
        type="text"
    )

    @property
    def as_chat(self) -> TextFormat | JsonObjectFormat | JsonSchemaFormat:
        """The same in the words of `/v1/chat/completions`."""
        if not isinstance(self.format, SchemaFormat):
            return self.format
        named = NamedSchema(**self.format.model_dump(exclude={"type"}, by_alias=True))
        return JsonSchemaFormat(type="json_schema", json_schema=named)


class ResponsesRequest(AnyRequest):
    """Body of `/v1/responses`. Nothing is kept between requests: the whole conversation is in `input`."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[FunctionTool], Field(max_length=128)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    truncation: Literal["disabled"] = "disabled"

    @model_validator(mode="after")
    def check_tools(self) -> ResponsesRequest:
        """What must be called must be there."""
        choice = self.tool_choice
        if isinstance(choice, FunctionToolChoice) and choice.name not in {tool.name for tool in self.tools}:
            raise PydanticCustomError("tool_choice", "is not one of `tools`", {"param": "tool_choice.name"})
        if choice == "required" and not self.tools:
            raise PydanticCustomError("tool_choice", "only allowed with `tools`", {"param": "tool_choice"})
        return self

    def as_chat(self) -> ChatRequest:
        """The same request to `/v1/chat/completions`."""
        tools = [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools
        ] or None
        choice = self.tool_choice
        if isinstance(choice, FunctionToolChoice):
            chosen: Any = NamedTool(type="function", function=FunctionChoice(name=choice.name))
        else:
            chosen = choice if tools else None
        return ChatRequest(
            model=self.model,
            messages=self.messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            tools=tools,
            tool_choice=chosen,
            response_format=self.text.as_chat,
            parallel_tool_calls=self.parallel_tool_calls,
            strace=self.strace,
        )

    @property
    def messages(self) -> list[Message]:
        """The conversation in the words of `/v1/chat/completions`; calls side by side are one turn."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        calls: list[ToolCall] = []
        for item in self.input:
            if isinstance(item, InputCall):
                function = CalledFunction(name=item.name, arguments=item.arguments)
                calls.append(ToolCall(id=item.call_id, function=function))
                continue
            if calls:
                messages.append(Message(role="assistant", tool_calls=calls))
                calls = []
            if isinstance(item, InputCallOutput):
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
            elif isinstance(item, InputMessage):
                text = item.content if isinstance(item.content, str) else "\n".join(part.text for part in item.content)
                messages.append(Message(role=item.role, content=text))
        return [*messages, Message(role="assistant", tool_calls=calls)] if calls else messages


class OutputText(Reply):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class ReasoningText(Reply):
    """The text of thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputMessage(Reply):
    """An answer."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = Field(default_factory=list)


class OutputReasoning(Reply):
    """Thoughts."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status = "in_progress"
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningText] = Field(default_factory=list)


class OutputCall(Reply):
    """A call of a function."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputDetails(PromptDetails):
    """Of the prompt's tokens."""

    cache_write_tokens: Literal[0] = Field(0, description="nothing is billed for writing the cache")


class OutputDetails(Reply):
    """Of the answer's tokens."""

    reasoning_tokens: int = Field(0, description="of the thoughts, by encoding their text")


class ResponseUsage(Reply):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(Reply):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(Reply):
    """Response of `/v1/responses`."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputItem]
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | FunctionToolChoice
    tools: list[FunctionTool]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    strace: StraceReport | None = Field(None, exclude_if=is_none)
    metrics: RequestMetrics | None = Field(None, exclude_if=is_none)


class Event(Reply):
    """One event of a streamed response; its further fields depend on the type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
