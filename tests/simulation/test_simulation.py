"""The event loop: many steps at once are as many single ones, and every request is served once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from tests.simulation.workloads import POLICIES, STEP_TIME, factory, mixed_arrivals, simulation

from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.simulation.result import SimulationResult
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulation import Simulation
from fastserve.simulation.step_time import prompt_pairs
from fastserve.workload.arrival import Arrival

SETTINGS: dict[str, dict[str, Any]] = {
    "one replica": {},
    "few blocks": {"num_blocks": 40},
    "few blocks, host memory": {"num_blocks": 40, "num_host_blocks": 60},
    "three replicas": {"num_replicas": 3, "max_num_seqs": 3, "num_blocks": 36},
    "slow messages": {"message_delay": 0.05, "num_blocks": 60},
    "three, slow messages": {"num_replicas": 3, "max_num_seqs": 3, "message_delay": 0.02},
    "no prefix caching": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_many_steps_at_once_are_as_many_single_ones(policy: str, settings: dict[str, Any]) -> None:
    arrivals = mixed_arrivals(150, rate=9.0)
    jumping = simulation(policy, arrivals, **settings).run()
    single = simulation(policy, arrivals, jumps=False, **settings).run()
    np.testing.assert_allclose(jumping.completion, single.completion, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(jumping.first_token, single.first_token, rtol=1e-9, atol=1e-9)
    assert jumping.num_preemptions.tolist() == single.num_preemptions.tolist()
    assert jumping.totals.num_recomputed_tokens == single.totals.num_recomputed_tokens
    assert jumping.totals.busy_seconds == pytest.approx(single.totals.busy_seconds)


@pytest.mark.parametrize("policy", POLICIES)
def test_many_steps_at_once_are_far_fewer_events(policy: str) -> None:
    arrivals = mixed_arrivals(150, rate=4.0)
    jumping, single = simulation(policy, arrivals), simulation(policy, arrivals, jumps=False)
    assert jumping.run().seconds == pytest.approx(single.run().seconds)
    assert jumping.num_events < single.num_events / 4


@pytest.mark.parametrize("policy", POLICIES)
def test_the_books_balance_at_the_end(policy: str) -> None:
    simulated = simulation(policy, mixed_arrivals(200, rate=12.0), num_blocks=48, num_host_blocks=30)
    result = simulated.run()
    assert (result.first_token > 0).all()
    assert (result.completion >= result.first_token).all()
    [replica] = simulated.replicas
    replica.scheduler.check()
    assert not replica.scheduler.has_sequences
    assert replica.scheduler.pool.num_used == 0
    needed = result.num_prompt_tokens.sum() + result.num_output_tokens.sum() - len(result.arrival)
    totals = result.totals
    assert totals.num_computed_tokens + totals.num_cached_tokens == needed + totals.num_recomputed_tokens


def alone(num_prompt_tokens: int, num_output_tokens: int, **settings: float) -> SimulationResult:
    arrival = Arrival(5.0, num_prompt_tokens, num_output_tokens)
    values = {"max_num_batched_tokens": 64, **settings}
    return Simulation([arrival], FCFS, SimulationSettings(STEP_TIME, **values)).run()  # type: ignore[arg-type]


def test_a_request_alone_takes_the_time_of_its_steps() -> None:
    result = alone(100, 3)
    chunks = [(0, 64), (64, 36)]
    first_token = sum(
        STEP_TIME.seconds(1, chunk, 0, 0, prompt_pairs(start, chunk)) for start, chunk in chunks
    )
    decodes = sum(STEP_TIME.seconds(1, 0, 1, length, 0) for length in (101, 102))
    assert result.first_token == pytest.approx([first_token])
    assert result.completion == pytest.approx([first_token + decodes])
    assert result.totals.busy_seconds == pytest.approx(first_token + decodes)


def test_a_release_takes_the_delay_of_its_message() -> None:
    assert alone(10, 1, message_delay=0.25).first_token == pytest.approx(alone(10, 1).first_token + 0.25)


def test_a_request_that_no_cache_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="a request of 110 tokens; the KV cache of a replica holds 96"):
        alone(100, 10, num_blocks=6)


def test_a_workload_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="a workload without requests"):
        Simulation([], factory("fcfs"), SimulationSettings(STEP_TIME))


def test_blocks_that_come_back_from_host_memory_take_the_time_of_the_copy() -> None:
    """The preempted one finds its blocks in host memory, and its next step copies them first."""
    arrivals = [Arrival(0.0, 64, 60), Arrival(0.3, 64, 8, priority=100)]

    def run(copy_bytes_per_second: float) -> SimulationResult:
        model = replace(STEP_TIME, copy_bytes_per_second=copy_bytes_per_second)
        settings = SimulationSettings(model, max_num_seqs=1, num_blocks=8, num_host_blocks=16)
        return Simulation(arrivals, factory("priority_age"), settings).run()

    slow, fast = run(1.2e8), run(1e12)  # 2.7 ms a block
    assert slow.num_preemptions.tolist() == [1, 0]
    assert slow.totals.num_recomputed_tokens == 0
    num_copies = round((slow.completion[0] - fast.completion[0]) / (16 * 20_000 / 1.2e8))
    assert 4 <= num_copies <= 16, "five blocks, or six, each out and in"
    too_slow = run(1e6)
    assert too_slow.totals.num_recomputed_tokens > 0, "computing a block again takes 6 ms, copying it 640"
    assert too_slow.completion[0] < slow.completion[0] + 0.1
