"""Who runs first. A policy is one short class that gives each request a key, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Policy(Protocol):
    """Orders requests."""

    def key(self, priority: int, arrival: float) -> float:
        """The request with the highest key runs first; it is finite for every priority.

        `priority`: higher is more urgent; `arrival`: monotonic seconds. The key does not change with time,
        so a heap that is ordered by it never needs to be sorted again.
        """


@dataclass(frozen=True)
class PriorityAge:
    """Score s_i = alpha * p_i + beta * w_i, of priority p_i and of w_i = now - arrival_i seconds waited.

    With one `beta` for all, s_i - s_j = alpha * (p_i - p_j) - beta * (arrival_i - arrival_j): the clock drops
    out, and alpha * p_i - beta * arrival_i orders requests exactly as s_i does, at any moment.

    Overtaking bound: a request is overtaken by one that came t seconds later and is d steps more urgent only
    if alpha * d > beta * t, that is, only by those that came within alpha * d / beta seconds of it. So no
    request starves. `beta` is above 0.
    """

    alpha: float
    beta: float

    def key(self, priority: int, arrival: float) -> float:
        """alpha * priority - beta * arrival."""
        return self.alpha * priority - self.beta * arrival


@dataclass(frozen=True)
class FCFS:
    """First come, first served."""

    def key(self, priority: int, arrival: float) -> float:
        """The earlier the arrival, the higher."""
        return -arrival
