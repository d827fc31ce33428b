"""Texts, and pairs of texts, to tokens within a model's length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.checkpoints.model_error import ModelError
from fastserve.encoders.ragged_batch import TokenSequence
from fastserve.errors import RequestError

Text = str | tuple[str, str]
"""A text, or a query and a document."""


class EncoderTokenizer:
    """A model's tokenizer, from its Hugging Face files. Threads may share it."""

    def __init__(self, directory: Path, do_lower_case: bool = False) -> None:
        """Raises ModelError where the directory holds no tokenizer.json, nor what one can be made of."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # malformed files break transformers and tokenizers in any way
            raise ModelError(f"no tokenizer could be read from {directory}: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer in {directory} is a {type(tokenizer).__name__}; "
                "allowed: one with a tokenizer.json"
            )
        self.model_max_length = int(tokenizer.model_max_length)
        """Tokens that the tokenizer's files allow; where they say nothing, a huge number."""
        self._has_token_types = "token_type_ids" in tokenizer.model_input_names
        self._do_lower_case = do_lower_case
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._truncating: dict[int, Any] = {}

    def encode(
        self, texts: Sequence[Text], max_length: int, truncate: bool, field: str
    ) -> list[TokenSequence]:
        """The tokens of each text, with those that the model wants around it.

        `truncate`: what is longer than `max_length` tokens is cut, of a pair the longer one first. Raises
        RequestError, else, naming `field`; and for a text without a token.
        """
        backend = self._truncating_to(max_length) if truncate else self._backend
        lowered = [_lower(text) for text in texts] if self._do_lower_case else list(texts)
        sequences = []
        for number, encoding in enumerate(backend.encode_batch(lowered)):
            if not 1 <= len(encoding.ids) <= max_length:
                raise _wrong_length(field, number, len(encoding.ids), max_length)
            types = encoding.type_ids if self._has_token_types else None
            sequences.append(TokenSequence(encoding.ids, types))
        return sequences

    def spans(self, text: str, max_length: int, truncate: bool) -> list[tuple[int, int] | None]:
        """Where each token of `encode([text], ...)` stands in the text; None: it is none of the text."""
        backend = self._truncating_to(max_length) if truncate else self._backend
        encoding = backend.encode(_lower(text) if self._do_lower_case else text)
        special = encoding.special_tokens_mask
        return [
            None if is_special else (start, end)
            for (start, end), is_special in zip(encoding.offsets, special, strict=True)
        ]

    def _truncating_to(self, max_length: int) -> Any:
        """A copy of the tokenizer that truncates: it is a setting of the whole, and calls are concurrent."""
        backend = self._truncating.get(max_length)
        if backend is None:
            backend = type(self._backend).from_str(self._backend.to_str())
            backend.enable_truncation(max_length, strategy="longest_first")
            self._truncating[max_length] = backend
        return backend


def _lower(text: Text) -> Text:
    return text.lower() if isinstance(text, str) else (text[0].lower(), text[1].lower())


def _wrong_length(field: str, number: int, num_tokens: int, max_length: int) -> RequestError:
    return RequestError(
        f"`{field}[{number}]`: got {num_tokens} tokens; allowed: 1 to {max_length}, or more with "
        "`truncate: true`, which leaves out what is beyond"
    )
