"""The input of a response as messages of a chat, and its tools as a chat's."""

from collections.abc import Iterator, Sequence

from .. import tools as chat_tools
from ..chat_schemas import ChatMessage, FunctionCall, ToolCall
from ..content import ContentPart, text_of
from ..errors import bad_request, missing
from ..tools import FunctionName, Tool, ToolName
from .schemas import (
    AllowedResponseTools,
    ChosenTool,
    InputItem,
    ResponseRequest,
    ToolChoice,
)

TEXT_FIELDS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
}


def messages_of(body: ResponseRequest) -> list[ChatMessage]:
    """Raises ApiError that names the item."""
    messages = []
    if body.instructions:
        messages.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*messages, ChatMessage(role="user", content=body.input)]
    messages += _from_items(body.input)
    if not any(message.role != "system" for message in messages):
        raise bad_request("input must hold something to answer", "input")
    return messages


def _from_items(items: Sequence[InputItem]) -> Iterator[ChatMessage]:
    """An answer's text and the calls that follow it are one message of the assistant."""
    said: ChatMessage | None = None
    for i, item in enumerate(items):
        param = f"input[{i}]"
        message = _message(item, param)
        if message is None:
            continue
        if item.type == "function_call" and said is not None:
            said.tool_calls = [*(said.tool_calls or ()), *(message.tool_calls or ())]
            continue
        if said is not None:
            yield said
        said = message if message.role == "assistant" else None
        if said is None:
            yield message
    if said is not None:
        yield said


def _message(item: InputItem, param: str) -> ChatMessage | None:
    match item.type:
        case "reasoning":
            return None
        case "function_call":
            function = FunctionCall(
                name=_given(item.name, f"{param}.name"),
                arguments=_given(item.arguments, f"{param}.arguments"),
            )
            call = ToolCall(id=_given(item.call_id, f"{param}.call_id"), function=function)
            return ChatMessage(role="assistant", tool_calls=[call])
        case "function_call_output":
            return ChatMessage(
                role="tool",
                tool_call_id=_given(item.call_id, f"{param}.call_id"),
                content=_text(item.output, f"{param}.output"),
            )
        case "message":
            if item.role is None:
                raise missing(f"{param}.role")
            return ChatMessage(role=item.role, content=_text(item.content, f"{param}.content"))


def _given(value: str | None, param: str) -> str:
    if value is None:
        raise missing(param)
    return value


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None:
        raise missing(param)
    return text_of(content, TEXT_FIELDS, param)


def tool_use_of(body: ResponseRequest) -> chat_tools.ToolUse | None:
    """What the answer may call; None: nothing. Raises ApiError."""
    tools = [Tool(type="function", function=tool) for tool in body.tools or ()]
    parallel = body.parallel_tool_calls is not False
    return chat_tools.tool_use(tools, _choice(body.tool_choice), parallel=parallel)


def _choice(choice: ToolChoice | None) -> chat_tools.ToolChoice | None:
    match choice:
        case ChosenTool():
            return _named(choice)
        case AllowedResponseTools():
            allowed = chat_tools.AllowedTools(
                mode=choice.mode, tools=[_named(tool) for tool in choice.tools]
            )
            return chat_tools.AllowedToolsChoice(type="allowed_tools", allowed_tools=allowed)
        case _:
            return choice


def _named(tool: ChosenTool) -> ToolName:
    return ToolName(type="function", function=FunctionName(name=tool.name))
