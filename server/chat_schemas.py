"""The request of /v1/chat/completions, and those that count or name its tokens."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .content import ContentPart
from .errors import bad_request
from .fields import Bool, Int, Refusals, is_empty, is_one_of
from .schemas import MAX_TOP_LOGPROBS, REFUSED, GenerationRequest, TokenIds
from .tools import Tool, ToolChoice, ToolUse, tool_use

NOT_CHAT = "it is a field of /v1/completions, not of chat completions"


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that an earlier answer made, as it was given out."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message of a conversation, which may call tools or bring back what one returned."""

    model_config = ConfigDict(extra="allow")
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(GenerationRequest):
    refused: ClassVar[Refusals] = REFUSED | {
        "echo": (is_empty, NOT_CHAT),
        "suffix": (is_empty, NOT_CHAT),
        "best_of": (is_one_of(1), NOT_CHAT),
        "prompt_logprobs": (is_empty, NOT_CHAT),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None  # wins over max_tokens
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Bool | None = None

    def tool_use(self) -> ToolUse | None:
        """What the answer may call; None: nothing. Raises ApiError."""
        return tool_use(
            self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False
        )

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        return self


class TokenizeRequest(BaseModel):
    """A prompt, or messages to put through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: Bool | None = None
    add_generation_prompt: Bool | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("send either prompt or messages", "prompt")
        return self


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: TokenIds
