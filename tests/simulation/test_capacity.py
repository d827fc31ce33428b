"""Load 1.0."""

from __future__ import annotations

import pytest
from tests.simulation.workloads import STEP_TIME, mixed_arrivals, simulation

from fastserve.simulation.capacity import measure_capacity
from fastserve.simulation.settings import SimulationSettings
from fastserve.workload.arrival import Arrival
from fastserve.workload.transformations import at_rate

SETTINGS = SimulationSettings(STEP_TIME, max_num_seqs=8, max_num_batched_tokens=64)


def test_of_equal_requests_it_is_what_a_full_batch_does() -> None:
    arrivals = [Arrival(float(number), 16, 100) for number in range(2000)]
    capacity = measure_capacity(arrivals, SETTINGS)
    step = STEP_TIME.seconds(8, 0, 8, 8 * 66, 0)
    prompt = 16 * STEP_TIME.seconds_per_prompt_token
    assert capacity.requests_per_second == pytest.approx(8 / (100 * step + 8 * prompt), rel=0.03)
    assert capacity.mean_used_blocks == pytest.approx(8 * (66 / 16 + 0.5), rel=0.03), (
        "half of the last one is empty"
    )


def test_below_it_fcfs_keeps_up_and_above_it_does_not() -> None:
    arrivals = mixed_arrivals(2000, rate=1.0)
    rate = measure_capacity(arrivals, SETTINGS).requests_per_second
    waits = [
        simulation("fcfs", at_rate(arrivals, load * rate)).run().first_token[-500:].mean()
        for load in (0.8, 1.2)
    ]
    assert waits[0] < 2.0
    assert waits[1] > 15.0


def test_replicas_serve_as_much_each() -> None:
    arrivals = mixed_arrivals(2000, rate=1.0)
    one = measure_capacity(arrivals, SETTINGS)
    four = measure_capacity(
        arrivals, SimulationSettings(STEP_TIME, num_replicas=4, max_num_seqs=8, max_num_batched_tokens=64)
    )
    assert four.requests_per_second == pytest.approx(4 * one.requests_per_second, rel=0.05)
    assert four.mean_used_blocks == pytest.approx(one.mean_used_blocks, rel=0.1)
