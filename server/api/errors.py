"""Every error the API answers with, in OpenAI's shape, made in one place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.api.protocol import UNBUILT, ErrorBody, ErrorDetail, StraceOptions
from server.engine.request import Overloaded, Refused, Unavailable
from server.metrics import Metrics

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
DOCUMENTED: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


class ApiError(Exception):
    """An error that is told to the client as it stands."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, INVALID, param, code)


def not_ready(message: str, retry_after: int = 1) -> ApiError:
    """503: the engine takes no requests. retry_after: in seconds."""
    return ApiError(503, message, "unavailable_error", code="not_ready", headers={"Retry-After": str(retry_after)})


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what the client may know of it; the rest goes to the log."""
    match error:
        case ApiError():
            return error
        case Refused():
            options = {field.alias or name for name, field in StraceOptions.model_fields.items()}
            return invalid(str(error), f"strace.{error.param}" if error.param in options else error.param)
        case Unavailable():
            return not_ready(str(error), error.retry_after)
        case Overloaded():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, str(error), "rate_limit_error", code="overloaded", headers=headers)
        case RequestValidationError():
            return _from_validation(error.errors(), error.body)
        case HTTPException():
            return _from_http(error)
        case _:
            log.error("request failed", exc_info=error)
            return ApiError(500, "the server failed to answer; its log says why", "server_error", code="internal_error")


def _from_http(error: HTTPException) -> ApiError:
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}
    message = str(error.detail)
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, code=codes.get(error.status_code), headers=headers)


def _from_validation(errors: Sequence[Any], body: Any) -> ApiError:
    """The deepest of pydantic's complaints: with a union of types the branch that fitted best complains deepest."""
    if errors[0]["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {errors[0]['ctx']['error']}")
    if not isinstance(body, dict):
        return invalid("the body must be a JSON object, with Content-Type: application/json")
    located = [(_path(error["loc"][1:], body, error["type"] == "missing"), error) for error in errors]
    path, chosen = max(located, key=lambda pair: len(pair[0]))
    context = chosen.get("ctx", {})
    param = context.get("param") or _dotted([*path, context["field"]] if "field" in context else path)
    if chosen["type"] == "extra_forbidden":
        known = len(path) == 1 and path[0] in UNBUILT
        return invalid(f"`{param}` is not supported by this server" if known else f"unknown field `{param}`", param)
    messages = dict.fromkeys(error["msg"] for p, error in located if p == path and error["type"] != "extra_forbidden")
    return invalid(f"`{param}`: {'; '.join(messages)}", param)


def _path(loc: Sequence[str | int], body: Any, missing: bool) -> list[str | int]:
    """pydantic's location without the names of union branches, which are no part of the body.

    missing: the last step names a field that is not there.
    """
    path: list[str | int] = []
    here = body
    for i, step in enumerate(loc):
        if isinstance(step, int):
            path.append(step)
            here = here[step] if isinstance(here, list) and step < len(here) else None
        elif isinstance(here, dict) and (step in here or (missing and i == len(loc) - 1)):
            path.append(step)
            here = here.get(step)
    return path


def _dotted(path: Sequence[str | int]) -> str | None:
    """['messages', 0, 'role'] -> messages[0].role"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".") or None


def install_errors(app: FastAPI, metrics: Metrics) -> None:
    """Answer every exception that a route raises, and count it."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return respond(error, metrics)

    for kind in (ApiError, Refused, Overloaded, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def respond(error: Exception, metrics: Metrics) -> JSONResponse:
    """The error response to `error`, counted."""
    told = count(error, metrics)
    return JSONResponse(ErrorBody(error=told.detail).model_dump(), told.status, told.headers)


def count(error: Exception, metrics: Metrics) -> ApiError:
    """`error` as an ApiError, counted by its type."""
    told = as_api_error(error)
    metrics.errors.labels(told.detail.type).inc()
    return told
