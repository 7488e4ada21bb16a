"""The request of /v1/responses. What would need a memory, or a tool of the server's, is refused."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..content import ContentPart
from ..errors import missing
from ..fields import Bool, Int, Refusals, check_extra, is_empty, is_one_of
from ..grammars import GrammarSpec
from ..schemas import MAX_TOP_LOGPROBS, CommonFields
from ..structured import ANY_OBJECT, JsonSchema, SchemaName, schema_grammar
from ..tools import FunctionDefinition

NO_MEMORY = "this server keeps no responses; send the whole conversation as input"
REFUSED: Refusals = {
    "previous_response_id": (is_empty, NO_MEMORY),
    "conversation": (is_empty, NO_MEMORY),
    "background": (is_empty, NO_MEMORY),
    "prompt": (is_empty, "this server has no stored prompts; use instructions"),
    "truncation": (is_one_of("disabled"), "shorten the input instead"),
    "context_management": (is_empty, "shorten the input instead"),
}
LOGPROBS = "message.output_text.logprobs"


class InputItem(BaseModel):
    """A message, a call that an earlier response made, or what the called function returned.

    Earlier reasoning may stand between them, and is left out of the prompt.
    """

    model_config = ConfigDict(extra="allow")
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    strict: Bool | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    format: TextFormat | None = None

    def grammar(self) -> GrammarSpec | None:
        """The form of the answer; None: free text."""
        given = self.format
        if given is None or given.type == "text":
            return None
        if given.type == "json_object":
            return schema_grammar(ANY_OBJECT, "text.format")
        for name, value in (("name", given.name), ("schema", given.schema_)):
            if value is None:
                raise missing(f"text.format.{name}")
        assert given.schema_ is not None
        return schema_grammar(given.schema_, "text.format", is_lenient=not given.strict)


class ResponseTool(FunctionDefinition):
    """A function. The tools that OpenAI runs by itself (search, files, ...) are not here."""

    type: Literal["function"]


class ChosenTool(BaseModel):
    type: Literal["function"]
    name: str


class AllowedResponseTools(BaseModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenTool], Field(min_length=1)]


ToolChoice = Literal["none", "auto", "required"] | ChosenTool | AllowedResponseTools


class ResponseRequest(CommonFields):
    model_config = ConfigDict(extra="allow")
    ignored: ClassVar[set[str]] = {
        "max_tool_calls", "moderation", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "user",
    }  # fmt: skip

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Bool | None = None
    metadata: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is None and LOGPROBS not in (self.include or ()):
            return None
        return self.top_logprobs or 0

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        check_extra(self.model_extra or {}, REFUSED, self.ignored)
        return self
