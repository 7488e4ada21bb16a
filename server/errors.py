"""Every refusal as an OpenAI error object: {"error": {"message", "type", "param", "code"}}.

`ApiError` is what the server raises; `as_api_error` translates what the runtime, FastAPI and the
text side raise; `install_error_handlers` is the only place where exceptions become responses.
"""

import http
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from runtime.errors import EngineDead, HotneuronError, InvalidRequest, QueueFull

from .grammars import GrammarError
from .text import TextError

QUEUE_FULL = "queue_full"  # the reason in the metrics
CLIENT_LIMIT = "rate_limit_exceeded"  # the code, and the reason in the metrics
RETRY_AFTER = {"retry-after": "1"}  # seconds; an engine that stopped may soon be replaced


class ApiError(HTTPException):
    """A refusal with its HTTP status and the four fields of the error object.

    An HTTPException, because FastAPI lets only these through while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        may_pass = RETRY_AFTER if status in (429, 503) else {}
        super().__init__(status, message, {**may_pass, **(headers or {})})
        self.code = code
        self.param = param

    @property
    def type(self) -> str:
        if self.status_code == 401:
            return "authentication_error"
        if self.status_code == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status_code < 500 else "server_error"

    def json(self) -> str:
        """In ASCII: what a client sent may stand in it, and need not be valid Unicode."""
        error = {
            "message": self.detail,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error})

    def response(self) -> Response:
        return Response(self.json(), self.status_code, self.headers, "application/json")


def bad_request(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def missing(param: str) -> ApiError:
    return bad_request(f"Missing required parameter: {param}", param, "missing_required_parameter")


def unsupported(param: str, why: str) -> ApiError:
    return ApiError(
        400, f"{param} is not supported: {why}", param=param, code="unsupported_parameter"
    )


def body_too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than the {limit} bytes that this server reads.",
        code="request_too_large",
    )


def as_api_error(error: Exception) -> ApiError:
    """The refusal that `error` means; what is not known to be one is a 500 without details."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(503, str(error), code="server_overloaded")
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case InvalidRequest():
            return bad_request(str(error), error.param, error.code)
        case TextError() | GrammarError():
            return bad_request(str(error), error.param)
        case RequestValidationError():
            return _from_validation(error.errors())
        case StarletteHTTPException():
            return _from_http(error)
        case ClientDisconnect():
            return ApiError(499, "The client went away.", code="client_disconnected")
        case HotneuronError():
            return ApiError(500, str(error), code="engine_error")
        case _:
            return ApiError(
                500, "The server failed on this request; its log has the cause.", code="internal"
            )


def install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, QueueFull):
            request.app.state.server.metrics.refused(QUEUE_FULL)
        if isinstance(error, ApiError) and error.code == CLIENT_LIMIT:
            request.app.state.server.metrics.refused(CLIENT_LIMIT)
        response = as_api_error(error).response()
        # An unforeseen error is answered outside the request-id middleware.
        if request_id := request.scope.get("request_id"):
            response.headers["x-request-id"] = request_id
        return response

    kinds = (
        ApiError,
        HotneuronError,
        TextError,
        GrammarError,
        RequestValidationError,
        StarletteHTTPException,
        ClientDisconnect,
    )
    for kind in (*kinds, Exception):
        app.add_exception_handler(kind, handle)


def _from_http(error: StarletteHTTPException) -> ApiError:
    phrase = http.HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    message = str(error.detail)
    if error.status_code == 404 and message == phrase:
        message = "Not found: no such path; the API starts at /v1, the dashboard at /dashboard."
    return ApiError(error.status_code, message, code=code, headers=error.headers)


def _from_validation(problems: Sequence[Any]) -> ApiError:
    """FastAPI's 422 list as one 400: of several complaints the one that explains most."""
    problem = max(problems, key=_how_telling)
    loc = [part for part in problem["loc"][1:] if not _is_union_tag(part)]
    param = _path(loc)
    match problem["type"]:
        case "json_invalid":
            why = problem.get("ctx", {}).get("error", problem["msg"])
            return bad_request(f"The request body is not valid JSON: {why}", None, "invalid_json")
        case "missing" if not loc:
            return bad_request("The request body is missing; send a JSON object.", None)
        case "missing":
            return missing(str(param))
        case "model_attributes_type":
            hint = "" if loc else " (with the header Content-Type: application/json)"
            where = param or "the request body"
            return bad_request(f"{where} must be a JSON object{hint}", param, "invalid_type")
    message = problem["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param)


def _how_telling(problem: Any) -> tuple[int, int]:
    """What lies furthest in tells most: of a union, the member that was meant fits deepest. A wrong
    kind explains what a thing lacks; in a union it says only that this member was not meant."""
    is_wrong_kind = problem["type"] == "literal_error"
    in_union = any(_is_union_tag(part) for part in problem["loc"])
    return len(problem["loc"]), is_wrong_kind * (-1 if in_union else 1)


def _is_union_tag(part: int | str) -> bool:
    """Pydantic puts the tried member of a union into the path; no field has such a name."""
    return isinstance(part, str) and (part in UNION_TAGS or "[" in part or "(" in part)


MAX_PATH = 200  # a key of the client may be of any length
UNION_TAGS = {
    "str",
    "constrained-str",
    "bool",
    "ToolName",
    "AllowedToolsChoice",
    "ChosenTool",
    "AllowedResponseTools",
}


def _path(loc: Sequence[int | str]) -> str | None:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:MAX_PATH] or None
