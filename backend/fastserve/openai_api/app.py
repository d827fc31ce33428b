"""The web application."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastserve.openai_api.anthropic_messages import count_tokens, messages
from fastserve.openai_api.chat_completions import chat_completions
from fastserve.openai_api.completions import completions
from fastserve.openai_api.encoders import classify, embeddings, rerank
from fastserve.openai_api.errors import ApiError
from fastserve.openai_api.front_door import FrontDoor, GenerationClient, PromptTokenizer
from fastserve.openai_api.http_answers import CLIENT_GONE, ClientGone, error_response
from fastserve.openai_api.models import health, list_models, show_model
from fastserve.openai_api.responses import responses
from fastserve.openai_api.tokenization import detokenize, tokenize
from fastserve.openai_api.tool_formats import ToolFormat

logger = logging.getLogger(__name__)

ROUTES = [
    Route("/health", health),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    *(Route(path, rerank, methods=["POST"]) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    Route("/classify", classify, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]


def create_app(
    new_client: Callable[[], GenerationClient],
    model_name: str | None,
    tool_format: ToolFormat | None = None,
    has_keys: bool = False,
    tokenizer: PromptTokenizer | None = None,
    encoders: Mapping[str, str] | None = None,
) -> Starlette:
    """The application. `new_client` is called inside the event loop, which the client then belongs to.

    `tool_format`: how the model writes tool calls; without it, tools are refused. Others: see `FrontDoor`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        """The client lives as long as the application."""
        client = new_client()
        app.state.door = FrontDoor(client, model_name, tool_format, has_keys, tokenizer, encoders or {})
        try:
            yield
        finally:
            await client.close()

    handlers = {
        ApiError: _refused,
        ClientGone: _gone,
        HTTPException: _no_such_route,
        Exception: _failed,
    }
    return Starlette(routes=ROUTES, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]


def _refused(request: Request, error: ApiError) -> Response:
    return error_response(request, error)


def _gone(request: Request, error: ClientGone) -> Response:
    return Response(status_code=CLIENT_GONE)


def _no_such_route(request: Request, error: HTTPException) -> Response:
    paths = ", ".join(route.path for route in ROUTES)
    said = {
        404: f"no such path: {request.url.path}; there are {paths}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return error_response(request, ApiError(error.status_code, "invalid_request_error", said))


def _failed(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(
        request, ApiError(500, "server_error", "the request failed; the server's log says why")
    )
