from __future__ import annotations

from collections.abc import Callable

from fastserve.config import Config
from fastserve.scheduling.policies.policy import Policy
from fastserve.simulation.policies import CLAIRVOYANT, NAMES, policy_factory
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulation import Simulation
from fastserve.simulation.step_time import StepTimeModel
from fastserve.workload.arrival import Arrival
from fastserve.workload.lengths import LogNormalLengths
from fastserve.workload.synthetic import synthetic_arrivals
from fastserve.workload.transformations import draw_priorities, draw_tenants

POLICIES = NAMES
STEP_TIME = StepTimeModel(
    seconds_per_step=4e-3,
    seconds_per_sequence=1e-4,
    seconds_per_prompt_token=3e-4,
    seconds_per_decode_token=1.1e-3,
    seconds_per_context_token=1e-6,
    seconds_per_prompt_pair=1e-8,
    copy_bytes_per_second=1e9,
    kv_bytes_per_token=20_000,
    model="",
    machine="",
    num_threads=1,
    num_steps=1,
    r_squared=1.0,
    median_relative_error=0.0,
)


def mixed_arrivals(count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Prompts and answers of up to 256 tokens, three priorities, two tenants."""
    lengths = LogNormalLengths(60, 1.1, 1, 256)
    arrivals = synthetic_arrivals(count, rate, lengths, lengths, seed, cv=2.0)
    arrivals = draw_priorities(arrivals, {5: 0.1, 1: 0.3, 0: 0.6}, seed)
    return draw_tenants(arrivals, {"a": 1, "b": 2}, seed)


def factory(policy: str) -> Callable[[], Policy]:
    """Starved after 20 s: such short workloads have requests that are."""
    return policy_factory(policy, Config(starvation_seconds=20.0, alpha=2.0))


def simulation(
    policy: str, arrivals: list[Arrival], jumps: bool = True, **settings: int | float | str
) -> Simulation:
    """Of 8 slots a replica, unless told otherwise."""
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 4096, **settings}
    return Simulation(
        arrivals,
        factory(policy),
        SimulationSettings(STEP_TIME, **values),  # type: ignore[arg-type]
        is_clairvoyant=policy in CLAIRVOYANT,
        jumps=jumps,
    )
