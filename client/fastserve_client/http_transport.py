"""Calls over HTTP: `POST /v2/models/<model>/generate_stream`, a connection of its own per call.

Requests that do not stream go there too, and have one event.
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
from fastserve_client.request import Request, cancellation_request
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
CANCEL_TIMEOUT = 2.0
"""Seconds that leaving a call waits for an answer; the server acts on what was sent, however late."""


class HttpCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, transport: HttpTransport, request: Request, deadline: Deadline) -> None:
        self._transport = transport
        self._request = request
        self._deadline = deadline
        self._connection = http.client.HTTPConnection(transport.url, timeout=deadline.remaining())
        self._response: http.client.HTTPResponse | None = None
        self._reading = threading.Lock()
        self._parser = EventParser()
        self._events: deque[bytes] = deque()
        self._ended = False
        try:
            self._connection.connect()
            self._socket: socket.socket = self._connection.sock
            body = request.to_json(deadline.remaining())
            self._connection.request("POST", _path(request), body, {**JSON_BODY, **transport.headers})
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise _connection_error(error) from error

    def __next__(self) -> Outputs:
        with self._reading:
            if self._ended:
                raise StopIteration
            try:
                return _outputs_of(self._next_event())
            except (StopIteration, FastServeError):
                self._end()
                raise
            except (OSError, http.client.HTTPException) as error:
                self._end()
                raise _connection_error(error) from error

    def _next_event(self) -> bytes:
        while not self._events:
            if not (piece := self._read()):
                raise StopIteration
            self._events.extend(self._parser.feed(piece))
        return self._events.popleft()

    def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        self._socket.settimeout(self._deadline.remaining())
        if self._response is None:
            self._response = self._connection.getresponse()
            if self._response.status != http.client.OK:
                raise _status_error(self._response.status, self._response.read())
        return self._response.read1(PIECE)

    def _end(self) -> None:
        self._ended = True
        self._connection.close()

    def cancel(self) -> None:
        """Stops the request unless it has ended; from any thread.

        The server takes a dropped connection for a cancellation when it sends the next event. It sends
        nothing for a request that waits or does not stream: that one is cancelled by its id too.
        """
        if self._ended:
            return
        with contextlib.suppress(OSError):  # the server may have closed it meanwhile
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads; closing alone would not
        with self._reading:
            self._end()
        if self._response is None and self._request.request_id:
            self._transport.cancel(self._request.request_id)


class HttpTransport:
    """The HTTP endpoint of a server."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = url
        self.headers = headers

    def open(self, request: Request, deadline: Deadline) -> HttpCall:
        """Sends `request`."""
        return HttpCall(self, request, deadline)

    def cancel(self, request_id: str) -> None:
        """Stops the request of that id, if the server can still be reached."""
        with contextlib.suppress(StopIteration, FastServeError):
            next(self.open(cancellation_request(request_id), Deadline(CANCEL_TIMEOUT)))

    def is_ready(self, timeout: float | None) -> bool:
        connection = http.client.HTTPConnection(self.url, timeout=timeout)
        try:
            connection.request("GET", READY_PATH, headers=dict(self.headers))
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing is kept open between calls."""


class AsyncHttpCall:
    """A call on its way: iterate for its responses."""

    def __init__(
        self, transport: AsyncHttpTransport, request: Request, response: asyncio.Task[aiohttp.ClientResponse]
    ) -> None:
        self._transport = transport
        self._request = request
        self._response = response
        self._parser = EventParser()
        self._events: deque[bytes] = deque()
        self._cancelled = False

    async def __anext__(self) -> Outputs:
        try:
            return _outputs_of(await self._next_event())
        except FastServeError:
            self._drop_connection()
            raise
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            self._drop_connection()
            raise _connection_error(error) from error
        except asyncio.CancelledError:
            if self._cancelled:
                raise FastServeError("CANCELLED", "the call was cancelled") from None
            raise

    async def _next_event(self) -> bytes:
        while not self._events:
            if not (piece := await self._read()):
                raise StopAsyncIteration
            self._events.extend(self._parser.feed(piece))
        return self._events.popleft()

    async def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        response = await self._response
        if response.status != http.client.OK:
            raise _status_error(response.status, await response.read())
        return await response.content.readany()

    async def cancel(self) -> None:
        """Stops the request unless it has ended; by its id too where nothing has come, as `HttpCall` says."""
        if self._cancelled:
            return
        self._cancelled = True
        has_not_begun = not self._response.done() or self._response.cancelled()
        self._drop_connection()
        if has_not_begun and self._request.request_id:
            await self._transport.cancel(self._request.request_id)

    def _drop_connection(self) -> None:
        self._response.cancel()
        if self._response.done() and not self._response.cancelled() and self._response.exception() is None:
            self._response.result().close()


class AsyncHttpTransport:
    """The HTTP endpoint of a server, for one event loop."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._session = aiohttp.ClientSession(
            f"http://{url}", headers=headers, connector=aiohttp.TCPConnector(limit=0)
        )

    def open(self, request: Request, deadline: Deadline) -> AsyncHttpCall:
        """Sends `request`."""
        response = asyncio.create_task(self._post(request, deadline.remaining()))
        return AsyncHttpCall(self, request, response)

    async def cancel(self, request_id: str) -> None:
        """Stops the request of that id, if the server can still be reached."""
        with contextlib.suppress(StopAsyncIteration, FastServeError):
            await self.open(cancellation_request(request_id), Deadline(CANCEL_TIMEOUT)).__anext__()

    async def _post(self, request: Request, timeout: float | None) -> aiohttp.ClientResponse:
        return await self._session.post(
            _path(request), data=request.to_json(timeout), headers=JSON_BODY, timeout=_client_timeout(timeout)
        )

    async def is_ready(self, timeout: float | None) -> bool:
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
        raise server_error(members["error"])
    # The server writes a tensor of one element as that element.
    return {name: value if isinstance(value, list) else [value] for name, value in members.items()}


def _status_error(status: int, body: bytes) -> FastServeError:
    """The error of a response whose status is not 200: its body is JSON, or one event."""
    text = body.decode(errors="replace").strip().removeprefix("data: ")
    try:
        message = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        message = text or http.client.responses.get(status, f"HTTP status {status}")
    return server_error(message, STATUS_CODES.get(status, "INTERNAL"))


def _connection_error(error: Exception) -> FastServeError:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return DeadlineExceeded()
    return FastServeError("UNAVAILABLE", f"the connection failed: {type(error).__name__}: {error}")
