"""Prompt lookup: what followed a sequence's last tokens where they stood before, in its prompt or its answer.

A draft that costs no model (Saxena, "Prompt Lookup Decoding", 2023; vLLM's method `ngram`): a summary, a
quotation, an edit of code or a template repeats what was read.
"""

from __future__ import annotations

MAX_NGRAM, MIN_NGRAM = 4, 2
"""Tokens that must be met again. Of longer matches more is right; a single token is met everywhere."""


class NgramProposer:
    """Proposes the next tokens of one sequence.

    Each token is indexed once, in a microsecond, and a proposal takes another, however long the sequence is.
    The index takes some 400 bytes a token, which is little beside the token's keys and values.
    """

    def __init__(self, token_ids: list[int]) -> None:
        """`token_ids`: of prompt and answer; the list itself, to which new ones are appended."""
        self._token_ids = token_ids
        self._num_indexed = 0
        self._followers: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(MAX_NGRAM, MIN_NGRAM - 1, -1)
        }
        """By length, then n-gram: the position of the token that followed it last."""

    def propose(self, count: int) -> list[int]:
        """`count` tokens that may come next, or none: those behind the longest match, the latest of these.

        Where these are fewer they are repeated, as the text would go on if it were periodic.
        """
        self._index()
        token_ids = self._token_ids
        for n, followers in self._followers.items():
            start = followers.get(tuple(token_ids[-n:]))
            if start is not None:
                period = len(token_ids) - start
                return [token_ids[start + i % period] for i in range(count)]
        return []

    def _index(self) -> None:
        """Takes in the tokens that are new."""
        token_ids = self._token_ids
        for position in range(self._num_indexed, len(token_ids)):
            for n, followers in self._followers.items():
                if n <= position:
                    followers[tuple(token_ids[position - n : position])] = position
        self._num_indexed = len(token_ids)
