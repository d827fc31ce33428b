"""Calls over gRPC: one `ModelStreamInfer` call of its own per request, all on one channel.

The usual stream of `tritonclient` carries all requests of a client in one call. A call of its own can be
cancelled alone and is iterated where it is made.

An error of a stream comes in a message, its code before the sentence: the one form of errors with which
Triton server 2.51 was never seen to crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from fastserve_client.deadline import Deadline
from fastserve_client.endpoint import Endpoint, Tls
from fastserve_client.errors import DeadlineExceeded, FastServeError, server_error
from fastserve_client.generation import Outputs
from fastserve_client.request import Request

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own waits before it connects again (1 s, growing to 120 s) would outlast all our retries.
    # `min_reconnect_backoff_ms` stays at its 20 s: it is also the time in which a connection must come about,
    # and a busy machine needs seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
STATUS_CODES = {"INVALID_ARGUMENT": "INVALID_ARG", "UNIMPLEMENTED": "UNSUPPORTED"}
"""The gRPC status codes that the Triton server calls by another name."""


END_SECONDS = 1.0
"""For a call that has failed to end by itself: of calls that were cancelled instead, Triton server 2.51 was
seen to keep some requests for ever, and then a model cannot be unloaded any more."""


class _Calls:
    """The server's calls on a channel of either kind, each with the endpoint's headers."""

    def __init__(self, channel: Any, endpoint: Endpoint) -> None:
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._metadata = [(name.lower(), value) for name, value in endpoint.headers.items()]
        if endpoint.authorization:
            self._metadata.append(("authorization", endpoint.authorization))

    def infer(self, request: Request, timeout: float | None) -> Any:
        messages: Iterator[service_pb2.ModelInferRequest] = iter([request.to_grpc(timeout)])
        metadata = self._metadata + [(name.lower(), value) for name, value in request.headers.items()]
        return self._stub.ModelStreamInfer(messages, timeout=timeout, metadata=metadata)

    def ready(self, timeout: float | None) -> Any:
        return self._stub.ServerReady(
            service_pb2.ServerReadyRequest(), timeout=timeout, metadata=self._metadata
        )


class GrpcCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> Outputs:
        try:
            return _outputs_of(next(self._call))
        except grpc.RpcError as error:
            raise _status_error(error) from error
        except FastServeError:
            self._await_end()
            raise

    def _await_end(self) -> None:
        ended = threading.Event()
        if self._call.add_callback(ended.set):
            ended.wait(END_SECONDS)

    def cancel(self) -> None:
        """Stops the request unless it has ended; from any thread."""
        self._call.cancel()


class GrpcTransport:
    """The gRPC endpoint of a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = (
            grpc.secure_channel(endpoint.address, _credentials(endpoint.tls), CHANNEL_OPTIONS)
            if endpoint.tls
            else grpc.insecure_channel(endpoint.address, CHANNEL_OPTIONS)
        )
        self._calls = _Calls(self._channel, endpoint)

    def open(self, request: Request, deadline: Deadline) -> GrpcCall:
        """Sends `request`."""
        return GrpcCall(self._calls.infer(request, deadline.remaining()))

    def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""
        try:
            return self._calls.ready(timeout).ready
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Closes the channel; what is still running on it is cancelled."""
        self._channel.close()


class AsyncGrpcCall:
    """A call on its way: iterate for its responses."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._responses = call.__aiter__()
        self._cancelled = False

    async def __anext__(self) -> Outputs:
        try:
            return _outputs_of(await self._responses.__anext__())
        except grpc.RpcError as error:
            raise _status_error(error) from error
        except FastServeError:
            await self._await_end()
            raise
        except asyncio.CancelledError:
            if self._cancelled:
                raise FastServeError("CANCELLED", "the call was cancelled") from None
            raise

    async def _await_end(self) -> None:
        ended = asyncio.Event()
        self._call.add_done_callback(lambda call: ended.set())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), END_SECONDS)

    async def cancel(self) -> None:
        """Stops the request unless it has ended."""
        self._cancelled = True
        self._call.cancel()


class AsyncGrpcTransport:
    """The gRPC endpoint of a server, for one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = (
            grpc.aio.secure_channel(endpoint.address, _credentials(endpoint.tls), CHANNEL_OPTIONS)
            if endpoint.tls
            else grpc.aio.insecure_channel(endpoint.address, CHANNEL_OPTIONS)
        )
        self._calls = _Calls(self._channel, endpoint)

    def open(self, request: Request, deadline: Deadline) -> AsyncGrpcCall:
        """Sends `request` as soon as the event loop runs."""
        return AsyncGrpcCall(self._calls.infer(request, deadline.remaining()))

    async def is_ready(self, timeout: float | None) -> bool:
        """Whether the readiness probe says so; an answer later than `timeout` seconds is none."""
        try:
            return (await self._calls.ready(timeout)).ready
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        """Closes the channel; what is still running on it is cancelled."""
        await self._channel.close()


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    files = (tls.root_certificates, tls.private_key, tls.certificate_chain)
    return grpc.ssl_channel_credentials(*(file.read_bytes() if file else None for file in files))


def _outputs_of(response: service_pb2.ModelStreamInferResponse) -> Outputs:
    """The output tensors of a response. Raises FastServeError where it says one."""
    if response.error_message:
        raise server_error(response.error_message)
    result = InferResult(response.infer_response)
    return {
        output.name: [
            element.decode(errors="replace") if isinstance(element, bytes) else element
            for element in result.as_numpy(output.name).tolist()
        ]
        for output in response.infer_response.outputs
    }


def _status_error(error: Any) -> FastServeError:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded()
    name = error.code().name
    return FastServeError(STATUS_CODES.get(name, name), error.details())
