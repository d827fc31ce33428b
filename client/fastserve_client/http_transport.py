"""Calls over HTTP: `POST /v2/models/<model>/generate_stream`, a connection of its own per call.

Requests that do not stream go there too, and have one event: the server notices there that a client has gone,
which it does not at `/generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import socket
import threading
from collections import deque
from collections.abc import Mapping

import aiohttp

from fastserve_client.deadline import Deadline
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
PIECE = 65536
"""Bytes read at once, at most."""


class HttpCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, url: str, request: Request, headers: Mapping[str, str], deadline: Deadline) -> None:
        self._deadline = deadline
        self._connection = http.client.HTTPConnection(url, timeout=deadline.remaining())
        self._response: http.client.HTTPResponse | None = None
        self._reading = threading.Lock()
        self._parser = EventParser()
        self._events: deque[bytes] = deque()
        try:
            self._connection.connect()
            self._socket: socket.socket = self._connection.sock
            self._connection.request(
                "POST", _path(request), request.to_json(deadline.remaining()), {**JSON_BODY, **headers}
            )
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise _connection_error(error) from error

    def __next__(self) -> Outputs:
        try:
            with self._reading:
                while not self._events:
                    if not (piece := self._read()):
                        raise StopIteration
                    self._events.extend(self._parser.feed(piece))
        except (OSError, http.client.HTTPException) as error:
            raise _connection_error(error) from error
        return _outputs_of(self._events.popleft())

    def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        self._socket.settimeout(self._deadline.remaining())
        if self._response is None:
            self._response = self._connection.getresponse()
            if self._response.status != http.client.OK:
                raise _status_error(self._response.status, self._response.read())
        return self._response.read1(PIECE)

    def close(self) -> None:
        """Drops the connection, from any thread: the server takes that for a cancellation."""
        with contextlib.suppress(OSError):  # it may not be connected any more
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads; closing alone would not
        with self._reading:
            self._connection.close()


class HttpTransport:
    """The HTTP endpoint of a server."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._headers = headers

    def open(self, request: Request, deadline: Deadline) -> HttpCall:
        """Sends `request`."""
        return HttpCall(self._url, request, self._headers, deadline)

    def is_ready(self, timeout: float) -> bool:
        connection = http.client.HTTPConnection(self._url, timeout=timeout)
        try:
            connection.request("GET", READY_PATH, headers=dict(self._headers))
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing is kept open between calls."""


class AsyncHttpCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, response: asyncio.Task[aiohttp.ClientResponse]) -> None:
        self._response = response
        self._parser = EventParser()
        self._events: deque[bytes] = deque()
        self._closed = False

    async def __anext__(self) -> Outputs:
        try:
            while not self._events:
                if not (piece := await self._read()):
                    raise StopAsyncIteration
                self._events.extend(self._parser.feed(piece))
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise _connection_error(error) from error
        except asyncio.CancelledError:
            if self._closed:
                raise FastServeError("CANCELLED", "the call was closed") from None
            raise
        return _outputs_of(self._events.popleft())

    async def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        response = await self._response
        if response.status != http.client.OK:
            raise _status_error(response.status, await response.read())
        return await response.content.readany()

    async def close(self) -> None:
        """Drops the connection: the server takes that for a cancellation."""
        self._closed = True
        if not self._response.done():
            self._response.cancel()
        elif not self._response.cancelled() and self._response.exception() is None:
            self._response.result().close()


class AsyncHttpTransport:
    """The HTTP endpoint of a server, for one event loop."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._session = aiohttp.ClientSession(
            f"http://{url}", headers=headers, connector=aiohttp.TCPConnector(limit=0)
        )

    def open(self, request: Request, deadline: Deadline) -> AsyncHttpCall:
        """Sends `request`."""
        timeout = deadline.remaining()
        return AsyncHttpCall(asyncio.create_task(self._post(request, timeout)))

    async def _post(self, request: Request, timeout: float | None) -> aiohttp.ClientResponse:
        return await self._session.post(
            _path(request), data=request.to_json(timeout), headers=JSON_BODY, timeout=_client_timeout(timeout)
        )

    async def is_ready(self, timeout: float) -> bool:
        try:
            async with self._session.get(READY_PATH, timeout=_client_timeout(timeout)) as response:
                return response.status == http.client.OK
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError):
            return False

    async def close(self) -> None:
        await self._session.close()


def _client_timeout(seconds: float | None) -> aiohttp.ClientTimeout:
    # aiohttp would round a long timeout up to a whole second.
    return aiohttp.ClientTimeout(total=seconds, ceil_threshold=math.inf)


def _path(request: Request) -> str:
    return f"/v2/models/{request.model}/generate_stream"


def _outputs_of(event: bytes) -> Outputs:
    """The output tensors of an event. Raises FastServeError where it says one."""
    members = json.loads(event)
    if "error" in members:
        raise server_error("INTERNAL", members["error"])
    # The server writes a tensor of one element as that element.
    return {name: value if isinstance(value, list) else [value] for name, value in members.items()}


def _status_error(status: int, body: bytes) -> FastServeError:
    """The error of a response whose status is not 200: its body is JSON, or one event."""
    text = body.decode(errors="replace").strip().removeprefix("data: ")
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        message = text or http.client.responses.get(status, f"HTTP status {status}")
    return server_error(STATUS_CODES.get(status, "INTERNAL"), message)


def _connection_error(error: Exception) -> FastServeError:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return DeadlineExceeded()
    return FastServeError("UNAVAILABLE", f"the connection failed: {type(error).__name__}: {error}")
