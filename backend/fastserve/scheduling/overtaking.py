"""How many requests overtook another in the queue."""

from __future__ import annotations

from bisect import bisect_right, insort

MAX_REMEMBERED = 1 << 16
"""Releases: of a request that was overtaken by more, so many are told."""


class OvertakingCounter:
    """Remembers the arrivals of the requests that were released, those that came last."""

    def __init__(self) -> None:
        self._arrivals: list[float] = []
        """Ascending."""

    def release(self, arrival: float) -> int:
        """A request is released that came at `arrival`: how many came after it and were released before."""
        arrivals = self._arrivals
        place = bisect_right(arrivals, arrival)
        count = len(arrivals) - place
        insort(arrivals, arrival, place)
        if len(arrivals) > 2 * MAX_REMEMBERED:
            del arrivals[:MAX_REMEMBERED]
        return count
