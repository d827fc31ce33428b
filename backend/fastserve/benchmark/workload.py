"""The requests of a benchmark: as long as chat traffic, and the same for every target."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SIGMA = 0.7
"""Standard deviation of the logarithm of a length."""
TOKEN_IDS = range(100, 10_000)
"""Ordinary tokens in the vocabulary of any model served here."""


@dataclass(frozen=True)
class Job:
    """One request: a prompt, and how many tokens to generate whatever they are."""

    prompt_token_ids: list[int]
    max_tokens: int


def chat_jobs(count: int, seed: int) -> list[Job]:
    """Log-normal lengths: prompts of mean 160 in 16..512, answers of mean 120 in 8..256; no shared prefix."""
    numbers = random.Random(seed)
    return [
        Job(_prompt(numbers, _length(numbers, 160, 16, 512)), _length(numbers, 120, 8, 256))
        for _ in range(count)
    ]


def equal_jobs(count: int, prompt_tokens: int, max_tokens: int, seed: int) -> list[Job]:
    """Jobs of one size."""
    numbers = random.Random(seed)
    return [Job(_prompt(numbers, prompt_tokens), max_tokens) for _ in range(count)]


def _prompt(numbers: random.Random, length: int) -> list[int]:
    return numbers.choices(TOKEN_IDS, k=length)


def _length(numbers: random.Random, mean: int, low: int, high: int) -> int:
    drawn = numbers.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
    return min(high, max(low, round(drawn)))
