"""From a checked request to its HTTP response, streamed or whole."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from fastapi import Request, Response

from runtime import Request as EngineRequest
from runtime import SamplingParams
from runtime.errors import HotneuronError
from runtime.token_mask import TokenMask

from .errors import ApiError, as_api_error, bad_request
from .generation import Answer, AnswerOptions, Delta, Generation
from .grammars import GrammarBackend, GrammarSpec
from .layouts import ChatFormat, CompletionFormat
from .replies import ChatCompletionChunk, Completion
from .schemas import GenerationRequest, SparsityOptions
from .state import ServerState
from .streaming import DONE, PING, EventStream, unless_disconnected
from .usage import usage_of

log = logging.getLogger(__name__)


def check_count(state: ServerState, n: int | None, *, num_prompts: int = 1) -> int:
    """How many answers each prompt gets. Raises ApiError where that is more than may be asked."""
    n = n or 1
    if n > state.config.max_n:
        raise bad_request(f"n must be at most {state.config.max_n}, got {n}", "n")
    most, why = state.engine.config.max_batch + state.engine.config.max_queue, "batch and queue"
    if state.config.max_per_client is not None and state.config.max_per_client < most:
        most, why = state.config.max_per_client, "--max-per-client"
    if n * num_prompts > most:
        raise bad_request(
            f"{num_prompts} prompts with n = {n} are {n * num_prompts} answers; one request may "
            f"ask for {most} ({why} of this server)",
            "prompt" if num_prompts > 1 else "n",
        )
    return n


async def make_generation(
    state: ServerState,
    reply_id: str,
    prompts: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
    options: AnswerOptions,
    *,
    client: str,
    answers_per_prompt: int = 1,
    form: GrammarSpec | None = None,
    sparsity: SparsityOptions | None = None,
    cache_salt: str | None = None,
) -> Generation:
    """One answer for each prompt and its parameters, not submitted yet. Raises GrammarError, and
    ApiError before a grammar is compiled for a client that could not submit it."""
    state.client_limits.check(client, len(prompts))
    masks: Sequence[TokenMask | None] = [None] * len(prompts)
    if form is not None:
        masks = await asyncio.get_running_loop().run_in_executor(
            state.grammar_threads, _masks, state.grammars, form, len(prompts)
        )
    sparsity = sparsity or SparsityOptions()
    generation = Generation(
        state.engine,
        state.observers,
        state.client_limits,
        client,
        answers_per_prompt,
        form_param=None if form is None else form.param,
        poll_seconds=state.config.ping_seconds,
    )
    for i, (ids, sampling, mask) in enumerate(zip(prompts, params, masks, strict=True)):
        request = EngineRequest(
            f"{reply_id}-{i}",
            ids,
            sampling,
            client=client,
            mode=sparsity.mode,
            audit=bool(sparsity.audit),
            cache_salt=cache_salt or "",
            token_mask=mask,
        )
        generation.add(request, Answer(i, state.codec, options))
    return generation


def _masks(grammars: GrammarBackend, form: GrammarSpec, count: int) -> Sequence[TokenMask]:
    """A mask for each answer."""
    grammar = grammars.compile(form)
    return [grammar.mask() for _ in range(count)]


async def respond(
    request: Request,
    body: GenerationRequest,
    generation: Generation,
    layout: ChatFormat | CompletionFormat,
) -> Response:
    generation.submit()
    if body.stream:
        return EventStream(_events(body, generation, layout), on_close=generation.close)
    deltas = await all_deltas(request, generation)
    reply = layout.whole(deltas, usage_of(generation, body.sparsity))
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")


async def all_deltas(request: Request, generation: Generation) -> list[Delta]:
    """Everything, when it is there. Raises ClientDisconnect when nobody waits for it any more."""

    async def collect() -> list[Delta]:
        return [delta async for delta in generation.deltas() if delta is not None]

    try:
        return await unless_disconnected(request.receive, collect())
    finally:
        generation.close()


async def _events(
    body: GenerationRequest, generation: Generation, layout: ChatFormat | CompletionFormat
) -> AsyncIterator[str]:
    """The lines of a stream. What fails after its start is told in it: the status is sent."""
    options = body.stream_options

    def line(chunk: ChatCompletionChunk | Completion) -> str:
        if body.wants_usage and options:
            so_far = options.continuous_usage_stats or not chunk.choices
            chunk.usage = usage_of(generation, body.sparsity) if so_far else None
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
            yield line(layout.usage_chunk())
    except Exception as error:
        yield f"data: {told_in_stream(error).json()}\n\n"
    yield DONE


def told_in_stream(error: Exception) -> ApiError:
    """What a client is told of a failure after its stream has begun."""
    if not isinstance(error, (ApiError, HotneuronError)):
        log.error("a stream failed", exc_info=error)
    return as_api_error(error)
