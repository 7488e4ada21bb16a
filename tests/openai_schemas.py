"""OpenAI's published schemas of its replies, held to the letter.

They come from the `openai` package (Apache-2.0), whose types OpenAI generates from the OpenAPI
document that it publishes. The package reads replies leniently: it takes unknown keys, and says
`Optional = None` of a key that may be missing, of one that may be null, and of both. Here an
unknown key is an error, and null stands only where the document has it (`NULLABLE`,
`ALWAYS_THERE`). What this server does beyond the document's schemas is named below,
with the reason.
"""

from copy import deepcopy
from functools import cache
from typing import Any, get_args

import jsonschema
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic.json_schema import models_json_schema

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}

# Keys that the document requires, with null where there is nothing to say.
ALWAYS_THERE = {
    "ChatCompletionMessage": ("content", "refusal"),
    "ChatCompletionTokenLogprob": ("bytes",),
    "ChoiceLogprobs": ("content", "refusal"),
    "CompletionChoice": ("logprobs",),
    "ErrorObject": ("code", "param"),
    "FunctionTool": ("parameters", "strict"),
    "Response": (
        "error", "incomplete_details", "instructions", "metadata", "temperature", "top_p",
    ),
    "ResponseErrorEvent": ("code", "param"),
    "StreamedChoice": ("logprobs",),
    "TopLogprob": ("bytes",),
    "chat_completion.Choice": ("logprobs",),
    "chat_completion_chunk.Choice": ("finish_reason",),
}  # fmt: skip
# Keys that the document allows to be missing and to be null.
NULLABLE = {
    "ChatCompletionChunk": ("usage",),
    "ChoiceDelta": ("content", "refusal"),
    "FunctionTool": ("description",),
    "Response": (
        "completed_at", "max_output_tokens", "max_tool_calls", "previous_response_id",
    ),
    "chat_completion_chunk.Choice": ("logprobs",),
    "reasoning.Reasoning": ("effort", "summary"),
}  # fmt: skip

# -- beyond the document's schemas -----------------------------------------------------------------

# Null all the same, in its examples or its words: what OpenAI's own servers send.
NULL_IN_EXAMPLES = {
    "Response": ("usage", "user"),
    "StreamedChoice": ("finish_reason",),  # before the end
    "StreamedCompletion": ("usage",),  # before the last chunk, with `include_usage`
}
# Lists whose items may be null: no probability of a prompt's first token is known.
NULL_ITEMS = {"Logprobs": ("token_logprobs", "top_logprobs")}
SHARE: Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
SPARSITY: Schema = {  # how the FFNs of an answer were computed
    "type": "object",
    "properties": {
        "mode": {"enum": ["dense", "exact", "predicted"]},
        "audited_tokens": {"type": "integer", "minimum": 0},
        "natural_sparsity": SHARE,
        "predicted_sparsity": SHARE,
        "recall": SHARE,
        "energy_recall": SHARE,
        "precision": SHARE,
    },
    "required": ["mode"],
    "additionalProperties": False,
}
EXTENSIONS: dict[str, Schema] = {
    "CompletionUsage": {"sparsity": SPARSITY},  # for requests with `sparsity`
    "ResponseUsage": {"sparsity": SPARSITY},
    "Model": {  # what vLLM says of a model, which its clients look for, and how sparse it is
        "max_model_len": {"type": "integer", "minimum": 1},
        "parent": NULL,
        "permission": {"type": "array", "maxItems": 0},
        "root": {"type": "string"},
        "sparsity": SPARSITY | {
            "properties": SPARSITY["properties"] | {"activation": {"type": "string"}}
        },
    },
    "Response": {"store": {"const": False}},  # in all of the document's examples
    # The document requires it, some releases of the package lack it.
    "ResponseFunctionCallArgumentsDoneEvent": {"name": {"type": "string"}},
    # A token may be a part of a character: only its bytes tell which.
    "response_text_delta_event.Logprob": {"bytes": {"type": "array"}},
    "response_text_delta_event.LogprobTopLogprob": {"bytes": {"type": "array"}},
    "response_text_done_event.Logprob": {"bytes": {"type": "array"}},
    "response_text_done_event.LogprobTopLogprob": {"bytes": {"type": "array"}},
}  # fmt: skip

# Of the document, but not of the package as a whole.
ERROR, MODELS, STREAMED_COMPLETION = "ErrorResponse", "ModelList", "StreamedCompletion"


def check(value: Any, name: str) -> Any:
    """`value`, if it is what the schema of that name says; jsonschema.ValidationError if not."""
    _validator(name).validate(value)
    return value


def check_event(event: Any) -> Any:
    """`event`, one of a stream of /v1/responses; KeyError for a kind that OpenAI does not have."""
    return check(event, _event_names()[event["type"]])


def _event_types() -> tuple[Any, ...]:
    union, *_ = get_args(ResponseStreamEvent)
    return get_args(union)


@cache
def _event_names() -> dict[str, str]:
    """'response.created' -> 'ResponseCreatedEvent', and so on."""
    return {
        _schemas()[event.__name__]["properties"]["type"]["const"]: event.__name__
        for event in _event_types()
    }


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": _schemas()})


@cache
def _schemas() -> dict[str, Schema]:
    """Each schema by its class's name, behind its module's where two classes have the same one."""
    types = (ChatCompletion, ChatCompletionChunk, Completion, Model, ErrorObject, Response)
    _, document = models_json_schema([(each, "validation") for each in (*types, *_event_types())])
    schemas: dict[str, Schema] = document["$defs"]
    schemas |= _not_in_the_package(schemas)
    for schema in schemas.values():
        _hold_to_the_letter(schema)
    for name, keys in ALWAYS_THERE.items():
        _find(schemas, name).setdefault("required", []).extend(keys)
    for table in (ALWAYS_THERE, NULLABLE, NULL_IN_EXAMPLES):
        for name, keys in table.items():
            properties = _find(schemas, name)["properties"]
            properties |= {key: _or_null(properties[key]) for key in keys}
    for name, keys in NULL_ITEMS.items():
        for key in keys:
            array = _find(schemas, name)["properties"][key]
            array["items"] = _or_null(array["items"])
    for name, more in EXTENSIONS.items():
        schema = _find(schemas, name)
        schema["properties"] = more | schema["properties"]
    return schemas


def _not_in_the_package(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """What the document has and the package lacks, and the chunks of a plain completion's stream,
    which for both are completions."""
    completion, choice = schemas["Completion"], schemas["CompletionChoice"]
    choices = {"type": "array", "items": {"$ref": "#/$defs/StreamedChoice"}}
    models = {"type": "array", "items": {"$ref": "#/$defs/Model"}}
    return {
        ERROR: _object(error={"$ref": "#/$defs/ErrorObject"}),
        MODELS: _object(object={"const": "list"}, data=models),
        STREAMED_COMPLETION: completion | {
            "properties": completion["properties"] | {"choices": choices}
        },
        "StreamedChoice": deepcopy(choice),
    }  # fmt: skip


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _hold_to_the_letter(schema: Schema) -> None:
    """No unknown keys, and no null for a key that may be missing."""
    if "properties" in schema:
        schema["additionalProperties"] = False
        schema["properties"] = {k: _without_null(v) for k, v in schema["properties"].items()}


def _without_null(schema: Schema) -> Schema:
    if schema.get("default", ...) is not None:
        return schema
    kinds = [kind for kind in schema["anyOf"] if kind != NULL]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _find(schemas: dict[str, Schema], name: str) -> Schema:
    """`module.Class` for what is only `Class` where no other class has that name."""
    ending = "__" + name.replace(".", "__")
    names = [full for full in schemas if full == name.split(".")[-1] or full.endswith(ending)]
    (full,) = names
    return schemas[full]
