"""Function tools: what a client declares, which of them may be called, and the form of a call.

A call is written `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, the form of Hermes and
Qwen models. Constrained decoding holds every model to it: once an answer opens a call, the name is
one that was declared and the arguments follow its schema.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from .errors import bad_request, missing, unsupported
from .fields import Bool
from .grammar_process import JSON_LAYOUT
from .grammars import GrammarSpec
from .structured import SchemaName, schema_text

MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer: a small model may not find the end by itself
OPENING, CLOSING = "<tool_call>", "</tool_call>"
NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


class FunctionDefinition(BaseModel):
    name: SchemaName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None

    @field_validator("parameters")
    @classmethod
    def _check_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("must be the schema of an object")
        return value


class Tool(BaseModel):
    type: str
    function: FunctionDefinition | None = None


class FunctionName(BaseModel):
    name: str


class ToolName(BaseModel):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | ToolName | AllowedToolsChoice


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call. `must_call`: it may not be plain text instead."""

    functions: tuple[FunctionDefinition, ...]
    must_call: bool
    max_calls: int

    def grammar(self, answer: GrammarSpec | None) -> GrammarSpec:
        """Text with calls at its end, or calls alone. `answer` is the form of text without calls.

        Raises ApiError where the two cannot be put into one grammar.
        """
        more = f"more{{0,{self.max_calls - 1}}}" if self.max_calls > 1 else ""
        rules = ['more: "\\n"? call', 'call: "<tool_call>" body']
        if self.must_call:
            rules.append(f"start: call {more}")
        elif answer is None:
            rules += [
                f"start: TEXT | opening body {more}",
                'opening[lazy]: TEXT "<tool_call>"',
                "TEXT: /(?s:.*)/",
            ]
        elif answer.kind == "json_schema":
            layout = JSON_LAYOUT | {"lenient": answer.is_lenient}
            form = _with_layout(json.loads(answer.text), layout)
            rules += [f"start: answer | call {more}", f"answer: %json {form}"]
        else:
            raise unsupported(answer.param, "only a JSON schema goes together with tools")
        bodies = " | ".join(f"body_{i}" for i in range(len(self.functions)))
        rules.append(f'body: "\\n"? ({bodies}) "\\n"? "</tool_call>"')
        for i, function in enumerate(self.functions):
            head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            schema = NO_PARAMETERS if function.parameters is None else function.parameters
            layout = JSON_LAYOUT | {"lenient": not function.strict}
            arguments = _with_layout({"type": "object"} | schema, layout)
            rules.append(f'body_{i}: {head} %json {arguments} "}}"')
        text = "\n".join(["%llguidance {}", *rules])
        return GrammarSpec("grammar", text, "tools", part=answer)


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, *, parallel: bool
) -> ToolUse | None:
    """Which functions this request may call; None: no calls. Raises ApiError."""
    functions = _functions(tools or ())
    must_call, max_calls = choice == "required", MAX_CALLS if parallel else 1
    if choice == "none" or (not functions and choice in (None, "auto")):
        return None
    if not functions:
        raise bad_request("tool_choice needs tools to choose from", "tool_choice")
    if isinstance(choice, ToolName):
        functions = _chosen(functions, [choice])
        must_call, max_calls = True, 1
    elif isinstance(choice, AllowedToolsChoice):
        functions = _chosen(functions, choice.allowed_tools.tools)
        must_call = choice.allowed_tools.mode == "required"
    return ToolUse(functions, must_call, max_calls)


def _functions(tools: Sequence[Tool]) -> tuple[FunctionDefinition, ...]:
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"tools may hold {MAX_TOOLS} functions, got {len(tools)}", "tools")
    functions = []
    for i, tool in enumerate(tools):
        if tool.type != "function":
            raise unsupported(f"tools[{i}].type", "this server calls functions only")
        if tool.function is None:
            raise missing(f"tools[{i}].function")
        functions.append(tool.function)
    if len({function.name for function in functions}) < len(functions):
        raise bad_request("tools hold two functions of the same name", "tools")
    return tuple(functions)


def _chosen(
    functions: Sequence[FunctionDefinition], chosen: Sequence[ToolName]
) -> tuple[FunctionDefinition, ...]:
    names = {tool.function.name for tool in chosen}
    if unknown := names - {function.name for function in functions}:
        name = min(unknown)[:100]
        raise bad_request(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
    return tuple(function for function in functions if function.name in names)


def _with_layout(schema: Any, layout: dict[str, Any]) -> str:
    if not isinstance(schema, dict):
        return json.dumps(schema)
    return schema_text(schema | {"x-guidance": layout}, "tools")
