"""POST /v1/chat/completions and /v1/completions."""

import asyncio
import uuid

from fastapi import APIRouter, Request, Response

from .chat_prompts import chat_prompt
from .chat_schemas import ChatCompletionRequest
from .layouts import ChatFormat, CompletionFormat, ReplyHead, make_echo
from .limits import check_messages
from .middleware import client_of
from .openapi import ASK_ERRORS, or_events
from .prompts import answer_options, check_room, completion_prompts, sampling_params
from .replies import ChatCompletion, Completion
from .respond import check_count, make_generation, respond
from .schemas import CompletionRequest, GenerationRequest
from .state import ServerState, server_state

router = APIRouter(prefix="/v1", responses=ASK_ERRORS)
CHUNKS = "a chat.completion.chunk or an error object; in the last event [DONE]"
PIECES = "a text_completion or an error object; in the last event [DONE]"


@router.post("/chat/completions", response_model=ChatCompletion, responses=or_events(CHUNKS))
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    state = server_state(request)
    state.check_model(body.model)
    n = check_count(state, body.n)
    check_messages(state.config, body.messages)
    tools, form = body.tool_use(), body.grammar_spec()
    prompt_ids = tuple(
        await asyncio.to_thread(
            chat_prompt,
            state.codec,
            body.messages,
            tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            template_kwargs=body.chat_template_kwargs,
        )
    )
    check_room(len(prompt_ids), body.token_limit, state.engine.max_context, what="messages")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    head = _head(state, body, "chatcmpl-")
    params = [
        sampling_params(
            body,
            state.config.default_sampling,
            index=i,
            max_tokens=body.token_limit,
            num_logprobs=num_logprobs,
        )
        for i in range(n)
    ]
    generation = await make_generation(
        state,
        head.id,
        [prompt_ids] * n,
        params,
        answer_options(body, has_tools=tools is not None),
        client=client_of(request.scope),
        answers_per_prompt=n,
        form=tools.grammar(form) if tools else form,
        sparsity=body.sparsity,
        cache_salt=body.cache_salt,
    )
    must_call = tools is not None and tools.must_call
    layout = ChatFormat(state.codec, head, n, num_logprobs is not None, must_call)
    return await respond(request, body, generation, layout)


@router.post("/completions", response_model=Completion, responses=or_events(PIECES))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    state = server_state(request)
    state.check_model(body.model)
    n = check_count(state, body.n, num_prompts=len(body.prompts))
    prompts = await asyncio.to_thread(completion_prompts, state.codec, body)
    for _, ids in prompts:
        check_room(len(ids), body.token_limit, state.engine.max_context, what="prompt")
    head = _head(state, body, "cmpl-")
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
    generation = await make_generation(
        state,
        head.id,
        [ids for _, ids in prompts for _ in range(n)],
        params * len(prompts),
        # lm-eval leaves out the last token, whichever it is: there must be one.
        answer_options(body, lists_end_token=True),
        client=client_of(request.scope),
        answers_per_prompt=n,
        form=body.grammar_spec(),
        sparsity=body.sparsity,
        cache_salt=body.cache_salt,
    )
    echoes = [
        make_echo(state.codec, text, ids) if body.echo else None
        for text, ids in prompts
        for _ in range(n)
    ]
    layout = CompletionFormat(state.codec, head, body.logprobs is not None, echoes)
    return await respond(request, body, generation, layout)


def _head(state: ServerState, body: GenerationRequest, prefix: str) -> ReplyHead:
    mode = body.sparsity.mode if body.sparsity else None
    reply_id = prefix + uuid.uuid4().hex
    return ReplyHead(reply_id, state.config.model_name, state.system_fingerprint(mode))
