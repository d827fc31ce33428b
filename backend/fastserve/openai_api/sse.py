"""Server-sent events, as OpenAI's clients read them (WHATWG HTML, 9.2)."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""What keeps proxies from holding events back; the second one is nginx'."""
_ENCODER = msgspec.json.Encoder()


def event(data: Any) -> bytes:
    """One event with JSON as its data."""
    return b"data: " + _ENCODER.encode(data) + b"\n\n"
