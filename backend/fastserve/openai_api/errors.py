"""Errors in OpenAI's shape, with the status that its clients act on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import ValidationError

from fastserve.errors import RequestError
from fastserve_client import FastServeError

_FIELD = re.compile(r"^`([^`]+)`")
"""FastServe's sentences about a field begin with its name."""
_BUSY = re.compile(r"^(the queue is full|no room within)")
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$")
_MISSING = re.compile(r"^Object missing required field `(.*)`$")

_STATUS = {
    "INVALID_ARG": (400, "invalid_request_error"),
    "UNSUPPORTED": (400, "invalid_request_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "NOT_FOUND": (404, "not_found_error"),
    "CANCELLED": (499, "cancelled_error"),
    "INTERNAL": (500, "server_error"),
    "UNAVAILABLE": (503, "service_unavailable_error"),
    "DEADLINE_EXCEEDED": (504, "timeout_error"),
}
"""By the code of FastServe or of gRPC. 499 is nginx' status for a request that was cancelled: unlike 409
and 5xx, OpenAI's clients do not send it again."""


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What Anthropic's API calls an error of a status."""


class ApiError(Exception):
    """A refusal: its HTTP status, and OpenAI's `error` object."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self._error = {"message": message, "type": kind, "param": param, "code": code}
        self._retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of the last event of a stream."""
        return {"error": self._error}

    @property
    def anthropic_error(self) -> dict[str, Any]:
        """The `error` object of Anthropic's API."""
        kind = _ANTHROPIC_TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "api_error"
        )
        return {"type": kind, "message": self._error["message"]}

    @property
    def headers(self) -> dict[str, str]:
        """`retry-after` in whole seconds, where it is known, as HTTP has it (RFC 9110, 10.2.3)."""
        headers = {} if self._retry_after is None else {"retry-after": str(math.ceil(self._retry_after))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def refusal(param: str, message: str) -> ApiError:
    """The error 400 for a field of the body."""
    return ApiError(400, "invalid_request_error", f"`{param}`: {message}", param=param)


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    """The error 404 for a model that is not served; `served`: those that are."""
    return ApiError(
        404,
        "invalid_request_error",
        f"`model`: got {name!r}; allowed: {', '.join(map(repr, served))}",
        param="model",
        code="model_not_found",
    )


def client_name(path: str, names: Mapping[str, str]) -> str:
    """What the client calls the field of a path such as `stop[0]`: the longest part with a name counts."""
    for end in range(len(path), 0, -1):
        if (name := names.get(path[:end])) is not None and path[end : end + 1] in ("", "[", "."):
            return name + path[end:]
    return path


def server_refusal(error: FastServeError, names: dict[str, str] | None = None) -> ApiError:
    """The server's error. `names`: what the client calls a field, by FastServe's own name of it."""
    message, param = error.message, None
    if found := _FIELD.match(message):
        param = client_name(found[1], names or {})
        message = f"`{param}`{message[found.end() :]}"
    if error.code == "UNAUTHENTICATED":
        return ApiError(401, "authentication_error", message, code="invalid_api_key")
    if error.code == "UNAVAILABLE" and (error.retry_after is not None or _BUSY.match(message)):
        seconds = 1.0 if error.retry_after is None else error.retry_after
        return ApiError(429, "rate_limit_error", message, code="rate_limit_exceeded", retry_after=seconds)
    status, kind = _STATUS.get(error.code, (500, "server_error"))
    retry_after = 1.0 if status == 503 else None
    return ApiError(status, kind, message, param=param if status == 400 else None, retry_after=retry_after)


def request_refusal(error: RequestError, names: dict[str, str] | None = None) -> ApiError:
    """The error of a request that is refused here in the server's words; `names`: see `server_refusal`."""
    return server_refusal(FastServeError(error.code.value, str(error)), names)


def malformed(error: ValidationError) -> ApiError:
    """The error 400 for a body of other types than the request's; it names the field."""
    sentence = str(error)
    path = ""
    if at := _AT.search(sentence):
        path, sentence = at[1], sentence[: at.start()]
    for pattern, said in ((_UNKNOWN, "unknown field"), (_MISSING, "missing, but required")):
        if found := pattern.match(sentence):
            return refusal(".".join(filter(None, (path, found[1]))), said)
    return refusal(path or "body", sentence[0].lower() + sentence[1:])
