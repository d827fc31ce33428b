"""What a request's parameters do to its logits, beyond temperature and truncation."""

from __future__ import annotations

import torch

from fastserve.engine.bad_words import BadWords
from fastserve.engine.guides import GuideMatcher
from fastserve.engine.penalties import TokenCounts, apply_penalties, has_penalties
from fastserve.errors import RequestError
from fastserve.scheduling.sequence import Sequence


class LogitsProcessor:
    """A sequence's guide, `min_tokens`, `logit_bias`, bad words and penalties.

    Each new token is taken in once, in time that does not grow with the sequence.
    """

    def __init__(self, sequence: Sequence, stop_token_ids: list[int], matcher: GuideMatcher | None) -> None:
        """`stop_token_ids`: those that end the sequence (see `stop_conditions`)."""
        self._sequence = sequence
        self._params = params = sequence.request.sampling
        self._stop_token_ids = stop_token_ids
        self._matcher = matcher
        self._bad_words = BadWords(sequence.request.bad_words_token_ids)
        self._counts = TokenCounts(sequence.request.prompt_token_ids) if has_penalties(params) else None

    @property
    def is_needed(self) -> bool:
        """Whether the request asks for any of it: if not, its logits are taken as they are."""
        params, bad_words = self._params, self._sequence.request.bad_words_token_ids
        follows_tokens = self._matcher is not None or self._counts is not None
        return bool(follows_tokens or params.min_tokens or params.logit_bias or bad_words)

    def process(self, logits: torch.Tensor) -> RequestError | None:
        """Changes one row [vocab] in place; returns what is wrong if the guide has no token for it."""
        if self._matcher is not None and (error := self._matcher.mask(logits)) is not None:
            return error
        if self._must_not_stop:
            logits[self._stop_token_ids] = -torch.inf
        if bias := self._params.logit_bias:
            ids = torch.tensor(list(bias), device=logits.device)
            logits[ids] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
        if banned := self._bad_words.banned(self._sequence):
            logits[banned] = -torch.inf
        if self._counts is not None:
            apply_penalties(logits, self._counts, self._params)
        return None

    def append(self, token_id: int) -> RequestError | None:
        """Takes a token that was sampled; returns what is wrong if the guide does not take it."""
        if self._counts is not None:
            self._counts.add(token_id)
        return None if self._matcher is None else self._matcher.accept(token_id)

    @property
    def is_guide_complete(self) -> bool:
        """Whether the guide lets nothing follow but the end."""
        return self._matcher is not None and self._matcher.is_complete

    def no_token_left(self) -> RequestError | None:
        """The error for a row of which no token may follow; None if no parameter forbids any now."""
        restrictions = ["`structured_outputs`"] if self._matcher is not None else []
        if self._must_not_stop and self._stop_token_ids:
            restrictions.append("`min_tokens`")
        if self._bad_words.banned(self._sequence):
            restrictions.append("`bad_words`")
        if not restrictions:
            return None
        return RequestError(
            f"{' and '.join(restrictions)}: after {self._sequence.num_generated_tokens} tokens no token of "
            "the model is left that may follow"
        )

    @property
    def _must_not_stop(self) -> bool:
        """Whether the next token is one of the first `min_tokens`: stop tokens are masked then."""
        return self._sequence.num_generated_tokens < self._params.min_tokens
