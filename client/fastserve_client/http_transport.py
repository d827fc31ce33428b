"""Calls over HTTP, a connection of its own per call.

The libraries are `http.client` and `aiohttp`, which can do what a call promises: `http.client` sends without
waiting for an answer and takes a new time limit for every read, so that a deadline is that of the whole call.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection

import aiohttp

from fastserve_client.deadline import Deadline
from fastserve_client.endpoint import Endpoint
from fastserve_client.errors import FastServeError
from fastserve_client.generation import Outputs
from fastserve_client.http_messages import (
    JSON_BODY,
    READY_PATH,
    body_of,
    connection_error,
    path_of,
    status_error,
)
from fastserve_client.request import Request, cancellation_request

PIECE = 65536
"""Bytes read at once, at most."""
CANCEL_TIMEOUT = 2.0
"""Seconds that leaving a call waits for an answer; the server acts on what was sent, however late."""
FAILURES = (OSError, HTTPException)
ASYNC_FAILURES = (OSError, aiohttp.ClientError, asyncio.TimeoutError)


class HttpCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, transport: HttpTransport, request: Request, deadline: Deadline) -> None:
        self._transport = transport
        self._request = request
        self._deadline = deadline
        self._connection = transport.connection(deadline.remaining())
        self._response: HTTPResponse | None = None
        self._reading = threading.Lock()
        self._body = body_of(request)
        self._ended = False
        try:
            self._connection.connect()
            self._socket: socket.socket = self._connection.sock
            body = request.to_json(deadline.remaining(), transport.authorization)
            headers = {**JSON_BODY, **transport.headers, **request.headers}
            self._connection.request("POST", path_of(request), body, headers)
        except FAILURES as error:
            self._connection.close()
            raise connection_error(error) from error

    def __next__(self) -> Outputs:
        with self._reading:
            if self._ended:
                raise StopIteration
            try:
                return self._next_outputs()
            except (StopIteration, FastServeError):
                self._end()
                raise
            except FAILURES as error:
                self._end()
                raise connection_error(error) from error

    def _next_outputs(self) -> Outputs:
        while (outputs := self._body.next_outputs()) is None:
            if not (piece := self._read()):
                if (outputs := self._body.end()) is None:
                    raise StopIteration
                return outputs
            self._body.feed(piece)
        return outputs

    def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        self._socket.settimeout(self._deadline.remaining())
        if self._response is None:
            self._response = self._connection.getresponse()
            if self._response.status != HTTPStatus.OK:
                raise status_error(self._response.status, self._response.read())
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
            # Wakes a thread that reads; closing alone would not. Under TLS too by the plain socket's method:
            # that of an SSLSocket takes away what the thread reads with.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        with self._reading:
            self._end()
        if self._response is None and self._request.request_id:
            self._transport.cancel(self._request.request_id)


class HttpTransport:
    """The HTTP endpoint of a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.headers = dict(endpoint.headers)
        self.authorization = endpoint.authorization
        self._address = endpoint.address
        self._context = endpoint.tls.context() if endpoint.tls else None

    def connection(self, timeout: float | None) -> HTTPConnection:
        """A connection that is not made yet; `timeout`: seconds for each of its reads and writes."""
        if self._context:
            return HTTPSConnection(self._address, timeout=timeout, context=self._context)
        return HTTPConnection(self._address, timeout=timeout)

    def open(self, request: Request, deadline: Deadline) -> HttpCall:
        """Sends `request`. Raises FastServeError where the connection fails."""
        return HttpCall(self, request, deadline)

    def cancel(self, request_id: str) -> None:
        """Stops the request of that id, if the server can still be reached."""
        with contextlib.suppress(StopIteration, FastServeError):
            next(self.open(cancellation_request(request_id), Deadline(CANCEL_TIMEOUT)))

    def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""
        connection = self.connection(timeout)
        try:
            connection.request("GET", READY_PATH, headers=self.headers)
            return connection.getresponse().status == HTTPStatus.OK
        except FAILURES:
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
        self._body = body_of(request)
        self._cancelled = False

    async def __anext__(self) -> Outputs:
        try:
            return await self._next_outputs()
        except FastServeError:
            self._drop_connection()
            raise
        except ASYNC_FAILURES as error:
            self._drop_connection()
            raise connection_error(error) from error
        except asyncio.CancelledError:
            if self._cancelled:
                raise FastServeError("CANCELLED", "the call was cancelled") from None
            raise

    async def _next_outputs(self) -> Outputs:
        while (outputs := self._body.next_outputs()) is None:
            if not (piece := await self._read()):
                if (outputs := self._body.end()) is None:
                    raise StopAsyncIteration
                return outputs
            self._body.feed(piece)
        return outputs

    async def _read(self) -> bytes:
        """The next piece of the response's body; empty at its end."""
        response = await self._response
        if response.status != HTTPStatus.OK:
            raise status_error(response.status, await response.read())
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

    def __init__(self, endpoint: Endpoint) -> None:
        self._authorization = endpoint.authorization
        context = endpoint.tls.context() if endpoint.tls else True  # True: not used
        self._session = aiohttp.ClientSession(
            f"{'https' if endpoint.tls else 'http'}://{endpoint.address}",
            headers=endpoint.headers,
            connector=aiohttp.TCPConnector(limit=0, ssl=context),
        )

    def open(self, request: Request, deadline: Deadline) -> AsyncHttpCall:
        """Sends `request` as soon as the event loop runs."""
        response = asyncio.create_task(self._post(request, deadline.remaining()))
        return AsyncHttpCall(self, request, response)

    async def cancel(self, request_id: str) -> None:
        """Stops the request of that id, if the server can still be reached."""
        with contextlib.suppress(StopAsyncIteration, FastServeError):
            await self.open(cancellation_request(request_id), Deadline(CANCEL_TIMEOUT)).__anext__()

    async def _post(self, request: Request, timeout: float | None) -> aiohttp.ClientResponse:
        return await self._session.post(
            path_of(request),
            data=request.to_json(timeout, self._authorization),
            headers={**JSON_BODY, **request.headers},
            timeout=_client_timeout(timeout),
        )

    async def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""
        try:
            async with self._session.get(READY_PATH, timeout=_client_timeout(timeout)) as response:
                return response.status == HTTPStatus.OK
        except ASYNC_FAILURES:
            return False

    async def close(self) -> None:
        """Closes the connections; what is still running on them is cancelled."""
        await self._session.close()


def _client_timeout(seconds: float | None) -> aiohttp.ClientTimeout:
    # aiohttp would round a long timeout up to a whole second.
    return aiohttp.ClientTimeout(total=seconds, ceil_threshold=math.inf)
