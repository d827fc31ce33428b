"""vLLM's `priority` policy, to measure the others against: in the simulator alone."""

from __future__ import annotations

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView


class StrictPriority(Policy):
    """By priority, then by arrival; nobody is preempted for a slot, only for KV blocks."""

    def rank(self, view: RequestView, now: float) -> Rank:
        """(-priority, arrival)"""
        return (-view.priority, view.arrival)

    def preempts(self, rank: Rank, running: Rank) -> bool:
        """Never."""
        return False
