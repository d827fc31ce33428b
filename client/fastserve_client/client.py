"""The clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from fastserve_client.closing import AsyncClosing, Closing
from fastserve_client.encoder_options import (
    ClassifyOptions,
    EmbedOptions,
    RerankOptions,
    classify_request,
    embed_request,
    rerank_request,
)
from fastserve_client.encoder_request import (
    Classification,
    EncoderRequest,
    RankedDocument,
    TokenLabel,
    classes_of,
    embeddings_of,
    ranks_of,
    token_labels_of,
)
from fastserve_client.endpoint import Endpoint, endpoint_of
from fastserve_client.generation import Generation, Outputs
from fastserve_client.grpc_transport import AsyncGrpcTransport, GrpcTransport
from fastserve_client.http_transport import AsyncHttpTransport, HttpTransport
from fastserve_client.options import Options
from fastserve_client.request import cancellation_request, generation_request
from fastserve_client.stream import AsyncStream, AsyncTransport, Stream, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack

Protocol = Literal["grpc", "http"]
DEFAULT_URLS: Mapping[Protocol, str] = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
AnyTransport = TypeVar("AnyTransport", Transport, AsyncTransport)


class _Connected(Generic[AnyTransport]):
    """What the clients have in common: the way to the server."""

    _transports: Mapping[Protocol, Callable[[Endpoint], Any]]

    def __init__(
        self,
        url: str | None = None,
        protocol: Protocol = "grpc",
        *,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        ssl: bool = False,
        root_certificates: str | Path | None = None,
        private_key: str | Path | None = None,
        certificate_chain: str | Path | None = None,
    ) -> None:
        """Raises ValueError for an argument that cannot be; the server is not called yet."""
        if protocol not in self._transports:
            raise ValueError(f"`protocol`: got {protocol!r}; allowed: {', '.join(self._transports)}")
        endpoint = endpoint_of(
            url or DEFAULT_URLS[protocol],
            headers,
            key,
            ssl,
            root_certificates,
            private_key,
            certificate_chain,
        )
        self._transport: AnyTransport = self._transports[protocol](endpoint)
        self._retries = retries


class Client(_Connected[Transport], Closing):
    """A client that any number of threads may share, gevent's greenlets among them.

    `url` is `host:port`, by default the server's port for `protocol` on this machine. A request of which
    nothing has come is sent again up to `retries` times where the server was UNAVAILABLE. `headers` go with
    every call (over gRPC: metadata), `key` is that of a server with keys. `ssl`: the connection has TLS; the
    PEM files are those of `Tls`.
    """

    _transports: Mapping[Protocol, Callable[[Endpoint], Transport]] = {
        "grpc": GrpcTransport,
        "http": HttpTransport,
    }

    def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """The whole answer to one of `prompt`, `messages` and `prompt_token_ids`.

        Raises DeadlineExceeded, or FastServeError with the server's code and sentence.
        """
        request = generation_request(prompt, False, options)
        with Stream(self._transport, request, options.get("timeout"), self._retries) as stream:
            return stream.read()

    def stream(self, prompt: str | None = None, **options: Unpack[Options]) -> Stream:
        """The answer in chunks, as they come. The request is sent before this returns.

        Raises FastServeError, as iteration does.
        """
        request = generation_request(prompt, True, options)
        return Stream(self._transport, request, options.get("timeout"), self._retries)

    def embed(self, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> np.ndarray:
        """The embeddings [len(texts), dimensions] float32. Raises FastServeError; ValueError for `texts`."""
        return embeddings_of(self.infer(*embed_request(texts, options)))

    def classify(self, texts: Sequence[str], **options: Unpack[ClassifyOptions]) -> list[Classification]:
        """The label of each text. Raises as `embed`."""
        return classes_of(self.infer(*classify_request(texts, options)))

    def label_tokens(
        self, texts: Sequence[str], **options: Unpack[ClassifyOptions]
    ) -> list[list[TokenLabel]]:
        """The labels of each text's tokens, by a model `classify` that has such. Raises as `embed`."""
        return token_labels_of(self.infer(*classify_request(texts, options)))

    def rerank(
        self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]
    ) -> list[RankedDocument]:
        """The documents, the most relevant to the query first. Raises as `embed`."""
        request, timeout = rerank_request(query, documents, options)
        return ranks_of(self.infer(request, timeout), options.get("top_n"))

    def infer(self, request: EncoderRequest, timeout: float | None) -> Outputs:
        """The output tensors of a request such as `embed_request` makes. Raises FastServeError."""
        with Stream(self._transport, request, timeout, self._retries) as stream:
            return stream.outputs()

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


class AsyncClient(_Connected[AsyncTransport], AsyncClosing):
    """`Client` for asyncio. Make it inside the event loop that uses it."""

    _transports: Mapping[Protocol, Callable[[Endpoint], AsyncTransport]] = {
        "grpc": AsyncGrpcTransport,
        "http": AsyncHttpTransport,
    }

    async def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """The whole answer to one of `prompt`, `messages` and `prompt_token_ids`.

        Raises DeadlineExceeded, or FastServeError with the server's code and sentence.
        """
        request = generation_request(prompt, False, options)
        async with AsyncStream(self._transport, request, options.get("timeout"), self._retries) as stream:
            return await stream.read()

    def stream(self, prompt: str | None = None, **options: Unpack[Options]) -> AsyncStream:
        """The answer in chunks, as they come. The request is sent as soon as the event loop runs.

        Iteration raises FastServeError.
        """
        request = generation_request(prompt, True, options)
        return AsyncStream(self._transport, request, options.get("timeout"), self._retries)

    async def embed(self, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> np.ndarray:
        """The embeddings [len(texts), dimensions] float32. Raises FastServeError; ValueError for `texts`."""
        return embeddings_of(await self.infer(*embed_request(texts, options)))

    async def classify(
        self, texts: Sequence[str], **options: Unpack[ClassifyOptions]
    ) -> list[Classification]:
        """The label of each text. Raises as `embed`."""
        return classes_of(await self.infer(*classify_request(texts, options)))

    async def label_tokens(
        self, texts: Sequence[str], **options: Unpack[ClassifyOptions]
    ) -> list[list[TokenLabel]]:
        """The labels of each text's tokens, by a model `classify` that has such. Raises as `embed`."""
        return token_labels_of(await self.infer(*classify_request(texts, options)))

    async def rerank(
        self, query: str, documents: Sequence[str], **options: Unpack[RerankOptions]
    ) -> list[RankedDocument]:
        """The documents, the most relevant to the query first. Raises as `embed`."""
        request, timeout = rerank_request(query, documents, options)
        return ranks_of(await self.infer(request, timeout), options.get("top_n"))

    async def infer(self, request: EncoderRequest, timeout: float | None) -> Outputs:
        """The output tensors of a request such as `embed_request` makes. Raises FastServeError."""
        async with AsyncStream(self._transport, request, timeout, self._retries) as stream:
            return await stream.outputs()

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
