"""What goes wrong, said as OpenAI's API says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
# What an operation may answer beside 200; written into the OpenAPI.
MEANINGS = {
    400: "The request makes no sense, or asks for what this model cannot do.",
    401: "No valid bearer token.",
    404: "There is no such model.",
    408: "The request's body did not come in time.",
    413: "The request's body is too large.",
    429: "Too many requests are waiting; Retry-After says when to try again.",
    503: "The server is shutting down.",
    504: "The answer did not come in time.",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what was got and what to do.
        code: a word for programs.
        param: the field at fault.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        return Json(self.body, self.status, self.headers)


class Json(Response):
    """JSON in ASCII, which holds whatever a string may hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes to send."""
        return json.dumps(content, allow_nan=False).encode()


def of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    return ApiError(400, f"{param or 'body'}: {first['msg']}", first["type"], param)


def of_http(error: HTTPException) -> ApiError:
    """A path or method that is not there."""
    return ApiError(error.status_code, str(error.detail), f"http_{error.status_code}", headers=error.headers)
