"""Highest response ratio next."""

from __future__ import annotations

import math
from collections.abc import Hashable

from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.types import RequestView

BUCKETS_PER_DOUBLING = 16
"""Lengths within 4.4 % of each other count as one: their order then never changes, and few are compared."""


class HRRN(Policy):
    """The highest (w + s) / s runs first: w seconds waited, s the service that is expected to be needed.

    s is counted in tokens, of the prompt and of the answer as `max_tokens` or the client's hint has it. Short
    requests go first, and the ratio of every one that waits grows without bound, so none starves. Nothing is
    preempted. (Brinch Hansen, 1971.)
    """

    def rank(self, view: RequestView, now: float) -> Rank:
        """(-w / s,), with s rounded to its bucket."""
        size = 2.0 ** (self._bucket(view) / BUCKETS_PER_DOUBLING)
        return ((view.arrival - now) / size,)

    def preempts(self, rank: Rank, running: Rank) -> bool:
        """Never: ratios cross all the time."""
        return False

    def group(self, view: RequestView) -> Hashable:
        """The bucket of its length."""
        return self._bucket(view)

    def order(self, view: RequestView, now: float) -> Rank:
        """(arrival,): of equal lengths the one that has waited longest."""
        return (view.arrival,)

    @staticmethod
    def _bucket(view: RequestView) -> int:
        return round(math.log2(view.num_prompt_tokens + view.expected_output_tokens) * BUCKETS_PER_DOUBLING)
