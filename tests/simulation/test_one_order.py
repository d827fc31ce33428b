"""No request is admitted while one of higher rank waits anywhere, but for messages under way."""

from __future__ import annotations

from typing import Any

import pytest
from tests.simulation.workloads import POLICIES, mixed_arrivals, simulation

from fastserve.scheduling.policies.policy import Rank
from fastserve.scheduling.sequence import Sequence
from fastserve.simulation.simulated_replica import SimulatedReplica
from fastserve.simulation.simulation import Simulation


class OrderWatch:
    """Looks on while a simulation releases from its queue and admits to its batches."""

    def __init__(self, simulation: Simulation) -> None:
        self.num_admissions = 0
        self.violations: list[str] = []
        self._queue: Any = simulation._queue
        self._pop = self._queue._waiting.pop
        self._queue._waiting.pop = self._on_release  # type: ignore[method-assign]
        for replica in simulation.replicas:
            self._watch_batch(replica)

    def _on_release(self, now: float) -> Any:
        """All that wait in the queue at the moment of a release, by brute force."""
        policy, waiting = self._queue._policy, list(self._queue._waiting)
        first = min((policy.rank(each.view, now), each.view.arrival, each.view.index) for each in waiting)
        view = self._queue._waiting.peek(now).view
        if (policy.rank(view, now), view.arrival, view.index) > first:
            self.violations.append(f"at {now} the queue released {view.uid} out of turn")
        self.num_admissions += 1
        return self._pop(now)

    def _watch_batch(self, replica: SimulatedReplica) -> None:
        """What a batch admits ranks before all that wait with it, and before all that make way for it."""
        scheduler: Any = replica.scheduler
        take_blocks = scheduler._take_blocks

        def watched(sequence: Sequence, now: float) -> list[Sequence] | None:
            order = self._order(sequence, scheduler.policy.rank(sequence.view, now))
            waiting = list(scheduler._waiting)
            first = min(self._order(each, scheduler.policy.rank(each.view, now)) for each in waiting)
            preempted: list[Sequence] | None = take_blocks(sequence, now)
            if preempted is not None:
                behind = [self._order(each, each.rank) for each in preempted]
                if order > first or any(each < order for each in behind):
                    self.violations.append(f"at {now} a batch took {sequence.request.uid} out of turn")
            return preempted

        scheduler._take_blocks = watched

    @staticmethod
    def _order(sequence: Sequence, rank: Rank) -> tuple[Rank, float]:
        return rank, sequence.view.arrival


@pytest.mark.parametrize("num_blocks", [4096, 60])
@pytest.mark.parametrize("num_replicas", [1, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_order(policy: str, num_replicas: int, num_blocks: int) -> None:
    arrivals = mixed_arrivals(300, rate=14.0)
    slots = 8 if num_replicas == 1 else 2
    watched = simulation(
        policy, arrivals, num_replicas=num_replicas, max_num_seqs=slots, num_blocks=num_blocks
    )
    watch = OrderWatch(watched)
    watched.run()
    assert watch.num_admissions >= len(arrivals)
    assert watch.violations == []
