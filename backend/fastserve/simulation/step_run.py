"""Steps of a replica that follow one another and differ only by a token more of each sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastserve.scheduling.sequence import StepPlan


@dataclass(slots=True)
class StepRun:
    """`num_steps` steps like `plan`, the first of which takes `first_seconds` and each `growth` longer than
    the one before: its decodes read a token more each."""

    plan: StepPlan
    start: float
    first_seconds: float
    growth: float
    num_steps: int
    ignores_arrivals: bool
    """Nothing would come of it in its steps if somebody began to wait meanwhile."""
    is_quiet: bool
    """What the queue knows of the replica stays true, as far as it goes by it, until the run ends."""

    def end(self, num_steps: int) -> float:
        """When so many of them have ended."""
        return self.start + num_steps * self.first_seconds + self.growth * (num_steps * (num_steps - 1) / 2)

    def num_ended(self, now: float) -> int:
        """How many have ended by then, the last one included if it ends just then."""
        seconds = now - self.start
        if seconds <= 0.0:
            return 0
        # The positive root of growth / 2 * n^2 + (first_seconds - growth / 2) * n - seconds.
        slope = self.first_seconds - self.growth / 2
        root = 2 * seconds / (slope + math.sqrt(slope * slope + 2 * self.growth * seconds))
        number = min(int(root), self.num_steps)
        while number < self.num_steps and self.end(number + 1) <= now:
            number += 1
        while number and self.end(number) > now:
            number -= 1
        return number
