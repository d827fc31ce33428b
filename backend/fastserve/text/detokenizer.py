"""Incremental decoding of one sequence."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the ids of one sequence into text as they come.

    The texts of all pushes and of the flush, joined, equal `tokenizer.decode` of all ids; ids that the
    tokenizer does not know have no text. No text ends in the middle of a character: what could still become
    one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._decoder = tokenizer.new_stream_decoder()
        self._known = tokenizer.token_ids
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        shown = (token for token in token_ids if token in self._known and token not in self._skipped)
        return "".join(map(self._decoder.push, shown))

    def flush(self) -> str:
        """The text held back. Nothing may be pushed after."""
        return self._decoder.flush()
