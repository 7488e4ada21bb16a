"""What OpenAI's published specification demands of the replies that this server gives: required
keys, types and allowed words, in JSON Schema. Written from the specification's text, in short."""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}
BYTES: Schema = {"type": ["array", "null"], "items": {"type": "integer", "maximum": 255}}


def obj(required: Schema, optional: Schema | None = None, *, closed: bool = False) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
    }
    return schema | {"additionalProperties": False} if closed else schema


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def word(*words: str) -> Schema:
    return {"enum": list(words)}


ERROR = obj(
    {"error": obj(
        {"message": {"type": "string", "minLength": 1}, "type": TEXT, "param": nullable(TEXT),
         "code": nullable(TEXT)},
        closed=True,
    )},
    closed=True,
)  # fmt: skip
USAGE = obj(
    {"prompt_tokens": INT, "completion_tokens": INT, "total_tokens": INT},
    {"prompt_tokens_details": obj({}, {"cached_tokens": INT, "audio_tokens": INT}),
     "completion_tokens_details": obj({}, {"reasoning_tokens": INT, "audio_tokens": INT})},
)  # fmt: skip

# -- chat completions ------------------------------------------------------------------------------

TOP = obj({"token": TEXT, "logprob": {"type": "number"}, "bytes": BYTES})
TOKEN = obj({**TOP["properties"], "top_logprobs": array(TOP)})
LOGPROBS = nullable(
    obj({"content": nullable(array(TOKEN)), "refusal": nullable(array(TOKEN))}, closed=True)
)
CHAT_REASON = word("stop", "length", "tool_calls", "content_filter", "function_call")
CALL = obj(
    {"id": TEXT, "type": word("function"), "function": obj({"name": TEXT, "arguments": TEXT})}
)
MESSAGE = obj(
    {"role": word("assistant"), "content": nullable(TEXT), "refusal": nullable(TEXT)},
    {"tool_calls": array(CALL, minItems=1)},
)
CHAT = obj(
    {
        "id": TEXT,
        "choices": array(obj({
            "finish_reason": CHAT_REASON, "index": INT, "message": MESSAGE, "logprobs": LOGPROBS,
        }), minItems=1),
        "created": INT,
        "model": TEXT,
        "object": word("chat.completion"),
    },
    {"usage": USAGE, "system_fingerprint": TEXT},
)  # fmt: skip
CALL_DELTA = obj(
    {"index": INT},
    {"id": TEXT, "type": word("function"),
     "function": obj({}, {"name": TEXT, "arguments": TEXT})},
)  # fmt: skip
DELTA = obj(
    {},
    {"role": word("assistant"), "content": nullable(TEXT), "refusal": nullable(TEXT),
     "tool_calls": array(CALL_DELTA, minItems=1)},
    closed=True,
)  # fmt: skip
CHUNK = obj(
    {
        "id": TEXT,
        "choices": array(obj(
            {"delta": DELTA, "finish_reason": nullable(CHAT_REASON), "index": INT},
            {"logprobs": LOGPROBS},
        )),
        "created": INT,
        "model": TEXT,
        "object": word("chat.completion.chunk"),
    },
    {"usage": nullable(USAGE), "system_fingerprint": TEXT},
)  # fmt: skip

# -- plain completions -----------------------------------------------------------------------------

TEXT_LOGPROBS = nullable(obj({}, {
    "tokens": array(TEXT),
    "token_logprobs": array({"type": ["number", "null"]}),  # the specification forgets the first
    "top_logprobs": array(nullable({"type": "object", "additionalProperties": {"type": "number"}})),
    "text_offset": array(INT),
}, closed=True))  # fmt: skip
TEXT_REASON = word("stop", "length", "content_filter")


def text_completion(reason: Schema) -> Schema:
    return obj(
        {
            "id": TEXT,
            "choices": array(obj({
                "finish_reason": reason, "index": INT, "logprobs": TEXT_LOGPROBS, "text": TEXT,
            })),
            "created": INT,
            "model": TEXT,
            "object": word("text_completion"),
        },
        {"usage": nullable(USAGE), "system_fingerprint": TEXT},
    )  # fmt: skip


COMPLETION = text_completion(TEXT_REASON)
PIECE = text_completion(nullable(TEXT_REASON))  # OpenAI's own streams have null before the end

# -- models ----------------------------------------------------------------------------------------

MODEL = obj({"id": TEXT, "object": word("model"), "created": INT, "owned_by": TEXT})
MODELS = obj({"object": word("list"), "data": array(MODEL)})

# -- responses -------------------------------------------------------------------------------------

ITEM_STATUS = word("in_progress", "completed", "incomplete")
RESPONSE_TOKEN = obj({**TOP["properties"], "top_logprobs": array(TOP)})
PART = obj({
    "type": word("output_text"), "text": TEXT, "annotations": array({}),
    "logprobs": array(RESPONSE_TOKEN),
})  # fmt: skip
ITEM: Schema = {"anyOf": [
    obj({"id": TEXT, "type": word("message"), "role": word("assistant"), "content": array(PART),
         "status": ITEM_STATUS}),
    obj({"id": TEXT, "type": word("function_call"), "call_id": TEXT, "name": TEXT,
         "arguments": TEXT, "status": ITEM_STATUS}),
]}  # fmt: skip
RESPONSE = obj(
    {
        "id": TEXT,
        "object": word("response"),
        "created_at": {"type": "number"},
        "error": nullable(obj({"code": TEXT, "message": TEXT})),
        "incomplete_details": nullable(
            obj({}, {"reason": word("max_output_tokens", "content_filter")})
        ),
        "instructions": nullable(TEXT),
        "metadata": nullable({"type": "object"}),
        "model": TEXT,
        "output": array(ITEM),
        "parallel_tool_calls": {"type": "boolean"},
        "temperature": nullable({"type": "number", "minimum": 0, "maximum": 2}),
        "tool_choice": {"type": ["string", "object"]},
        "tools": array(obj({
            "type": word("function"), "name": TEXT, "strict": {"type": ["boolean", "null"]},
            "parameters": {"type": ["object", "null"]},
        })),
        "top_p": nullable({"type": "number", "minimum": 0, "maximum": 1}),
    },
    {
        "status": word("completed", "failed", "in_progress", "cancelled", "queued", "incomplete"),
        "truncation": word("auto", "disabled"),
        "usage": nullable(obj({
            "input_tokens": INT,
            "input_tokens_details": obj({"cached_tokens": INT}),
            "output_tokens": INT,
            "output_tokens_details": obj({"reasoning_tokens": INT}),
            "total_tokens": INT,
        })),
        "max_output_tokens": {"type": ["integer", "null"]},
        "previous_response_id": nullable(TEXT),
    },
)  # fmt: skip
PLACE = {"item_id": TEXT, "output_index": INT}
IN_PART = {**PLACE, "content_index": INT}
EVENT_FIELDS: dict[str, Schema] = {
    "response.created": {"response": RESPONSE},
    "response.in_progress": {"response": RESPONSE},
    "response.completed": {"response": RESPONSE},
    "response.incomplete": {"response": RESPONSE},
    "response.failed": {"response": RESPONSE},
    "response.output_item.added": {"output_index": INT, "item": ITEM},
    "response.output_item.done": {"output_index": INT, "item": ITEM},
    "response.content_part.added": {**IN_PART, "part": PART},
    "response.content_part.done": {**IN_PART, "part": PART},
    "response.output_text.delta": {
        **IN_PART, "delta": TEXT, "logprobs": array(RESPONSE_TOKEN),
    },
    "response.output_text.done": {**IN_PART, "text": TEXT, "logprobs": array(RESPONSE_TOKEN)},
    "response.function_call_arguments.delta": {**PLACE, "delta": TEXT},
    "response.function_call_arguments.done": {**PLACE, "name": TEXT, "arguments": TEXT},
    "error": {"code": nullable(TEXT), "message": TEXT, "param": nullable(TEXT)},
}  # fmt: skip


def event(kind: str) -> Schema:
    """KeyError for a kind that the specification does not have."""
    return obj({"type": word(kind), "sequence_number": INT, **EVENT_FIELDS[kind]}, closed=True)
