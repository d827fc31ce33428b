"""The body of a request: JSON of a declared type."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request

from fastserve.openai_api.errors import ApiError, malformed

MAX_BODY_BYTES = 64 << 20
"""A body of more is refused before it is read."""

Body = TypeVar("Body")


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body. Raises ApiError: 400 for what is no such JSON, 413 for a body that is too long."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                413, "invalid_request_error", f"the body: got more than the {MAX_BODY_BYTES} bytes allowed"
            )
        chunks.append(chunk)
    try:
        return msgspec.json.decode(b"".join(chunks), type=kind)
    except msgspec.ValidationError as error:
        raise malformed(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_request_error", f"the body is no JSON: {error}") from error
