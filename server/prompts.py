"""From a request body to what the engine is asked: prompt token ids and sampling parameters."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime import SamplingParams

from .errors import ApiError, bad_request
from .generation import AnswerOptions
from .schemas import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest
from .text import TextCodec


def chat_prompt(codec: TextCodec, body: ChatCompletionRequest) -> list[int]:
    continues = bool(body.continue_final_message)
    if continues and body.messages[-1].role != "assistant":
        raise bad_request(
            "continue_final_message needs an assistant message at the end", "messages"
        )
    text = codec.render_chat(
        template_messages(body.messages),
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        template_kwargs=body.chat_template_kwargs,
    )
    # The template has already written the special tokens of the model.
    return codec.encode(text, add_special_tokens=False, param="messages")


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: plain text, `system` for `developer`."""
    made = []
    for i, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise bad_request(
                f"Missing required parameter: messages[{i}].content",
                f"messages[{i}].content",
                "missing_required_parameter",
            )
        if message.role == "tool" and message.tool_call_id is None:
            raise bad_request(
                f"Missing required parameter: messages[{i}].tool_call_id",
                f"messages[{i}].tool_call_id",
                "missing_required_parameter",
            )
        plain: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": _text_of(message, f"messages[{i}].content"),
        }
        if message.tool_calls:
            plain["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                plain[name] = getattr(message, name)
        made.append(plain)
    return made


def _text_of(message: ChatMessage, param: str) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    for j, part in enumerate(message.content):
        if part.type != "text":
            raise bad_request(
                f"content parts of type {part.type!r} are not supported; this model reads text",
                f"{param}[{j}].type",
                "unsupported_content_type",
            )
        if part.text is None:
            raise bad_request(
                f"Missing required parameter: {param}[{j}].text",
                f"{param}[{j}].text",
                "missing_required_parameter",
            )
    return "".join(part.text or "" for part in message.content)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The API carries arguments as JSON text; templates want the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return dict(call)  # a model wrote it, and not as JSON: the template gets the text
    return {**call, "function": {**function, "arguments": arguments}}


def completion_prompts(
    codec: TextCodec, body: CompletionRequest
) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each prompt's text (None when it came as ids) and ids."""
    made: list[tuple[str | None, tuple[int, ...]]] = []
    for prompt in body.prompts:
        text = prompt if isinstance(prompt, str) else None
        ids = tuple(codec.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids:
            raise bad_request("prompt must hold at least one token", "prompt")
        made.append((text, ids))
    return made


def check_room(num_prompt: int, limit: int | None, max_context: int, *, what: str) -> None:
    """Refuse what cannot fit; `what` is the field that holds the prompt."""
    start = f"This model's maximum context length is {max_context} tokens. However, "
    if num_prompt >= max_context:
        message = f"your {what} resulted in {num_prompt} tokens. Please reduce its length."
    elif limit is not None and num_prompt + limit > max_context:
        message = (
            f"you requested {num_prompt + limit} tokens ({num_prompt} in the {what}, {limit} in "
            "the completion). Please reduce the prompt or the completion."
        )
    else:
        return
    raise ApiError(400, start + message, param=what, code="context_length_exceeded")


def sampling_params(
    body: GenerationRequest,
    defaults: Mapping[str, float],
    *,
    index: int,
    max_tokens: int | None,
    num_logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of answer `index` of one prompt: with a seed each answer gets one of its own."""

    def value(name: str, fallback: float) -> float:
        asked = getattr(body, name)
        return float(defaults.get(name, fallback) if asked is None else asked)

    repetition = body.repeat_penalty if body.repetition_penalty is None else body.repetition_penalty
    if repetition is None:
        repetition = defaults.get("repetition_penalty", 1.0)
    seed = None if body.seed is None else (body.seed + index + 2**63) % 2**64 - 2**63
    return SamplingParams(
        temperature=value("temperature", 1.0),
        top_k=max(0, int(value("top_k", 0))),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        logit_bias=body.logit_bias or None,
    )


def answer_options(body: GenerationRequest) -> AnswerOptions:
    return AnswerOptions(
        stops=body.stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
        discard_tokens=body.max_tokens == 0,
    )
