"""Bad words: sequences of tokens that a request forbids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastserve.scheduling.sequence import Sequence


class BadWords:
    """A request's bad words, found by the token before their last: few words are looked at per token."""

    def __init__(self, words: Iterable[list[int]]) -> None:
        self._after: dict[int | None, list[list[int]]] = {}
        """By the last token but one; None: words of one token, which may never come."""
        for word in words:
            self._after.setdefault(word[-2] if len(word) > 1 else None, []).append(word)

    def banned(self, sequence: Sequence) -> list[int]:
        """Tokens that would complete one of the words; only what was generated counts."""
        if not self._after:
            return []
        return list(self._completions(sequence.token_ids, sequence.num_generated_tokens))

    def _completions(self, token_ids: list[int], num_generated: int) -> Iterator[int]:
        for word in self._after.get(None, ()):
            yield word[0]
        if num_generated == 0:
            return
        for word in self._after.get(token_ids[-1], ()):
            begun = len(word) - 1
            if begun <= num_generated and token_ids[-begun:] == word[:-1]:
                yield word[-1]
