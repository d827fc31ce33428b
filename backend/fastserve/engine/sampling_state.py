"""What the sampling of one sequence remembers from token to token.

Each new token is booked once, in time that does not grow with the sequence. A preempted sequence keeps its
tokens, and so its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fastserve.engine.guides import GuideMatcher
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import Sequence


class TokenCounts:
    """The distinct tokens of a sequence, and how often each of them was generated."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self._ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._places = {token_id: place for place, token_id in enumerate(self._ids.tolist())}
        """Of each token in both arrays, which may be longer than this."""

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens of prompt and answer [n] int64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` was generated [n] int64; 0 for those that only the prompt has."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Books a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = _lengthened(self._ids)
            self._counts = _lengthened(self._counts)
        self._ids[place] = token_id
        self._counts[place] += 1


def _lengthened(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros(max(64, len(array)), dtype=array.dtype)])


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


class SamplingState:
    """Seed, endings, guide and counts of one sequence."""

    def __init__(
        self, sequence: Sequence, seed: int, stop_token_ids: list[int], matcher: GuideMatcher | None
    ) -> None:
        """`stop_token_ids`: those that end the sequence, its own and, unless ignored, the model's."""
        params = sequence.request.sampling
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.matcher = matcher
        self.bad_words = BadWords(sequence.request.bad_words_token_ids)
        has_penalty = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self.counts = TokenCounts(sequence.request.prompt_token_ids) if has_penalty else None

    def append(self, token_id: int) -> RequestError | None:
        """Books a token that was sampled; what is wrong if the guide does not take it."""
        if self.counts is not None:
            self.counts.add(token_id)
        return None if self.matcher is None else self.matcher.accept(token_id)
