"""The clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from fastserve_client.generation import Generation
from fastserve_client.grpc_transport import AsyncGrpcTransport, GrpcTransport
from fastserve_client.http_transport import AsyncHttpTransport, HttpTransport
from fastserve_client.options import Message, Options
from fastserve_client.request import cancellation_request, generation_request
from fastserve_client.stream import AsyncStream, AsyncTransport, Stream, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack

Protocol = Literal["grpc", "http"]
DEFAULT_URLS: Mapping[Protocol, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}

_TRANSPORTS: Mapping[Protocol, Callable[[str, Mapping[str, str]], Transport]] = {
    "grpc": GrpcTransport,
    "http": HttpTransport,
}
_ASYNC_TRANSPORTS: Mapping[Protocol, Callable[[str, Mapping[str, str]], AsyncTransport]] = {
    "grpc": AsyncGrpcTransport,
    "http": AsyncHttpTransport,
}


class Client:
    """A client that any number of threads may share, gevent's greenlets among them.

    `url` is `host:port`, by default the server's port for `protocol` on this machine. A request of which
    nothing has come is sent again up to `retries` times where the server was UNAVAILABLE. `headers` go with
    every call (over gRPC: metadata).
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: Protocol = "grpc",
        *,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._transport = _TRANSPORTS[protocol](url or DEFAULT_URLS[protocol], headers or {})
        self._retries = retries

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """The whole answer to one of `prompt`, `messages` and `prompt_token_ids`.

        Raises DeadlineExceeded, or FastServeError with the server's code and sentence.
        """
        request = generation_request(prompt, messages, prompt_token_ids, False, options)
        with Stream(self._transport, request, options.get("timeout"), self._retries) as stream:
            return stream.read()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """The answer in chunks, as they come. The request is sent before this returns.

        Raises FastServeError, as iteration does.
        """
        request = generation_request(prompt, messages, prompt_token_ids, True, options)
        return Stream(self._transport, request, options.get("timeout"), self._retries)

    def cancel(self, request_id: str, timeout: float | None = None) -> None:
        """Stops the requests of that id, whoever sent them; one that is not known is no error.

        `timeout`: seconds; None: until the server has answered. Raises FastServeError.
        """
        Stream(self._transport, cancellation_request(request_id), timeout, self._retries).wait()

    def is_ready(self, timeout: float | None = None) -> bool:
        """Whether the server answers and all its models are ready.

        `timeout`: seconds after which a server that has not answered is not ready; None: never.
        """
        return self._transport.is_ready(timeout)

    def close(self) -> None:
        """Closes the channel; what is still running on it is cancelled."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio. Make it inside the event loop that uses it."""

    def __init__(
        self,
        url: str | None = None,
        protocol: Protocol = "grpc",
        *,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._transport = _ASYNC_TRANSPORTS[protocol](url or DEFAULT_URLS[protocol], headers or {})
        self._retries = retries

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """The whole answer to one of `prompt`, `messages` and `prompt_token_ids`.

        Raises DeadlineExceeded, or FastServeError with the server's code and sentence.
        """
        request = generation_request(prompt, messages, prompt_token_ids, False, options)
        async with AsyncStream(self._transport, request, options.get("timeout"), self._retries) as stream:
            return await stream.read()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """The answer in chunks, as they come. The request is sent as soon as the event loop runs.

        Iteration raises FastServeError.
        """
        request = generation_request(prompt, messages, prompt_token_ids, True, options)
        return AsyncStream(self._transport, request, options.get("timeout"), self._retries)

    async def cancel(self, request_id: str, timeout: float | None = None) -> None:
        """Stops the requests of that id, whoever sent them; one that is not known is no error.

        `timeout`: seconds; None: until the server has answered. Raises FastServeError.
        """
        await AsyncStream(self._transport, cancellation_request(request_id), timeout, self._retries).wait()

    async def is_ready(self, timeout: float | None = None) -> bool:
        """Whether the server answers and all its models are ready.

        `timeout`: seconds after which a server that has not answered is not ready; None: never.
        """
        return await self._transport.is_ready(timeout)

    async def close(self) -> None:
        """Closes the connections; what is still running on them is cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
