"""Log-probabilities in the JSON of vLLM's backend for Triton server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from fastserve.types import TokenLogprob

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def logprobs_json(positions: list[list[TokenLogprob]], token_text: Callable[[int], str]) -> str:
    """Per position {token id: {"logprob", "rank", "decoded_token"}}; null for one without entries."""
    return msgspec.json.encode([_position(entries, token_text) for entries in positions]).decode()


def _position(entries: list[TokenLogprob], token_text: Callable[[int], str]) -> dict[str, Any] | None:
    return {
        str(token_id): {
            "logprob": max(logprob, _LOWEST_LOGPROB),
            "rank": rank,
            "decoded_token": token_text(token_id),
        }
        for token_id, logprob, rank in entries
    } or None
