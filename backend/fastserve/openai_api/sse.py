"""Server-sent events, as OpenAI's clients read them (WHATWG HTML, 9.2)."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""What keeps proxies from holding events back; the second one is nginx'."""
_ENCODER = msgspec.json.Encoder()


def event(data: Any, kind: str | None = None) -> bytes:
    """One event with JSON as its data; `kind`: its name, which OpenAI's chats have none of."""
    head = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    return head + b"data: " + _ENCODER.encode(data) + b"\n\n"
