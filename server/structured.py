"""Structured output: the fields that ask for it, and the one grammar that they mean.

`response_format` is OpenAI's. `structured_outputs` is vLLM's, and `json_schema`, `regex` and
`grammar` at the top level are other servers' names for the same. A request may use one of them.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from .closed_schemas import closed
from .errors import bad_request, missing
from .fields import Bool, Refusals, Text, check_extra, is_empty
from .grammars import GrammarSpec

JsonSchema = dict[str, Any] | Bool
ANY_OBJECT: dict[str, Any] = {"type": "object"}
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class NamedSchema(BaseModel):
    """A JSON Schema as `response_format` carries it.

    With `strict` a keyword that cannot be enforced is refused, without it such keywords are left
    out; what can be enforced is enforced in both.
    """

    name: SchemaName
    description: str | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    strict: Bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")  # llama.cpp's, with json_object

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise missing("response_format.json_schema")
        return self

    def grammar(self) -> GrammarSpec | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                schema = ANY_OBJECT if self.schema_ is None else self.schema_
                return schema_grammar(schema, "response_format", is_lenient=True)
            case "json_schema":
                assert self.json_schema is not None
                given = self.json_schema
                schema = ANY_OBJECT if given.schema_ is None else given.schema_
                return schema_grammar(schema, "response_format", is_lenient=not given.strict)


class StructuredOutputs(BaseModel):
    """One of the ways to say which form an answer must have."""

    model_config = ConfigDict(extra="allow")
    refused: ClassVar[Refusals] = {
        "structural_tag": (is_empty, "use tools, or a grammar"),
        "whitespace_pattern": (is_empty, "JSON has a fixed layout here"),
        "disable_additional_properties": (is_empty, "say so in the schema"),
    }
    ignored: ClassVar[set[str]] = {"disable_any_whitespace", "disable_fallback"}

    json_: JsonSchema | str | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: Bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        extra, within = self.model_extra or {}, "structured_outputs."
        check_extra(extra, self.refused, self.ignored, within=within)
        given = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(value is not None for value in given) != 1:
            raise bad_request(
                "structured_outputs must hold exactly one of json, regex, choice, grammar and "
                "json_object",
                "structured_outputs",
            )
        return self

    def spec(self) -> GrammarSpec:
        param = "structured_outputs"
        if self.regex is not None:
            return GrammarSpec("regex", self.regex, param)
        if self.choice is not None:
            return GrammarSpec("grammar", choice_grammar(self.choice), param)
        if self.grammar is not None:
            return GrammarSpec("grammar", self.grammar, param)
        schema = ANY_OBJECT if self.json_ is None else self.json_
        return schema_grammar(schema, param)


class StructuredFields(BaseModel):
    """The fields of a request that constrain its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: JsonSchema | None = None
    regex: Text | None = None
    grammar: Text | None = None

    def grammar_spec(self) -> GrammarSpec | None:
        """The form of the answer; None: free text. Raises ApiError if several are asked for."""
        specs = list(self._specs())
        if len(specs) > 1:
            names = " and ".join(spec.param for spec in specs)
            raise bad_request(f"an answer has one form; {names} exclude each other", specs[1].param)
        return specs[0] if specs else None

    def _specs(self) -> Iterator[GrammarSpec]:
        if self.response_format and (spec := self.response_format.grammar()):
            yield spec
        if self.structured_outputs:
            yield self.structured_outputs.spec()
        if self.json_schema is not None:
            yield schema_grammar(self.json_schema, "json_schema")
        if self.regex is not None:
            yield GrammarSpec("regex", self.regex, "regex")
        if self.grammar is not None:
            yield GrammarSpec("grammar", self.grammar, "grammar")


def schema_grammar(
    schema: JsonSchema | str, param: str, *, is_lenient: bool = False
) -> GrammarSpec:
    """`schema` as JSON text is parsed here, so that whoever reads `text` may rely on it."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{param} is not valid JSON: {error}", param) from error
    return GrammarSpec("json_schema", schema_text(schema, param), param, is_lenient)


def choice_grammar(choices: list[str]) -> str:
    """A Lark grammar of one of the texts; its string literals are JSON's."""
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def schema_text(schema: Any, param: str) -> str:
    """The schema that a model writes by, as JSON."""
    try:
        return json.dumps(closed(schema))
    except RecursionError:
        raise bad_request(f"{param} is nested too deeply", param) from None
