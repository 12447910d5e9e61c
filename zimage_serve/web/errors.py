"""Errors as answers. One form for all interfaces: OpenAI's `error`, and `detail` as AUTOMATIC1111 has it."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from zimage_ref.errors import BackendError, ZImageError
from zimage_serve.refusals import BUG, BusyError, ClosingError, ConflictError, UnknownError

log = logging.getLogger("zimage.serve")
_STATUS: dict[type[Exception], int] = {
    UnknownError: 404,
    ConflictError: 409,
    BusyError: 429,
    ClosingError: 503,
    BackendError: 503,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refusal(status: int, message: str, retry_after: int | None = None) -> Response:
    """An answer that says in one line why a request is not served."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {"retry-after": str(retry_after)} if retry_after is not None else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error, "detail": message}, status, headers)


def status_of(error: ZImageError) -> int:
    """The HTTP status of an error of the library: 400, unless it says more."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 400)


def answer_errors(app: FastAPI) -> None:
    """Registers the answers to all errors."""
    app.add_exception_handler(ZImageError, _library)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)


def _library(request: Request, error: Exception) -> Response:
    if not isinstance(error, ZImageError):
        raise error
    retry = error.retry_after if isinstance(error, BusyError) else None
    return refusal(status_of(error), str(error), retry)


def _http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return refusal(error.status_code, str(error.detail))


def _invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return refusal(400, f"`{place}`: {first['msg']}" if place else str(first["msg"]))


def _bug(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return refusal(500, BUG)
