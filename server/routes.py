"""POST /v1/chat/completions and /v1/completions. One path makes streams and whole replies."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request, Response

from runtime import Request as EngineRequest
from runtime import SamplingParams
from runtime.errors import HotneuronError

from .errors import ApiError, as_api_error, bad_request
from .generation import Answer, Delta, Generation
from .layouts import ChatFormat, CompletionFormat, ReplyHead, make_echo, make_usage
from .prompts import (
    answer_options,
    chat_prompt,
    check_room,
    completion_prompts,
    sampling_params,
)
from .replies import ChatCompletion, ChatCompletionChunk, Completion
from .schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from .state import ServerState, server_state
from .streaming import DONE, PING, EventStream, unless_disconnected

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1")


@router.post("/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    state = server_state(request)
    num_choices = _check(state, body, num_prompts=1)
    prompt_ids = tuple(await asyncio.to_thread(chat_prompt, state.codec, body))
    check_room(len(prompt_ids), body.token_limit, state.engine.max_context, what="messages")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    head = _head(state, "chatcmpl-")
    params = [
        sampling_params(
            body,
            state.config.default_sampling,
            index=i,
            max_tokens=body.token_limit,
            num_logprobs=num_logprobs,
        )
        for i in range(num_choices)
    ]
    generation = _generation(state, head, body, [prompt_ids] * num_choices, params)
    layout = ChatFormat(state.codec, head, num_choices, num_logprobs is not None)
    return await _respond(request, body, generation, layout, len(prompt_ids))


@router.post("/completions", response_model=Completion)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    state = server_state(request)
    n = _check(state, body, num_prompts=len(body.prompts)) // len(body.prompts)
    prompts = await asyncio.to_thread(completion_prompts, state.codec, body)
    for _, ids in prompts:
        check_room(len(ids), body.token_limit, state.engine.max_context, what="prompt")
    head = _head(state, "cmpl-")
    params = [
        sampling_params(
            body,
            state.config.default_sampling,
            index=i,
            max_tokens=max(1, body.token_limit),
            num_logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for i in range(n)
    ]
    ids_of_choices = [ids for _, ids in prompts for _ in range(n)]
    echoes = [
        make_echo(state.codec, text, ids) if body.echo else None
        for text, ids in prompts
        for _ in range(n)
    ]
    generation = _generation(state, head, body, ids_of_choices, params * len(prompts))
    layout = CompletionFormat(state.codec, head, body.logprobs is not None, echoes)
    return await _respond(request, body, generation, layout, sum(len(ids) for _, ids in prompts))


def _check(state: ServerState, body: GenerationRequest, *, num_prompts: int) -> int:
    """Refuse what this server will not take on; the number of answers otherwise."""
    state.check_model(body.model)
    n = body.n or 1
    if n > state.config.max_n:
        raise bad_request(f"n must be at most {state.config.max_n}, got {n}", "n")
    most = state.engine.config.max_batch + state.engine.config.max_queue
    if n * num_prompts > most:
        raise bad_request(
            f"{num_prompts} prompts with n = {n} are {n * num_prompts} answers; one request may "
            f"ask for {most} (batch and queue of this server)",
            "prompt" if num_prompts > 1 else "n",
        )
    return n * num_prompts


def _head(state: ServerState, prefix: str) -> ReplyHead:
    return ReplyHead(prefix + uuid.uuid4().hex, state.config.model_name, state.system_fingerprint)


def _generation(
    state: ServerState,
    head: ReplyHead,
    body: GenerationRequest,
    prompt_ids: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
) -> Generation:
    generation = Generation(state.engine, state.metrics, poll_seconds=state.config.ping_seconds)
    options = answer_options(body)
    for i, (ids, sampling) in enumerate(zip(prompt_ids, params, strict=True)):
        answer = Answer(i, state.codec, options)
        generation.add(EngineRequest(f"{head.id}-{i}", ids, sampling), answer)
    return generation


async def _respond(
    request: Request,
    body: GenerationRequest,
    generation: Generation,
    layout: ChatFormat | CompletionFormat,
    num_prompt_tokens: int,
) -> Response:
    generation.submit()
    if body.stream:
        events = _events(body, generation, layout, num_prompt_tokens)
        return EventStream(events, on_close=generation.close)
    try:
        deltas = await unless_disconnected(request.receive, _collect(generation))
    finally:
        generation.close()
    total = make_usage(num_prompt_tokens, generation.num_completion_tokens)
    reply = layout.whole(deltas, total)
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")


async def _collect(generation: Generation) -> list[Delta]:
    return [delta async for delta in generation.deltas() if delta is not None]


async def _events(
    body: GenerationRequest,
    generation: Generation,
    layout: ChatFormat | CompletionFormat,
    num_prompt_tokens: int,
) -> AsyncIterator[str]:
    """The lines of a stream. What fails after its start is told in it: the status is sent."""
    options = body.stream_options

    def line(chunk: ChatCompletionChunk | Completion) -> str:
        if body.wants_usage and options:
            so_far = make_usage(num_prompt_tokens, generation.num_completion_tokens)
            chunk.usage = so_far if options.continuous_usage_stats or not chunk.choices else None
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    try:
        for chunk in layout.first_chunks():
            yield line(chunk)
        async for delta in generation.deltas():
            if delta is None:
                yield PING
                continue
            for chunk in layout.chunks(delta):
                yield line(chunk)
        if body.wants_usage:
            total = make_usage(num_prompt_tokens, generation.num_completion_tokens)
            yield line(layout.usage_chunk(total))
    except (ApiError, HotneuronError) as error:
        yield f"data: {as_api_error(error).json()}\n\n"
    except Exception as error:
        log.exception("a stream failed")
        yield f"data: {as_api_error(error).json()}\n\n"
    yield DONE
