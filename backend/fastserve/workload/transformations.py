"""Workloads made of others: at another rate, shorter, with priorities and tenants."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from msgspec.structs import replace

from fastserve.workload.arrival import Arrival

T = TypeVar("T")
PRIORITY_STREAM, TENANT_STREAM, HINT_STREAM = 1, 2, 3
"""Priorities, tenants and hints of one seed are drawn independently of one another."""


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Arrivals a second between the first and the last. Raises ValueError where no time is between them."""
    seconds = arrivals[-1].time - arrivals[0].time if arrivals else 0.0
    if seconds <= 0:
        raise ValueError(f"a workload of {len(arrivals)} arrivals at one moment has no rate")
    return (len(arrivals) - 1) / seconds


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """Time stretched so that `rate` arrive in a second, bursts as they were.

    A load factor is a rate: `at_rate(arrivals, load * capacity)`. Raises ValueError as `mean_rate` does.
    """
    return at_speed(arrivals, _positive("rate", rate) / mean_rate(arrivals))


def at_speed(arrivals: Sequence[Arrival], speed: float) -> list[Arrival]:
    """Time that passes `speed` times as fast. Raises ValueError for one that is not above 0."""
    _positive("speed", speed)
    return [replace(arrival, time=arrival.time / speed) for arrival in arrivals]


def scale_lengths(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """Prompts and answers `factor` times as long, at least one token each.

    Prompts with block hashes keep their blocks, each scaled to the nearest whole number of tokens, so that
    they share with others what they shared before. Raises ValueError for a factor that is not above 0.
    """
    _positive("factor", factor)

    def scaled(length: int) -> int:
        return max(1, round(length * factor))

    def shortened(arrival: Arrival) -> Arrival:
        block_size, num_prompt_tokens = 0, scaled(arrival.num_prompt_tokens)
        if arrival.block_hashes:
            block_size = scaled(arrival.block_size)
            num_full, rest = divmod(arrival.num_prompt_tokens, arrival.block_size)
            num_prompt_tokens = num_full * block_size + (min(scaled(rest), block_size) if rest else 0)
        return replace(
            arrival,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=scaled(arrival.num_output_tokens),
            block_size=block_size,
        )

    return list(map(shortened, arrivals))


def cut_lengths(
    arrivals: Sequence[Arrival], max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
) -> list[Arrival]:
    """Prompts cut to their first tokens, answers too. None: as long as they are.

    Raises ValueError for a limit below 1.
    """
    prompt_limit = _limit("max_prompt_tokens", max_prompt_tokens)
    output_limit = _limit("max_output_tokens", max_output_tokens)

    def cut(arrival: Arrival) -> Arrival:
        num_prompt_tokens = min(arrival.num_prompt_tokens, prompt_limit)
        num_blocks = -(-num_prompt_tokens // arrival.block_size) if arrival.block_size else 0
        return replace(
            arrival,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=min(arrival.num_output_tokens, output_limit),
            block_hashes=arrival.block_hashes[:num_blocks],
        )

    return list(map(cut, arrivals))


def draw_priorities(arrivals: Sequence[Arrival], shares: Mapping[int, float], seed: int) -> list[Arrival]:
    """Priorities drawn independently for each arrival, in proportion to their shares.

    Raises ValueError for shares that are negative, or none of which is above 0.
    """
    drawn = _draw(len(arrivals), shares, [seed, PRIORITY_STREAM])
    return [replace(arrival, priority=each) for arrival, each in zip(arrivals, drawn, strict=True)]


def draw_tenants(arrivals: Sequence[Arrival], shares: Mapping[str, float], seed: int) -> list[Arrival]:
    """Tenants drawn as `draw_priorities` draws."""
    drawn = _draw(len(arrivals), shares, [seed, TENANT_STREAM])
    return [replace(arrival, tenant=each) for arrival, each in zip(arrivals, drawn, strict=True)]


def draw_length_hints(arrivals: Sequence[Arrival], sigma: float, max_tokens: int, seed: int) -> list[int]:
    """Forecasts of the answers' lengths, from 1 to `max_tokens`: the true ones times log-normal factors of
    median 1, whose logarithm has the standard deviation `sigma`. Raises ValueError for one below 0."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma`: got {sigma}; allowed: 0 or more")
    factors = np.random.default_rng([seed, HINT_STREAM]).lognormal(0.0, sigma, len(arrivals))
    hints = [each.num_output_tokens * factor for each, factor in zip(arrivals, factors, strict=True)]
    return [min(max_tokens, max(1, round(hint))) for hint in hints]


def _draw(count: int, shares: Mapping[T, float], seed: list[int]) -> list[T]:
    weights = np.array(list(shares.values()), dtype=float)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(f"shares: got {dict(shares)}; allowed: 0 or more each, and not all 0")
    values = list(shares)
    drawn = np.random.default_rng(seed).choice(len(values), count, p=weights / weights.sum())
    return [values[index] for index in drawn.tolist()]


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}`: got {value}; allowed: above 0")
    return value


def _limit(name: str, value: int | None) -> int:
    if value is not None and value < 1:
        raise ValueError(f"`{name}`: got {value}; allowed: at least 1")
    return sys.maxsize if value is None else value
