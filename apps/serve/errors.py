"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from plumbline.apps.serve.engine.backend import ServeError

_KINDS = ("str", "int", "float", "bool", "constrained-str", "constrained-int", "constrained-float")
logger = logging.getLogger(__name__)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_of(error: ServeError) -> JSONResponse:
    """A ServeError as an answer, with Retry-After where it says when to come back."""
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if error.retry_after_s else None
    return JSONResponse(body_of(error), error.status, headers)


def body_of(error: ServeError) -> dict[str, Any]:
    """A ServeError's body; nothing in it that UTF-8 cannot write."""
    message = str(error).encode("utf-8", "replace").decode()
    return error_body(message, error.kind, error.code, error.param)


def event_of(error: Exception) -> str:
    """An error as the last event of a stream."""
    if not isinstance(error, ServeError):
        logger.error("a stream failed", exc_info=error)
        error = ServeError("the answer failed; the log says more")
    return f"data: {json.dumps(body_of(error), ensure_ascii=False)}\n\n"


def _clearest(errors: Sequence[Any]) -> Any:
    """The first error; where a field may be one of several things, the one that got furthest into it."""
    first = errors[0]
    return max((one for one in errors if one["loc"][:2] == first["loc"][:2]), key=lambda one: len(one["loc"]))


def _is_kind(part: Any) -> bool:
    """Whether a part of a location names one of the things that a field may be, not a field."""
    return isinstance(part, str) and (part in _KINDS or "[" in part or part[:1].isupper())


def add_error_handlers(app: FastAPI) -> None:
    """No answer of the server is an error in another shape, and none holds a traceback or the text of a request."""

    @app.exception_handler(ServeError)
    def refused(request: Request, error: ServeError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = _clearest(error.errors())
        where = [str(part) for part in first["loc"] if part != "body" and not _is_kind(part)]
        param = ".".join(where) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            return JSONResponse(error_body("the body is not JSON", "invalid_request_error", "invalid_json"), 400)
        if first["type"] == "extra_forbidden":
            message = f"unrecognised field {where[-1]!r}"
        text = f"{param}: {message}" if param else message
        text = text.encode("utf-8", "replace").decode()
        param = param.encode("utf-8", "replace").decode() if param else None
        return JSONResponse(error_body(text, "invalid_request_error", "invalid_value", param), 400)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message.encode("utf-8", "replace").decode(), "invalid_request_error", code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return JSONResponse(error_body("the server failed; its log says more", "server_error", "internal_error"), 500)
