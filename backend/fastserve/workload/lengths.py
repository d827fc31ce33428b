"""Lengths of prompts and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LogNormalLengths:
    """Log-normal numbers of tokens, rounded and clipped to low..high.

    `mean` is the arithmetic mean before clipping, which lowers it where `high` cuts off much of the tail:
    of a mean of 225 with sigma 1.2, clipped to 1..1024, 200 are left. `sigma` is the standard deviation of
    the logarithm; with 0 all are equal. The logarithm's mean is ln(mean) - sigma^2 / 2.
    """

    mean: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        """Raises ValueError for a distribution that cannot be."""
        if not 0 < self.mean < math.inf:
            raise ValueError(f"`mean`: got {self.mean}; allowed: above 0")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"`sigma`: got {self.sigma}; allowed: 0 or more")
        if not 1 <= self.low <= self.high:
            raise ValueError(f"`low`, `high`: got {self.low}, {self.high}; allowed: 1 <= low <= high")

    @classmethod
    def equal(cls, length: int) -> LogNormalLengths:
        """All of one length. Raises ValueError for one below 1."""
        return cls(length, 0.0, length, length)

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """[count] int64."""
        drawn = random.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


CHAT_PROMPTS = LogNormalLengths(mean=160, sigma=0.7, low=16, high=512)
CHAT_OUTPUTS = LogNormalLengths(mean=120, sigma=0.7, low=8, high=256)
