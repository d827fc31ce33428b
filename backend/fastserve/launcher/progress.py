"""Tells a server that starts slowly from one that does not start."""

from __future__ import annotations

import time
from collections.abc import Callable

STALL_SECONDS = 60.0
"""Without progress, after which a server is given up."""
LOOK_SECONDS = 5.0
"""Between two looks: one goes through all processes of the machine."""
LEAST_CPU = 0.01
"""Of one core: idle threads that wake now and then take less, a program among fifty busy ones takes more."""
LEAST_BYTES = 1 << 20
"""Read or logged between two marks."""


class Progress:
    """Whether the processes of a server that starts compute, read or log anything.

    Not the time that has passed: on a machine with busy neighbours a start takes many times as long.
    """

    def __init__(
        self,
        work: Callable[[], tuple[float, int]],
        log_size: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`work`: seconds of CPU and bytes read so far, of all processes together."""
        self._work = work
        self._log_size = log_size
        self._clock = clock
        self._mark_at = self._next_look = clock()
        self._mark = (0.0, 0, 0)

    def seconds_without(self) -> float:
        """Since the last sign of progress."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._look(now)
        return now - self._mark_at

    def _look(self, now: float) -> None:
        state = (*self._work(), self._log_size())
        seconds, read, logged = (here - before for here, before in zip(state, self._mark, strict=True))
        # A process that has ended takes its sums with it: a smaller sum is a change as well.
        computes = abs(seconds) > LEAST_CPU * (now - self._mark_at)
        if computes or abs(read) >= LEAST_BYTES or logged != 0:
            self._mark, self._mark_at = state, now
