"""Everything beside generation: models, tokens, health, metrics, version."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from .chat_prompts import chat_prompt
from .chat_schemas import DetokenizeRequest, TokenizeRequest
from .config import package_version
from .errors import ApiError, bad_request
from .grammars import MAX_GRAMMAR_BYTES
from .limits import check_messages
from .openapi import ASK_ERRORS, READ_ERRORS
from .replies import (
    DetokenizeReply,
    Limits,
    Model,
    ModelList,
    ModelSparsity,
    ServerInfo,
    TokenizeReply,
    TokenizerInfo,
)
from .state import ServerState, server_state
from .tools import tool_use

router = APIRouter()


@router.get("/v1/models", responses=READ_ERRORS)
async def list_models(request: Request) -> ModelList:
    return ModelList(object="list", data=[await _model(server_state(request))])


@router.get("/v1/models/{name:path}", responses=READ_ERRORS)
async def get_model(name: str, request: Request) -> Model:
    state = server_state(request)
    state.check_model(name)
    return await _model(state)


async def _model(state: ServerState) -> Model:
    report = await asyncio.to_thread(state.engine.report)
    measured = (
        "natural_sparsity",
        "predicted_sparsity",
        "recall",
        "energy_recall",
        "audited_tokens",
    )
    return Model(
        id=state.config.model_name,
        object="model",
        created=state.created,
        owned_by="hotneuron",
        root=state.config.model_name,
        parent=None,
        permission=[],
        max_model_len=state.engine.max_context,
        sparsity=ModelSparsity(
            mode=report["mode"],
            activation=report["model"]["activation"],
            **{key: report["mean"][key] for key in measured},
        ),
    )


@router.post("/tokenize", responses=ASK_ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeReply:
    state = server_state(request)
    state.check_model(body.model)
    ids = await asyncio.to_thread(_tokenize, state, body)
    return TokenizeReply(count=len(ids), max_model_len=state.engine.max_context, tokens=ids)


def _tokenize(state: ServerState, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        check_messages(state.config, body.messages)
        return chat_prompt(
            state.codec,
            body.messages,
            tool_use(body.tools, None, parallel=True),
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
    special = body.add_special_tokens is not False
    return state.codec.encode(body.prompt or "", add_special_tokens=special)


@router.post("/detokenize", responses=ASK_ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeReply:
    state = server_state(request)
    state.check_model(body.model)
    if unknown := [i for i in body.tokens if not state.codec.knows(i)]:
        raise bad_request(f"tokens: the tokenizer has no token {unknown[0]}", "tokens")
    text = await asyncio.to_thread(state.codec.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeReply(prompt=text)


@router.get("/server_info", responses=READ_ERRORS)
async def server_info(request: Request) -> ServerInfo:
    state = server_state(request)
    engine, config = state.engine, state.config
    report = await asyncio.to_thread(engine.report)
    shown = ("uptime_s", "model", "mode", "devices", "threads", "kernels")
    return ServerInfo(
        version=package_version(),
        default_sampling=dict(config.default_sampling),
        limits=Limits(
            max_model_len=engine.max_context,
            max_batch=engine.config.max_batch,
            max_queue=engine.config.max_queue,
            max_per_client=config.max_per_client,
            max_n=config.max_n,
            max_body_bytes=config.max_body_bytes,
            max_messages=config.max_messages,
            max_message_chars=config.max_message_chars,
            max_grammar_bytes=MAX_GRAMMAR_BYTES,
        ),
        **{key: report[key] for key in shown},
    )


@router.get("/tokenizer_info", responses=READ_ERRORS)
async def tokenizer_info(request: Request) -> TokenizerInfo:
    state = server_state(request)
    return TokenizerInfo(model_max_length=state.engine.max_context, **state.codec.facts())


@router.get("/health", responses=READ_ERRORS)
@router.get("/ready", responses=READ_ERRORS)
async def health(request: Request) -> dict[str, str | int]:
    """Whether the engine lives. While it loads and drains the gateway answers for it."""
    state = server_state(request)
    if not state.engine.is_alive():
        raise ApiError(503, "The engine has stopped; restart the server.", code="engine_dead")
    if state.replicas is None:
        return {"status": "ok"}
    told = {"replicas_up": state.replicas.num_up, "replicas": state.replicas.num_configured}
    return {"status": "ok", **told}


@router.get("/metrics", response_class=PlainTextResponse, responses=READ_ERRORS)
async def metrics(request: Request) -> Response:
    text = await asyncio.to_thread(server_state(request).exposition)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=READ_ERRORS)
async def version() -> dict[str, Any]:
    return {"version": package_version()}
