"""Incremental detokenization: what a `tokenizers` decoder does to a whole sequence, by the token.

`tokenizers.decoders.DecodeStream` decodes a growing window of ids until its text no longer ends in U+FFFD.
It holds back for ever, at quadratic cost, when a model emits bytes that are no UTF-8, and it cannot be
flushed. The decoders here know the bytes of each token instead: each token costs the same, and the texts of
all `push`es and of `flush`, joined, are exactly `backend.decode(ids)`. Byte-level vocabularies' is in this
file; `stream_decoder_factory` knows the others, and which tokenizer has which.

An answer is the continuation of its prompt: a first word has a space before it that many decoders drop at the
beginning of a text. So a decoder may be told what came before by `prime`; what it gives then is what
`backend.decode(before + ids)` has more than `backend.decode(before)`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Protocol

CONTEXT_TOKENS = 4
"""So many tokens before decide how a text goes on: no character has more bytes."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """The text of one sequence of known token ids, as far as it is certain."""

    def prime(self, token_ids: list[int]) -> None:
        """Makes the sequence one that comes after these, the last CONTEXT_TOKENS of an earlier text, or all.

        To be called before anything is pushed. A character that they begin and the sequence completes is the
        sequence's. Bytes of theirs that become no character are not shown: the earlier text had U+FFFD there.
        """

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; may be empty."""

    def flush(self) -> str:
        """The text held back: no more tokens will come."""


class IncrementalDetokenizer:
    """Turns the ids of one sequence into text as they come.

    The texts of all pushes and of the flush, joined, are what `Tokenizer.decode` of the prompt and all ids
    has more than that of the prompt; ids that the tokenizer does not know have no text. No text ends in the
    middle of a character: what could still become one is held back. One that the prompt's ids begin and
    these complete is shown whole.
    """

    def __init__(
        self, decoder: StreamDecoder, is_shown: Callable[[int], bool], prompt_token_ids: Sequence[int]
    ) -> None:
        """`is_shown`: whether an id has a text; others are left out."""
        self._decoder = decoder
        self._is_shown = is_shown
        context = list(islice(filter(is_shown, reversed(prompt_token_ids)), CONTEXT_TOKENS))
        self._decoder.prime(context[::-1])

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that has become certain with these tokens."""
        return "".join(map(self._decoder.push, filter(self._is_shown, token_ids)))

    def flush(self) -> str:
        """The text held back. Nothing may be pushed after."""
        return self._decoder.flush()


class ByteLevelDecoder:
    """For vocabularies of byte strings (GPT-2, Llama 3, Qwen, SmolLM): all bytes together are UTF-8.

    Holds back at most the first bytes of one character.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._follows_unfinished = False

    def prime(self, token_ids: list[int]) -> None:
        """Keeps the bytes of an unfinished character."""
        for token_id in token_ids:
            self.push(token_id)
        self._follows_unfinished = bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The characters that the token's bytes complete."""
        return self._show(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """U+FFFD for an unfinished character."""
        return self._show(self._utf8.decode(b"", final=True))

    def _show(self, text: str) -> str:
        if self._follows_unfinished and text:
            self._follows_unfinished = False
            return text.removeprefix(REPLACEMENT)
        return text
