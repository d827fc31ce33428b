"""The time that a call has."""

from __future__ import annotations

import time


class Deadline:
    """`timeout` seconds from now; None: never."""

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left, at least 1 ms: to most libraries a timeout of zero or less means something else."""
        return None if self._at is None else max(self._at - time.monotonic(), 0.001)

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._at is not None and time.monotonic() >= self._at
