"""From a request body to what the engine is asked: prompt token ids and sampling parameters."""

from collections.abc import Mapping

from runtime import SamplingParams

from .errors import ApiError, bad_request
from .generation import AnswerOptions
from .schemas import CompletionRequest, GenerationRequest
from .text import TextCodec


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


def answer_options(
    body: GenerationRequest, *, has_tools: bool = False, lists_end_token: bool = False
) -> AnswerOptions:
    return AnswerOptions(
        stops=body.stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
        discard_tokens=body.max_tokens == 0,
        has_tools=has_tools,
        lists_end_token=lists_end_token,
    )
