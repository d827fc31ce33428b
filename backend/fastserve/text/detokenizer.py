"""Incremental decoding of one sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from fastserve.text.stream_decoder import CONTEXT_TOKENS
from fastserve.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the ids of one sequence into text as they come.

    The texts of all pushes and of the flush, joined, are what `tokenizer.decode` of the prompt and all ids
    has more than that of the prompt; ids that the tokenizer does not know have no text. No text ends in the
    middle of a character: what could still become one is held back. One that the prompt's ids begin and
    these complete is shown whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = tokenizer.new_stream_decoder()
        self._known = tokenizer.token_ids
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        context = list(islice(filter(self._is_shown, reversed(prompt_token_ids)), CONTEXT_TOKENS))
        self._decoder.follow(context[::-1])

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        return "".join(map(self._decoder.push, filter(self._is_shown, token_ids)))

    def _is_shown(self, token_id: int) -> bool:
        return token_id in self._known and token_id not in self._skipped

    def flush(self) -> str:
        """The text held back. Nothing may be pushed after."""
        return self._decoder.flush()
