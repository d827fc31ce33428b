"""The stream of a request: its chunks as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from fastserve_client.backoff import Backoff
from fastserve_client.closing import AsyncClosing, Closing
from fastserve_client.deadline import Deadline
from fastserve_client.errors import FastServeError
from fastserve_client.generation import Chunk, Generation, Outputs, chunk_of, join
from fastserve_client.request import Request


class Call(Protocol):
    """One attempt to have a request served. `__next__` raises FastServeError."""

    def __next__(self) -> Outputs: ...

    def cancel(self) -> None:
        """Stops the request, unless it has ended; from any thread. What has ended holds no resources."""


class Transport(Protocol):
    """One endpoint of a server."""

    def open(self, request: Request, deadline: Deadline) -> Call:
        """Sends a request. Raises FastServeError where it shows at once that it fails."""

    def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""

    def close(self) -> None:
        """Cancels what runs."""


class AsyncCall(Protocol):
    """`Call` for asyncio."""

    async def __anext__(self) -> Outputs: ...

    async def cancel(self) -> None:
        """Stops the request, unless it has ended."""


class AsyncTransport(Protocol):
    """`Transport` for asyncio; its `open` raises nothing."""

    def open(self, request: Request, deadline: Deadline) -> AsyncCall:
        """Sends a request as soon as the event loop runs."""

    async def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""

    async def close(self) -> None:
        """Cancels what runs."""


class _Attempts:
    """A request, the time that it has, and when it is sent again."""

    def __init__(self, request: Request, timeout: float | None, retries: int) -> None:
        self.request_id = request.request_id
        self._request = request
        self._deadline = Deadline(timeout)
        self._backoff = Backoff(retries, self._deadline)
        self._closed = False


class Stream(_Attempts, Closing, Iterator[Chunk]):
    """The chunks of an answer as they come; the request is under way from the start.

    Iteration raises DeadlineExceeded or another FastServeError. A request of which nothing has come yet is
    sent again as `Backoff` says. Left early, by `close()` or the end of a `with`, the request is cancelled.
    """

    def __init__(self, transport: Transport, request: Request, timeout: float | None, retries: int) -> None:
        super().__init__(request, timeout, retries)
        self._transport = transport
        self._call = self._open()

    def _open(self) -> Call:
        while True:
            try:
                return self._transport.open(self._request, self._deadline)
            except FastServeError as error:
                time.sleep(self._backoff.delay_after(error))

    def __next__(self) -> Chunk:
        return chunk_of(self._next_outputs())

    def _next_outputs(self) -> Outputs:
        while not self._closed:
            try:
                outputs = next(self._call)
            except StopIteration:
                break
            except FastServeError as error:
                if self._closed:
                    break
                time.sleep(self._backoff.delay_after(error))
                self._call = self._open()
            else:
                self._backoff.has_begun = True
                return outputs
        self.close()  # its call may have been opened while another thread closed this stream
        raise StopIteration

    def read(self) -> Generation:
        """What is left of the answer, in one piece. Raises as iteration does."""
        return join(list(self))

    def wait(self) -> None:
        """Waits for the end of a request whose answer is not text. Raises as iteration does."""
        with contextlib.suppress(StopIteration):
            while True:
                self._next_outputs()

    def outputs(self) -> Outputs:
        """The tensors of a request that has one response. Raises as iteration does.

        The call is read to its end: one that is left before may be kept by Triton server 2.51 for ever.
        """
        try:
            found = self._next_outputs()
        except StopIteration:
            raise FastServeError("INTERNAL", "the server has ended the call without an answer") from None
        self.wait()
        return found

    def close(self) -> None:
        """Cancels the request unless it has ended; from any thread. Iteration ends."""
        self._closed = True
        self._call.cancel()


class AsyncStream(_Attempts, AsyncClosing, AsyncIterator[Chunk]):
    """`Stream` for asyncio: `async for`, `async with`, `await stream.read()`."""

    def __init__(
        self, transport: AsyncTransport, request: Request, timeout: float | None, retries: int
    ) -> None:
        super().__init__(request, timeout, retries)
        self._transport = transport
        self._call = transport.open(request, self._deadline)

    async def __anext__(self) -> Chunk:
        return chunk_of(await self._next_outputs())

    async def _next_outputs(self) -> Outputs:
        while not self._closed:
            try:
                outputs = await self._call.__anext__()
            except StopAsyncIteration:
                break
            except FastServeError as error:
                if self._closed:
                    break
                await asyncio.sleep(self._backoff.delay_after(error))
                self._call = self._transport.open(self._request, self._deadline)
            else:
                self._backoff.has_begun = True
                return outputs
        await self.close()  # its call may have been opened while another task closed this stream
        raise StopAsyncIteration

    async def read(self) -> Generation:
        """What is left of the answer, in one piece. Raises as iteration does."""
        return join([chunk async for chunk in self])

    async def wait(self) -> None:
        """Waits for the end of a request whose answer is not text. Raises as iteration does."""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                await self._next_outputs()

    async def outputs(self) -> Outputs:
        """The tensors of a request that has one response. Raises as iteration does.

        The call is read to its end: one that is left before may be kept by Triton server 2.51 for ever.
        """
        try:
            found = await self._next_outputs()
        except StopAsyncIteration:
            raise FastServeError("INTERNAL", "the server has ended the call without an answer") from None
        await self.wait()
        return found

    async def close(self) -> None:
        """Cancels the request unless it has ended. Iteration ends."""
        self._closed = True
        await self._call.cancel()
