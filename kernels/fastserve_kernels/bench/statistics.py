"""Times of contestants that were run in turn, and what is made of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, one for each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the 10th and the 90th percentile, relative to the median."""
        ordered = sorted(self.seconds)
        last = len(ordered) - 1
        return (ordered[math.ceil(0.9 * last)] - ordered[math.floor(0.1 * last)]) / 2 / self.median

    def times_faster_than(self, other: Samples) -> float:
        """The median of the ratios within each repetition: what slows the machine for a while slows both."""
        return statistics.median(
            theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def geometric_mean(values: Iterable[float]) -> float:
    """Raises ValueError if there are no values."""
    return math.exp(statistics.fmean(math.log(value) for value in _some(values)))


def _some(values: Iterable[float]) -> Sequence[float]:
    listed = list(values)
    if not listed:
        raise ValueError("geometric mean: of no values")
    return listed
