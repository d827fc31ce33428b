"""Answers over HTTP: whole ones and streams, both abandoned when their client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastserve.openai_api import sse
from fastserve.openai_api.errors import ApiError

Answer = TypeVar("Answer")
ANTHROPIC_PATH = "/v1/messages"
CLIENT_GONE = 499
"""nginx' status for a client that left before its answer: only a log sees it."""


class ClientGone(Exception):
    """The client has closed its connection."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(request: Request, error: ApiError) -> Response:
    """The error as an answer, in the shape of the API that was called."""
    body = error.body
    if request.url.path.startswith(ANTHROPIC_PATH):
        body = {"type": "error", "error": error.anthropic_error}
    return json_response(body, error.status, error.headers)


async def until_gone(request: Request, work: Awaitable[Answer]) -> Answer:
    """What `work` returns. A client that leaves meanwhile cancels it. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Events as they come. The first one is made before the status is sent, so that a refusal has its own."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None) -> None:
        self._events = events
        super().__init__(events, headers=sse.HEADERS | (headers or {}), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end or the client leaves; either way the events are closed."""
        sending = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(_disconnected(Request(scope, receive)))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not isinstance(sending.exception(), OSError):
                sending.result()
        finally:
            for each in (sending, gone):
                each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await sending
            await self._events.aclose()


async def event_stream(
    request: Request, events: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None
) -> Response:
    """The stream, once its first event has come. Raises what making that raises, and ClientGone."""
    try:
        first = await until_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_with_first(first, events), headers)


async def _with_first(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for each in events:
            yield each
    finally:
        await events.aclose()
