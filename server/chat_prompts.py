"""From messages and tools to the text of a prompt, through the model's own chat template.

A template that describes tools, with calls in our form, gets them, and calls and results as they
are. For any other, tools are described in the system message (`TOOLS`), calls are written as the
model is to write them (`tools.py`), and results come from the user between `<tool_response>` tags.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .chat_schemas import ChatMessage
from .content import text_of
from .errors import bad_request, missing
from .text import TextCodec
from .tools import CLOSING, OPENING, FunctionDefinition, ToolUse

TOOLS = """You can call functions. To call one, write a line of this form, and nothing after it:
<tool_call>{"name": "NAME", "arguments": {...}}</tool_call>
The functions, as JSON with a schema of their arguments:
"""


def chat_prompt(
    codec: TextCodec,
    messages: Sequence[ChatMessage],
    tools: ToolUse | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    add_special_tokens: bool = False,
    param: str = "messages",
) -> list[int]:
    """Token ids of a conversation. Raises ApiError or TextError, which name `param`."""
    if continue_final_message and messages[-1].role != "assistant":
        raise bad_request("continue_final_message needs an assistant message at the end", param)
    plain = [_plain(message, f"{param}[{i}]") for i, message in enumerate(messages)]
    declared: list[dict[str, Any]] = []
    if codec.template_has_tools:
        plain = [_with_parsed_arguments(message) for message in plain]
        if tools:
            declared = [_declared(function) for function in tools.functions]
    else:
        plain = [_without_tools(message) for message in plain]
        if tools:
            plain = _with_system(plain, TOOLS + "\n".join(map(_as_json, tools.functions)))
    text = codec.render_chat(
        plain,
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        tools=declared,
        template_kwargs=template_kwargs,
        param=param,
    )
    # The template has already written the special tokens of the model.
    return codec.encode(text, add_special_tokens=add_special_tokens, param=param)


def _plain(message: ChatMessage, param: str) -> dict[str, Any]:
    """As chat templates expect it: plain text, `system` for `developer`."""
    if message.content is None and message.role != "assistant":
        raise missing(f"{param}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise missing(f"{param}.tool_call_id")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message, f"{param}.content"),
    }
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    return plain


def _text(message: ChatMessage, param: str) -> str:
    if message.content is None:
        return message.refusal or ""
    refusal = {"refusal": "refusal"} if message.role == "assistant" else {}
    return text_of(message.content, {"text": "text", **refusal}, param)


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The API carries arguments as JSON text; templates want the object."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _parsed(call)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _parsed(call: Mapping[str, Any]) -> Any:
    text = call["function"]["arguments"]
    try:
        return json.loads(text)
    except ValueError:
        return text  # a model wrote it, and not as JSON: the template gets the text


def _without_tools(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and results as plain text of the roles that every template knows."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = [_written(call) for call in message.pop("tool_calls", ())]
    return {**message, "content": "\n".join(filter(None, [message["content"], *calls]))}


def _written(call: Mapping[str, Any]) -> str:
    body = {"name": call["function"]["name"], "arguments": _parsed(call)}
    return f"{OPENING}{json.dumps(body, ensure_ascii=False)}{CLOSING}"


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def _declared(function: FunctionDefinition) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


def _as_json(function: FunctionDefinition) -> str:
    return json.dumps(function.model_dump(exclude_none=True, exclude={"strict"}))
