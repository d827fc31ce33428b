"""Penalties for repetition, over token counts that are kept from token to token."""

from __future__ import annotations

import numpy as np
import torch

from fastserve.types import SamplingParams


class TokenCounts:
    """The distinct tokens of a sequence, and how often each of them was generated."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self._ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._index_of = {token_id: index for index, token_id in enumerate(self._ids.tolist())}
        """By token, its index in both arrays, which may be longer than this."""

    @property
    def ids(self) -> np.ndarray:
        """Distinct tokens of prompt and answer [n] int64."""
        return self._ids[: len(self._index_of)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` was generated [n] int64; 0 for those that only the prompt has."""
        return self._counts[: len(self._index_of)]

    def add(self, token_id: int) -> None:
        """Counts a generated token."""
        index = self._index_of.setdefault(token_id, len(self._index_of))
        if index == len(self._ids):
            self._ids = _lengthened(self._ids)
            self._counts = _lengthened(self._counts)
        self._ids[index] = token_id
        self._counts[index] += 1


def _lengthened(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros(max(64, len(array)), dtype=array.dtype)])


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request asks for any: only then its tokens are counted."""
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def apply_penalties(logits: torch.Tensor, tokens: TokenCounts, params: SamplingParams) -> None:
    """To one row of logits [vocab], in place: the repetition penalty (Keskar et al., arXiv 1909.05858) for
    tokens of prompt and answer, the others for those of the answer."""
    ids = torch.from_numpy(tokens.ids).to(logits.device)
    values = logits[ids]
    if params.repetition_penalty != 1.0:
        values = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = tokens.counts
        penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        values -= torch.from_numpy(penalty).to(values)
    logits[ids] = values
