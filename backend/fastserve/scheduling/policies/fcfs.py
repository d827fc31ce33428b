"""First come, first served."""

from __future__ import annotations

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView


class FCFS(Policy):
    """Goes by arrival alone. Nobody is ever overtaken, and one long request delays all behind it."""

    def rank(self, view: RequestView, now: float) -> Rank:
        """(arrival,)"""
        return (view.arrival,)
