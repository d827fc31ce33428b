"""What came of a simulation: the times of every request, and totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.workload.arrival import Arrival


class Records:
    """Filled while the simulation runs; by the request's number in the workload."""

    def __init__(self, count: int) -> None:
        self.first_token = [0.0] * count
        self.completion = [0.0] * count
        self.num_preemptions = [0] * count
        self.queue: list[tuple[float, int, int]] = []
        """(time, requests that wait, that run), now and then"""


@dataclass(frozen=True)
class Totals:
    """Over all replicas."""

    num_computed_tokens: int
    num_recomputed_tokens: int
    num_cached_tokens: int
    """Of prompts, that the prefix cache had."""
    num_preemptions: int
    busy_seconds: float
    block_seconds: float
    """KV blocks in use, over time."""


class SimulationResult:
    """Arrays of the length of the workload, in its order; times in seconds."""

    def __init__(self, arrivals: Sequence[Arrival], records: Records, totals: Totals) -> None:
        self.arrival = np.array([each.time for each in arrivals])
        self.num_prompt_tokens = np.array([each.num_prompt_tokens for each in arrivals])
        self.num_output_tokens = np.array([each.num_output_tokens for each in arrivals])
        self.priority = np.array([each.priority for each in arrivals])
        self.tenant = np.array([each.tenant for each in arrivals])
        self.first_token = np.array(records.first_token) - self.arrival
        """From arrival."""
        self.completion = np.array(records.completion) - self.arrival
        """From arrival."""
        self.num_preemptions = np.array(records.num_preemptions)
        self.queue = np.array(records.queue, dtype=float).reshape(-1, 3)
        """[samples, 3]: see `Records.queue`"""
        self.totals = totals
        self.seconds = float(max(records.completion) - self.arrival[0])
        """From the first arrival to the last end."""

    @property
    def normalized_latency(self) -> np.ndarray:
        """Completion time per token of the answer."""
        return self.completion / self.num_output_tokens

    @property
    def tokens_per_second(self) -> float:
        """Of answers."""
        return float(self.num_output_tokens.sum() / self.seconds)

    @property
    def computed_over_needed(self) -> float:
        """Tokens computed, to those that were needed: with none computed twice it is 1."""
        recomputed = self.totals.num_recomputed_tokens
        return self.totals.num_computed_tokens / (self.totals.num_computed_tokens - recomputed)
