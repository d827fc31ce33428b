"""The default: priority and age."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView


@dataclass(frozen=True)
class PriorityAge(Policy):
    """Score s_i = alpha * p_i + beta * w_i, of priority p_i and age w_i; the highest score runs first.

    Age is the time since arrival, also while the request runs. So with one `beta` for all the clock drops
    out: s_i - s_j = alpha * (p_i - p_j) - beta * (arrival_i - arrival_j), the order of two requests never
    changes, and none that was preempted can be traded back and forth.

    Overtaking bound: one that is d steps more urgent and came t seconds later overtakes only if
    alpha * d > beta * t, that is, if it came within alpha * d / beta seconds. `beta` is above 0.
    """

    alpha: float
    beta: float

    def rank(self, view: RequestView, now: float) -> Rank:
        """(beta * arrival - alpha * priority,): -s_i, less what the clock adds to all alike."""
        return (self.beta * view.arrival - self.alpha * view.priority,)
