"""Which token ids a request may hold: those that both the tokenizer and the model know."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastserve.errors import RequestError


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of a tokenizer's vocabulary and of its model's.

    A model's is often padded with ids that mean nothing. A tokenizer that got tokens for which its model was
    not resized is an accident: such a token has no row in the embedding.
    """

    tokenizer_size: int
    model_size: int

    @property
    def size(self) -> int:
        """Every id of a request is below it."""
        return min(self.tokenizer_size, self.model_size)

    @property
    def mismatch(self) -> str:
        """A clause for errors and logs where the tokenizer is the larger one; empty where it is not."""
        if self.tokenizer_size <= self.model_size:
            return ""
        return f"the tokenizer has {self.tokenizer_size} tokens, more than the model's {self.model_size}"

    @property
    def allowed(self) -> str:
        """The ids in words, for errors."""
        because = f", as {self.mismatch}" if self.mismatch else ""
        return f"token ids from 0 to {self.size - 1}{because}"

    def check(self, field: str, token_ids: Collection[int]) -> None:
        """Raises RequestError, naming `field`, if one of the ids is not allowed."""
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self.size:
                raise RequestError(f"`{field}`: got the token {token_id}; allowed: {self.allowed}")
