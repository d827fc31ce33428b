"""What is simulated, but for the workload and the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastserve.simulation.step_time import StepTimeModel

Routing = Literal["prefix", "round_robin"]
ROUTINGS: tuple[str, ...] = get_args(Routing)


@dataclass(frozen=True)
class SimulationSettings:
    """The replicas, which are all alike, and the way between them and the common queue."""

    step_time: StepTimeModel
    num_replicas: int = 1
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    target_itl_seconds: float = 0.0
    """See `TokenBudget`; 0: no target."""
    block_size: int = 16
    """Tokens in a KV block."""
    num_blocks: int = 1 << 14
    """KV blocks of one replica."""
    num_host_blocks: int = 0
    """KV blocks that each replica's host memory holds besides."""
    enable_prefix_caching: bool = True
    message_delay: float = 0.0
    """Seconds that a message between the queue and a replica takes. Even with 0, what is released when a step
    ends comes too late for the next one, as in the server."""
    routing: Routing = "prefix"

    @property
    def block_copy_seconds(self) -> float:
        """Of one KV block to host memory or back."""
        return self.block_size * self.step_time.kv_bytes_per_token / self.step_time.copy_bytes_per_second
