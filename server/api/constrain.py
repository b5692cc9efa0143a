"""What a request's `response_format`, `structured_outputs` and tools make of the text: the grammar it must follow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from server.api.output import THINK, THOUGHT, CallFormat
from server.api.protocol import (
    ChatRequest,
    Function,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    StructuredOutputs,
)
from server.engine.grammar import Part, behind_thoughts, choice_part, grammar_part, json_part, regex_part
from server.engine.request import Refused

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def constrain(body: GenerationRequest) -> tuple[list[Part], str] | None:
    """The grammar of a text and the field that asks for it, None where any text will do."""
    match body.response_format:
        case JsonObjectFormat():
            return [json_part({"type": "object"})], "response_format"
        case JsonSchemaFormat(json_schema=asked):
            schema = {"type": "object"} if asked.schema_ is None else asked.schema_
            return [json_part(schema)], "response_format.json_schema.schema"
    return None if body.structured_outputs is None else _structured(body.structured_outputs)


def _structured(asked: StructuredOutputs) -> tuple[list[Part], str]:
    param = f"structured_outputs.{asked.kind}"
    if asked.regex is not None:
        return [regex_part(asked.regex)], param
    if asked.choice is not None:
        return [choice_part(asked.choice)], param
    if asked.json_object is not None:
        return [json_part({"type": "object"})], param
    try:
        if asked.grammar is not None:
            return [grammar_part(asked.grammar)], param
        schema = json.loads(asked.json_) if isinstance(asked.json_, str) else asked.json_
        if not isinstance(schema, dict):
            raise ValueError("a schema is a JSON object")
    except (ValueError, RecursionError) as error:
        raise Refused(f"`{param}`: {error}", param) from error
    return [json_part(schema)], param


def constrain_chat(
    body: ChatRequest, form: CallFormat | None, tokenizer: PreTrainedTokenizerBase, thinks: bool, prompt: str
) -> tuple[list[Part], str] | None:
    """As `constrain`, with the calls of tools in a model's own `form`. thinks: the model may think first; `prompt` may
    have begun its thoughts."""
    grammar = constrain(body)
    if body.callable and form is not None:
        calls = Calls(form, tokenizer, not body.parallel_tool_calls or isinstance(body.tool_choice, NamedTool))
        grammar = _with_calls(grammar, body, calls)
    if grammar is None or not thinks:
        return grammar
    return behind_thoughts(grammar[0], THINK, THOUGHT, prompt.rstrip().endswith(THINK)), grammar[1]


def _with_calls(
    grammar: tuple[list[Part], str] | None, body: ChatRequest, calls: Calls
) -> tuple[list[Part], str] | None:
    functions = [tool.function for tool in body.callable]
    match body.tool_choice:
        case NamedTool(function=named):
            return calls.demand([f for f in functions if f.name == named.name]), "tools"
        case "required":
            return calls.demand(functions), "tools"
    if grammar is not None:
        parts, param = grammar
        either = [{"lark_grammar": "start: @said | @calls"}, {**parts[0], "name": "said"}, *parts[1:]]
        demanded = calls.demand(functions)
        return [*either, {**demanded[0], "name": "calls"}, *demanded[1:]], param
    return (calls.permit(functions), "tools") if any(f.strict for f in functions) else None


@dataclass(frozen=True)
class Calls:
    """Writes the grammar of calls in one format. single: at most one call."""

    form: CallFormat
    tokenizer: PreTrainedTokenizerBase
    single: bool

    def demand(self, functions: list[Function]) -> list[Part]:
        """Nothing but calls, at least one."""
        return [{"lark_grammar": f"start: {self._list()}\n{self._rules(functions)}"}, *self._arguments(functions)]

    def permit(self, functions: list[Function]) -> list[Part]:
        """Any text; what it calls is called rightly."""
        rules, begin, often = self._rules(functions), self.form.begin, "?" if self.single else "*"
        if not begin:  # a text is a call if it begins like one
            start = f"start: {self._list()} | OTHER\nOTHER: /([^{{ \\t\\r\\n](.|\\n)*)?/"
        elif self._mark(begin).startswith("<["):
            start = f"start: (TEXT {self._list()}){often} TEXT"
        else:
            head = f"head[lazy]: TEXT {json.dumps(begin)}"
            start = f"start: (head {self._behind_mark()}){often} TEXT\n{head}"
        return [{"lark_grammar": f"{start}\nTEXT: /(.|\\n)*/\n{rules}"}, *self._arguments(functions)]

    @property
    def _tagged(self) -> bool:
        """Mistral's newer way: name, mark, arguments."""
        return self.form.name == "mistral" and "[ARGS]" in str(self.tokenizer.chat_template)

    @property
    def _listed(self) -> bool:
        """Mistral's older way: one mark, a JSON list."""
        return self.form.name == "mistral" and not self._tagged

    def _list(self) -> str:
        """Calls with all that stands around them."""
        one = f"{self._mark(self.form.begin)} {self._behind_mark()}".strip()
        between = {"hermes": '"\\n" ', "llama3_json": '"; " '}.get(self.form.name, "")
        return one if self.single or self._listed else f"{one} ({between}{one})*"

    def _behind_mark(self) -> str:
        """A call, or where they stand in one list all of them, to the closing mark."""
        if self._listed:
            return '"[" call "]"' if self.single else '"[" call (", " call)* "]"'
        return '"\\n" call "\\n</tool_call>"' if self.form.name == "hermes" else "call"

    def _rules(self, functions: list[Function]) -> str:
        key = "parameters" if self.form.name == "llama3_json" else "arguments"
        rules = [f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
        for i, function in enumerate(functions):
            if self._tagged:
                rules.append(f"call{i}: {json.dumps(function.name)} {self._mark('[ARGS]')} @arguments{i}")
            else:
                before = f'{{"name": {json.dumps(function.name)}, "{key}": '
                rules.append(f'call{i}: {json.dumps(before)} @arguments{i} "}}"')
        return "\n".join(rules)

    def _arguments(self, functions: list[Function]) -> list[Part]:
        return [
            {**json_part(_NO_ARGUMENTS if f.parameters is None else f.parameters), "name": f"arguments{i}"}
            for i, f in enumerate(functions)
        ]

    def _mark(self, mark: str) -> str:
        """A mark as the grammar writes it: a special token by its id, which no text can stand for."""
        ids = [
            id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special and token.content == mark
        ]
        return f"<[{ids[0]}]>" if ids else json.dumps(mark) if mark else ""
