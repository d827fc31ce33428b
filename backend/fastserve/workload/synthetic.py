"""Workloads from distributions."""

from __future__ import annotations

import math

import numpy as np

from fastserve.workload.arrival import Arrival
from fastserve.workload.lengths import LogNormalLengths


def synthetic_arrivals(
    count: int,
    rate: float,
    prompts: LogNormalLengths,
    outputs: LogNormalLengths,
    seed: int,
    cv: float = 1.0,
) -> list[Arrival]:
    """`count` arrivals at `rate` a second, with gaps of a gamma distribution.

    `cv` is the gaps' coefficient of variation, standard deviation over mean: 1 is a Poisson process, more is
    bursty, 0 is a clock. Raises ValueError for a rate or cv that cannot be.
    """
    random = np.random.default_rng(seed)
    times = np.cumsum(_gaps(count, rate, cv, random))
    num_prompt_tokens, num_output_tokens = prompts.draw(count, random), outputs.draw(count, random)
    return list(map(Arrival, times.tolist(), num_prompt_tokens.tolist(), num_output_tokens.tolist()))


def _gaps(count: int, rate: float, cv: float, random: np.random.Generator) -> np.ndarray:
    if not 0 < rate < math.inf:
        raise ValueError(f"`rate`: got {rate}; allowed: above 0")
    if not 0 <= cv < math.inf:
        raise ValueError(f"`cv`: got {cv}; allowed: 0 or more")
    if cv == 0:
        return np.full(count, 1 / rate)
    return random.gamma(shape=cv**-2, scale=cv**2 / rate, size=count)
