"""Load 1.0: the arrival rate with which `fcfs` just keeps up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from msgspec.structs import replace as replace_fields

from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulation import Simulation
from fastserve.workload.arrival import Arrival

MAX_REQUESTS = 20_000
"""Of the workload, enough to measure it."""


class Capacity(NamedTuple):
    """What replicas do whose batches are always full."""

    requests_per_second: float
    mean_used_blocks: float
    """KV blocks of one replica in use, with a cache that holds all: what the batch would like to have."""


def measure_capacity(
    arrivals: Sequence[Arrival], settings: SimulationSettings, on_end: Callable[[int], None] = lambda _: None
) -> Capacity:
    """Serves the workload's first requests under `fcfs` as if all had come at once.

    The rate is that of completions until nobody waits any more, with a cache for which nobody has to wait.
    """
    backlog = [replace_fields(arrival, time=0.0) for arrival in arrivals[:MAX_REQUESTS]]
    longest = max(arrival.num_prompt_tokens + arrival.num_output_tokens for arrival in backlog)
    num_blocks = settings.max_num_seqs * (longest // settings.block_size + 3)
    ample = replace(settings, num_blocks=max(num_blocks, settings.num_blocks), num_host_blocks=0)
    result = Simulation(backlog, FCFS, ample, on_end=on_end).run()
    mean_used_blocks = result.totals.block_seconds / result.totals.busy_seconds
    time, waiting, _ = result.queue.T
    last = float(time[waiting > 0].max(initial=0.0))
    num_served = int((result.completion <= last).sum())
    if not num_served:  # all had a place at once
        last, num_served = result.seconds, len(backlog)
    return Capacity(num_served / last, mean_used_blocks)
