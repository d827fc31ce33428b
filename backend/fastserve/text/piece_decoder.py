"""Incremental decoding where tokens are text, and no character is in pieces."""

from __future__ import annotations

from collections.abc import Callable


class PieceDecoder:
    """For decoders without bytes, where a token's text depends on nothing but the token before it
    (Metaspace, WordPiece, BPEDecoder, none)."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._last: list[int] = []

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the last token."""
        self._last = token_ids[-1:]

    def push(self, token_id: int) -> str:
        """What the token adds to the text of the token before it."""
        text = self._decode([*self._last, token_id])[len(self._decode(self._last)) :]
        self._last = [token_id]
        return text

    def flush(self) -> str:
        """Nothing: no text is held back."""
        return ""
