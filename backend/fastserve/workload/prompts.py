"""Token ids for prompts of which only the length is known, and what they share with others."""

from __future__ import annotations

import numpy as np

from fastserve.workload.arrival import Arrival

TOKEN_IDS = range(100, 10_000)
"""Ordinary tokens in the vocabulary of any model served here."""
BLOCK_STREAM, PROMPT_STREAM = 0, 1
"""A block's tokens never come from the number of a prompt."""


def prompt_token_ids(arrival: Arrival, number: int, seed: int) -> list[int]:
    """The prompt of the workload's arrival `number`: the same for the same seed.

    Blocks of equal hashes have equal tokens in all prompts of a seed. Where there are no hashes, prompts
    share nothing.
    """
    if not arrival.block_hashes:
        return _tokens([seed, PROMPT_STREAM, number], arrival.num_prompt_tokens)
    left, token_ids = arrival.num_prompt_tokens, []
    for block_hash in arrival.block_hashes:
        token_ids += _tokens([seed, BLOCK_STREAM, block_hash], min(left, arrival.block_size))
        left -= arrival.block_size
    return token_ids


def _tokens(source: list[int], count: int) -> list[int]:
    """The first `count` tokens of a source; fewer of them are the beginning of more."""
    words = np.random.PCG64(source).random_raw(count)
    return (words % len(TOKEN_IDS) + TOKEN_IDS.start).tolist()
