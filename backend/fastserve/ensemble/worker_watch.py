"""Notices a worker that neither answers nor computes: it was stopped, or waits for something for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

STALL_SECONDS = 60.0
"""Without progress, after which it is said."""
LEAST_CPU = 0.01
"""Of one core: idle threads that wake now and then take less, a step among busy neighbours takes more."""


class WorkerWatch:
    """Says so and does nothing else: a worker that goes on has lost nothing."""

    def __init__(
        self, on_health: Callable[[str | None], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`on_health` is told what is wrong, as a sentence, and None when that has passed."""
        self._on_health = on_health
        self._clock = clock
        self._mark = (0, 0.0)
        self._mark_at = clock()
        self._is_stalled = False

    def look(self, has_requests: bool, num_messages: int, cpu_seconds: float) -> None:
        """`num_messages`: from all workers so far. `cpu_seconds`: of the worker that there is now."""
        now = self._clock()
        messages, seconds = self._mark
        # Another worker has another sum of seconds: a smaller one is a change as well.
        computes = abs(cpu_seconds - seconds) > LEAST_CPU * (now - self._mark_at)
        if computes or not has_requests or num_messages != messages:
            self._mark, self._mark_at = (num_messages, cpu_seconds), now
            if self._is_stalled:
                self._is_stalled = False
                self._on_health(None)
        elif not self._is_stalled and now - self._mark_at >= STALL_SECONDS:
            self._is_stalled = True
            self._on_health(
                f"the engine's worker has requests and has neither answered nor computed for"
                f" {STALL_SECONDS:.0f} s"
            )
