"""Sequences without tokens."""

from __future__ import annotations

from tests.simulation.workloads import STEP_TIME

from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulated_sequence import prompt_block_names
from fastserve.simulation.simulation import Simulation
from fastserve.workload.arrival import Arrival


def arrival(hashes: tuple[int, ...], num_prompt_tokens: int = 64, time: float = 0.0) -> Arrival:
    return Arrival(time, num_prompt_tokens, 4, block_hashes=hashes, block_size=32)


def num_shared(one: Arrival, other: Arrival, block_size: int = 16) -> int:
    names, others = prompt_block_names(one, block_size), prompt_block_names(other, block_size)
    return next((n for n, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), len(names))


def test_blocks_are_shared_as_far_as_the_hashes_say() -> None:
    assert num_shared(arrival((1, 2)), arrival((1, 2))) == 4
    assert num_shared(arrival((1, 2)), arrival((1, 3))) == 2
    assert num_shared(arrival((1, 2)), arrival((3, 2))) == 0, "what comes before a block counts"
    assert num_shared(arrival((1, 2)), arrival((1, 3)), block_size=24) == 1, "half of the second one differs"
    assert prompt_block_names(Arrival(0.0, 64, 4), 16) == []


def test_only_full_blocks_have_names() -> None:
    assert len(prompt_block_names(arrival((1, 2), num_prompt_tokens=63), 16)) == 3


def test_a_prefix_is_found_in_the_cache() -> None:
    arrivals = [arrival((1, 2)), arrival((1, 2), time=1.0), arrival((1, 3), time=2.0), Arrival(3.0, 64, 4)]
    result = Simulation(arrivals, FCFS, SimulationSettings(STEP_TIME)).run()
    assert result.totals.num_cached_tokens == 48 + 32, "the last token of a prompt is always computed"
