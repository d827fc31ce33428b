"""What goes over HTTP, whoever sends and reads it: `POST /v2/models/<model>/generate_stream`.

Requests that do not stream go there too, and have one event. Those of models that batch go to `.../infer`.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from http import HTTPStatus
from typing import Protocol

from fastserve_client.encoder_request import EncoderRequest, infer_outputs
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


class ResponseBody(Protocol):
    """The responses in the body of one call, which is given in pieces of any size."""

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""

    def next_outputs(self) -> Outputs | None:
        """The next response; None: it is not complete yet. Raises FastServeError where that is an error."""

    def end(self) -> Outputs | None:
        """What the end of the body completes; None: nothing."""


class InferBody:
    """A body that is one response."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""
        self._pieces.append(piece)

    def next_outputs(self) -> None:
        """Nothing is complete before the end."""

    def end(self) -> Outputs | None:
        """The response, once."""
        body, self._pieces = b"".join(self._pieces), []
        return infer_outputs(body) if body else None


class EventBody:
    """A body of server-sent events, each a response."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._events: deque[bytes] = deque()

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""
        self._events.extend(self._parser.feed(piece))

    def next_outputs(self) -> Outputs | None:
        """The next response; None: it is not complete yet. Raises FastServeError where that is an error."""
        return outputs_of(self._events.popleft()) if self._events else None

    def end(self) -> None:
        """Each event is complete by itself."""


def body_of(request: Request) -> ResponseBody:
    """What reads the body of a request's response."""
    return InferBody() if isinstance(request, EncoderRequest) else EventBody()


def path_of(request: Request) -> str:
    """Where a request goes."""
    return f"/v2/models/{request.model}/{request.http_endpoint}"


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
