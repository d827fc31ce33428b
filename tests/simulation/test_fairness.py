"""Tenants that always have requests waiting are served as their weights say, whatever they ask for."""

from __future__ import annotations

import numpy as np
import pytest
from tests.simulation.workloads import STEP_TIME

from fastserve.scheduling.policies.fair import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, Fair
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulation import Simulation
from fastserve.workload.arrival import Arrival


def backlog(count: int) -> list[Arrival]:
    """All at once: tenant a asks for short answers to long prompts, b for long answers to short ones."""
    random = np.random.default_rng(0)
    short, long = random.integers(1, 60, count).tolist(), random.integers(60, 300, count).tolist()
    a = [Arrival(0.0, *lengths, tenant="a") for lengths in zip(long, short, strict=True)]
    b = [Arrival(0.0, *lengths, tenant="b") for lengths in zip(short, long, strict=True)]
    return [each for pair in zip(a, b, strict=True) for each in pair]


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 2.0}])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_two_backlogged_tenants_get_their_shares(weights: dict[str, float], num_replicas: int) -> None:
    arrivals = backlog(1000)
    settings = SimulationSettings(STEP_TIME, num_replicas=num_replicas, max_num_seqs=8)
    result = Simulation(arrivals, lambda: Fair(weights), settings).run()
    cost = PROMPT_TOKEN_COST * result.num_prompt_tokens + OUTPUT_TOKEN_COST * result.num_output_tokens
    both_wait = min(np.quantile(result.completion[result.tenant == tenant], 0.9) for tenant in weights)
    # From one moment to another: of those that run at either, as much is unfinished.
    served = {}
    for tenant, weight in weights.items():
        times = result.completion[result.tenant == tenant]
        is_between = (times > both_wait / 4) & (times <= both_wait)
        served[tenant] = cost[result.tenant == tenant][is_between].sum() / weight
    assert served["a"] == pytest.approx(served["b"], rel=0.05)
    assert served["a"] > 20_000, "much more than a batch holds"
