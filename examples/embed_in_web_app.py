"""The engine inside a web application of one's own, without Triton server.

    pip install fastserve
    python examples/embed_in_web_app.py
    curl -N http://127.0.0.1:8080/generate -d '{"prompt": "Once there was", "max_tokens": 99, "priority": 5}'

One `ModelServer` serves all requests of the application: they share its batch and its KV cache, by priority.
A browser that goes away stops its request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fastserve import Model, ModelServer
from fastserve.embedded import Task
from fastserve.errors import ErrorCode, RequestError

STATUS_CODES = {ErrorCode.INVALID_ARG: 400, ErrorCode.UNAVAILABLE: 503}
"""Those of refusals; any other error is 500."""


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request."""

    prompt: str
    max_tokens: int = 100
    temperature: float = 0.7
    priority: int = 0


def create_app(server: ModelServer) -> Starlette:
    """An application with one route, `POST /generate`: a JSON object in, text out as it comes."""

    async def generate(request: Request) -> Response:
        try:
            body = msgspec.json.decode(await request.body(), type=Prompt)
            task = server.submit(
                body.prompt, priority=body.priority, max_tokens=body.max_tokens, temperature=body.temperature
            )
        except msgspec.DecodeError as error:
            return JSONResponse({"error": str(error)}, 400)
        except RequestError as error:
            return JSONResponse({"error": str(error)}, STATUS_CODES.get(error.code, 500))
        return StreamingResponse(text_of(task), media_type="text/plain; charset=utf-8")

    return Starlette(routes=[Route("/generate", generate, methods=["POST"])])


async def text_of(task: Task) -> AsyncIterator[str]:
    """The task's text. Waiting for it blocks, so a thread does that; left early, the task is cancelled."""
    try:
        async for piece in iterate_in_threadpool(task):
            yield piece
    except BaseException:
        task.cancel()
        raise


def main() -> None:
    """Serves the default model on port 8080 of this machine until Ctrl-C."""
    with ModelServer(Model.load()) as server:
        uvicorn.run(create_app(server), host="127.0.0.1", port=8080)


if __name__ == "__main__":
    main()
