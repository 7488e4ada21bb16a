"""The route of /v1/responses, streamed or whole."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from runtime import SamplingParams

from ..chat_prompts import chat_prompt
from ..generation import AnswerOptions, Generation
from ..limits import check_messages
from ..middleware import client_of
from ..openapi import ASK_ERRORS, or_events
from ..prompts import check_room, sampling_params
from ..respond import all_deltas, make_generation, told_in_stream
from ..schemas import GenerationRequest
from ..state import ServerState, server_state
from ..streaming import DONE, PING, EventStream
from ..tools import ToolUse
from ..usage import usage_of
from .conversation import messages_of, tool_use_of
from .replies import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseReply,
    ResponseUsage,
)
from .schemas import ResponseRequest
from .writer import ResponseWriter

router = APIRouter(prefix="/v1", responses=ASK_ERRORS)
EVENTS = "an event of a response, named by `event`; in the last event [DONE]"


@router.post("/responses", response_model=ResponseReply, responses=or_events(EVENTS))
async def create_response(body: ResponseRequest, request: Request) -> Response:
    state = server_state(request)
    state.check_model(body.model)
    messages = messages_of(body)
    check_messages(state.config, messages, param="input")
    tools = tool_use_of(body)
    form = body.text.grammar() if body.text else None
    prompt_ids = tuple(
        await asyncio.to_thread(chat_prompt, state.codec, messages, tools, param="input")
    )
    check_room(len(prompt_ids), body.max_output_tokens, state.engine.max_context, what="input")
    response_id = f"resp_{uuid.uuid4().hex}"
    sampling = sampling_params(
        GenerationRequest(temperature=body.temperature, top_p=body.top_p),
        state.config.default_sampling,
        index=0,
        max_tokens=body.max_output_tokens,
        num_logprobs=body.num_logprobs,
    )
    generation = await make_generation(
        state,
        response_id,
        [prompt_ids],
        [sampling],
        AnswerOptions(has_tools=tools is not None),
        client=client_of(request.scope),
        form=tools.grammar(form) if tools else form,
        sparsity=body.sparsity,
        cache_salt=body.cache_salt,
    )
    response = _response(state, response_id, body, sampling, tools)
    writer = ResponseWriter(state.codec, response)
    generation.submit()
    if body.stream:
        return EventStream(_lines(body, generation, writer), on_close=generation.close)
    for delta in await all_deltas(request, generation):
        writer.feed(delta)
    writer.finish(_usage(generation, body), int(time.time()))
    return Response(json.dumps(response.as_dict()), media_type="application/json")


def _response(
    state: ServerState,
    response_id: str,
    body: ResponseRequest,
    sampling: SamplingParams,
    tools: ToolUse | None,
) -> ResponseReply:
    """As it is before the answer begins."""
    given = body.model_dump(exclude_unset=True, by_alias=True)
    text = given.get("text") or {}
    return ResponseReply(
        id=response_id,
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=state.config.model_name,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=sampling.temperature,
        text={"format": {"type": "text"}, **text},
        tool_choice=given.get("tool_choice") or ("auto" if tools else "none"),
        tools=[
            {"description": None, "parameters": None, "strict": False, **tool}
            for tool in given.get("tools") or ()
        ],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
    )


def _usage(generation: Generation, body: ResponseRequest) -> ResponseUsage:
    usage = usage_of(generation, body.sparsity)
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=usage.total_tokens,
        sparsity=usage.sparsity,
    )


async def _lines(
    body: ResponseRequest, generation: Generation, writer: ResponseWriter
) -> AsyncIterator[str]:
    """The lines of a stream. What fails after its start is told in it: the status is sent."""
    try:
        writer.start()
        yield _told(writer)
        async for delta in generation.deltas():
            if delta is None:
                yield PING
                continue
            writer.feed(delta)
            yield _told(writer)
        writer.finish(_usage(generation, body), int(time.time()))
    except Exception as error:
        writer.fail(told_in_stream(error))
    yield _told(writer)
    yield DONE


def _told(writer: ResponseWriter) -> str:
    events = writer.take_events()
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
