"""Errors as HTTP answers, in the shape of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from idgen import errors
from idgen.jobs import Busy, DeadlineExceeded, EngineClosed

log = logging.getLogger("idgen.service")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error answer of the API."""

    error: ErrorDetail = Field(
        examples=[
            {
                "message": "no face found. Use a photo in which the face is sharp and upright.",
                "type": "invalid_request_error",
                "param": "image",
                "code": "no_face_found",
            }
        ]
    )


class ApiError(Exception):
    """An error that the service itself finds."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


KINDS: dict[type[Exception], tuple[int, str]] = {
    errors.NoFaceFound: (400, "no_face_found"),
    errors.BadImage: (400, "bad_image"),
    errors.BadRequest: (400, "bad_request"),
    errors.LicenceRefused: (403, "licence_refused"),
    errors.WeightsMissing: (404, "model_not_found"),
    # 400, for a client cures it by asking for less, and must not just try again.
    errors.OutOfMemory: (400, "out_of_memory"),
    errors.Cancelled: (499, "cancelled"),
    Busy: (429, "queue_full"),
    EngineClosed: (503, "shutting_down"),
    DeadlineExceeded: (408, "deadline_exceeded"),
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
OWN_FAULT = "the server failed; its operator finds the reason in the log."


def explain(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error. What the client cannot cure is logged, not told."""
    headers: dict[str, str] = {}
    param = getattr(error, "param", None) or getattr(error, "field", None)
    message = str(error)
    if isinstance(error, ApiError):
        status, code, headers = error.status, error.code, error.headers
    else:
        status, code = next(
            (found for kind in type(error).__mro__ if (found := KINDS.get(kind))), (500, "internal_error")
        )
        if isinstance(error, Busy):
            headers = {"retry-after": str(error.retry_after)}
        if status == 500:
            log.error("a request failed: %s", error, exc_info=error)
            message, param = OWN_FAULT, None
    default = "invalid_request_error" if status < 500 else "server_error"
    detail = ErrorDetail(message=message, type=TYPES.get(status, default), param=param, code=code)
    return status, ErrorBody(error=detail).model_dump(), headers


def answer(error: BaseException) -> JSONResponse:
    """The response for an error."""
    status, body, headers = explain(error)
    return JSONResponse(body, status, headers)


def add_handlers(app: FastAPI) -> None:
    """Make every error of an application leave in this shape."""

    async def deliberate(_: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(first_fault(error.errors()))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return answer(ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {})))

    for kind in (errors.IdgenError, ApiError):
        app.add_exception_handler(kind, deliberate)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def first_fault(found: Any) -> ApiError:
    """The first of pydantic's complaints as one message that names the field."""
    first = found[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    return ApiError(400, f"{param}: {message}." if param else f"{message}.", "invalid_field", param)
