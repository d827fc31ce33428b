"""`/v1/models` and `/health`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api.errors import ApiError
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.http_answers import json_response

READY_SECONDS = 5.0
"""For the server to say that it is ready."""


async def list_models(request: Request) -> Response:
    """The models that are served."""
    door: FrontDoor = request.app.state.door
    names = [*filter(None, [door.model_name]), *door.encoders]
    return json_response({"object": "list", "data": [_model(door, name) for name in names]})


async def show_model(request: Request) -> Response:
    """The model of that name. Raises ApiError (404)."""
    door: FrontDoor = request.app.state.door
    name = request.path_params["name"]
    if name not in door.encoders:
        door.check_model(name)
    return json_response(_model(door, name))


def _model(door: FrontDoor, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": door.created, "owned_by": "fastserve"}


async def health(request: Request) -> Response:
    """200 where the server behind is ready. Raises ApiError (503)."""
    door: FrontDoor = request.app.state.door
    if not await door.client.is_ready(READY_SECONDS):
        raise ApiError(503, "service_unavailable_error", "the server is not ready", retry_after=1.0)
    return json_response({"status": "ready"})
