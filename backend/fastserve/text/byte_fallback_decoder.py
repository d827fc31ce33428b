"""Incremental decoding where characters that the vocabulary lacks are spelled in byte tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from fastserve.text.detokenizer import REPLACEMENT


class ByteFallbackDecoder:
    """For vocabularies of text whose missing characters are spelled in byte tokens (Llama 2, Mistral, Gemma).

    A run of byte tokens is text if the whole run is UTF-8, and one U+FFFD per byte if not. So a run is held
    back until it ends, or until it is certain that it is no UTF-8.
    """

    def __init__(self, token_piece: Callable[[int], str | int], stripped: str, max_stripped: int) -> None:
        """`token_piece`: a token's text, or the value of a byte token. Of the character `stripped`, up to
        `max_stripped` at the beginning of the whole text are dropped."""
        self._token_piece = token_piece
        self._stripped = stripped
        self._left_to_strip = max_stripped
        self._start_run()

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the bytes of an unfinished character; the beginning of the text has been before."""
        if not token_ids:
            return
        self._left_to_strip = 0
        for token_id in token_ids:
            self.push(token_id)
            if self._run_is_broken:  # by the rest of a character that began before these tokens
                self._start_run()
        unfinished = self._utf8.getstate()[0]
        self._start_run()
        self._utf8.decode(unfinished)

    def push(self, token_id: int) -> str:
        """The token's text, after that of the byte tokens before it; nothing yet for a byte token."""
        piece = self._token_piece(token_id)
        if isinstance(piece, int):
            return self._strip(self._push_byte(piece))
        return self._strip(self._end_run() + piece)

    def flush(self) -> str:
        """The text of the byte tokens at the end."""
        return self._strip(self._end_run())

    def _start_run(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_text = ""
        self._run_length = 0
        self._run_is_broken = False

    def _push_byte(self, byte: int) -> str:
        if self._run_is_broken:
            return REPLACEMENT
        self._run_length += 1
        try:
            self._run_text += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_is_broken = True
            return REPLACEMENT * self._run_length
        return ""

    def _end_run(self) -> str:
        text = self._run_text
        unfinished = self._utf8.getstate()[0]
        if self._run_is_broken:
            text = ""
        elif unfinished:  # bytes of a character that was never completed
            text = REPLACEMENT * self._run_length
        if self._run_length or unfinished:
            self._start_run()
        return text

    def _strip(self, text: str) -> str:
        while text and self._left_to_strip:
            if text[0] != self._stripped:
                self._left_to_strip = 0
                break
            text = text[1:]
            self._left_to_strip -= 1
        return text
