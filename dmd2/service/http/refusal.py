"""Why a request is not served: one exception, told in the shape that the asker's API has for errors."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from dmd2.inference.batcher import Busy, Stopped
from dmd2.runtime.errors import InvalidInput, UserError, complaint, one_line, pattern, shown
from dmd2.service.http.admission import Draining, Full

NAMES = {"width, height": "size", "width": "size", "height": "size", "num_outputs": "n", "lora_weights": "loras"}
"""of the fields of an image request, in OpenAI's API"""
NOT_BLANK = pattern(r"\S", "text that is not blank")
"""of prompts"""


class OpenAIError(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of errors."""

    error: OpenAIError


class Refusal(HTTPException):
    """An error with everything that an answer says of it.

    Args:
        code: what went wrong, for programs; a label of the metrics, so of a fixed set.
        param: the field that is wrong.
    """

    def __init__(
        self, status: int, code: str, message: object, param: str | None = None, retry_after: int | None = None
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status == 408:
            headers["x-should-retry"] = "false"  # else OpenAI's client asks twice more for what takes too long
        super().__init__(status, one_line(message), headers)
        self.code, self.param = code, param

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error"
        )
        return {"message": self.detail, "type": kind, "param": self.param, "code": self.code}

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """What an error of a generation means to who asked for it."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, Full):
            return cls(429, "queue_full", "the queue is full; see Retry-After", retry_after=error.retry_after)
        if isinstance(error, Busy):
            return cls(429, "queue_full", error, retry_after=1)
        if isinstance(error, Draining | Stopped):
            return cls(503, "stopping", "the server is being stopped", retry_after=10)
        if isinstance(error, TimeoutError):
            return cls(408, "timeout", "not done within the time that the request allows (X-Request-Timeout)")
        if isinstance(error, InvalidInput):
            return cls(400, "invalid_value", error, NAMES.get(error.field, error.field))
        if isinstance(error, UserError):
            return cls(400, "invalid_value", error)
        return cls(500, "generation_failed", f"{type(error).__name__}: {error}")

    @classmethod
    def invalid(cls, error: ValidationError | RequestValidationError) -> Refusal:
        """Of a body that is not what its schema says: the first complaint."""
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in ("body", "query")]
        where, message = shown(".".join(path), 100), shown(complaint(first), 300)
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        return cls(400, code, f"{where}: {message}" if where else message, where or None)


async def answer(request: Request, error: Exception) -> JSONResponse:
    """The answer to any exception of Starlette, FastAPI or this project."""
    if isinstance(error, RequestValidationError):
        error = Refusal.invalid(error)
    elif isinstance(error, HTTPException) and not isinstance(error, Refusal):
        headers, error = error.headers, Refusal(error.status_code, "invalid_request", error.detail)
        error.headers = {**(headers or {}), **(error.headers or {})}  # such as Allow
    refusal = Refusal.of(error)
    request.state.code = refusal.code
    content: dict[str, Any] = {"error": refusal.error}
    if request.url.path.startswith("/sdapi/"):
        content = {"error": refusal.code, "detail": refusal.detail, "body": "", "errors": refusal.detail}
    return JSONResponse(content, refusal.status_code, headers=refusal.headers)
