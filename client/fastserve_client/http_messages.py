"""What goes over HTTP, whoever sends and reads it: `POST /v2/models/<model>/generate_stream`.

Requests that do not stream go there too, and have one event.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from http import HTTPStatus

from fastserve_client.errors import DeadlineExceeded, FastServeError, server_error
from fastserve_client.generation import Outputs
from fastserve_client.request import Request
from fastserve_client.server_sent_events import EventParser

STATUS_CODES = {
    400: "INVALID_ARG",
    404: "NOT_FOUND",
    499: "CANCELLED",
    501: "UNSUPPORTED",
    503: "UNAVAILABLE",
}
"""Those that the Triton server uses; any other is INTERNAL."""
JSON_BODY = {"Content-Type": "application/json"}
READY_PATH = "/v2/health/ready"


class ResponseBody:
    """The responses in the body of one call, which is given in pieces of any size."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._events: deque[bytes] = deque()

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""
        self._events.extend(self._parser.feed(piece))

    def next_outputs(self) -> Outputs | None:
        """The next response; None: it is not complete yet. Raises FastServeError where that is an error."""
        return outputs_of(self._events.popleft()) if self._events else None


def path_of(request: Request) -> str:
    """Where a request goes."""
    return f"/v2/models/{request.model}/generate_stream"


def outputs_of(event: bytes) -> Outputs:
    """The output tensors of an event. Raises FastServeError where it says one."""
    members = json.loads(event)
    if "error" in members:
        raise server_error(members["error"])
    # The server writes a tensor of one element as that element.
    return {name: value if isinstance(value, list) else [value] for name, value in members.items()}


def status_error(status: int, body: bytes) -> FastServeError:
    """The error of a response whose status is not 200: its body is JSON, or one event."""
    text = body.decode(errors="replace").strip().removeprefix("data: ")
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        message = text or _phrase(status)
    return server_error(message, STATUS_CODES.get(status, "INTERNAL"))


def connection_error(error: Exception) -> FastServeError:
    """The error of a call whose connection failed, or took too long."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return DeadlineExceeded()
    return FastServeError("UNAVAILABLE", f"the connection failed: {type(error).__name__}: {error}")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP status {status}"
