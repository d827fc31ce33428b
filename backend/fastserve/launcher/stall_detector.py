"""The startup probe: tells a server that starts slowly from one that is stuck."""

from __future__ import annotations

import time
from collections.abc import Callable

STALL_SECONDS = 60.0
"""Without progress, after which a server is given up."""
SAMPLE_SECONDS = 5.0
"""Between two samples: one goes through all processes of the machine."""
MIN_CPU = 0.01
"""Share of one core: idle threads that wake now and then take less, a program among fifty busy ones more."""
MIN_BYTES = 1 << 20
"""Read or logged, to count as progress."""


class StallDetector:
    """Whether the processes of a server that starts compute, read or log anything.

    Not the time that has passed: on a machine with busy neighbours a start takes many times as long.
    """

    def __init__(
        self,
        usage: Callable[[], tuple[float, int]],
        log_size: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`usage`: seconds of CPU and bytes read so far, of all processes together."""
        self._usage = usage
        self._log_size = log_size
        self._clock = clock
        self._mark_at = self._next_sample = clock()
        self._mark = (0.0, 0, 0)

    def stalled_seconds(self) -> float:
        """Seconds since the last sign of progress."""
        now = self._clock()
        if now >= self._next_sample:
            self._next_sample = now + SAMPLE_SECONDS
            self._sample(now)
        return now - self._mark_at

    def _sample(self, now: float) -> None:
        state = (*self._usage(), self._log_size())
        seconds, read, logged = (here - before for here, before in zip(state, self._mark, strict=True))
        # A process that has ended takes its sums with it: a smaller sum is a change as well.
        computes = abs(seconds) > MIN_CPU * (now - self._mark_at)
        if computes or abs(read) >= MIN_BYTES or logged != 0:
            self._mark, self._mark_at = state, now
