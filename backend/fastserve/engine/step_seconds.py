"""How long steps of decodes take, measured as they are computed."""

from __future__ import annotations

WEIGHT = 0.05
"""Of the latest step."""
NEAR = 0.1
"""Rows from the mean: nearer steps tell nothing of what a row takes."""


class StepSeconds:
    """A line through the seconds of steps by their rows: exponentially weighted least squares, in which the
    latest weigh most."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        """Means."""
        self._variance = self._covariance = 0.0
        self._seen: set[int] = set()

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learns from a step. The first of each number of rows does not count: it makes ready what others
        use."""
        if num_rows not in self._seen:
            self._seen.add(num_rows)
            return
        if not self._seconds:
            self._rows, self._seconds = float(num_rows), seconds
            return
        rows, longer = num_rows - self._rows, seconds - self._seconds
        if abs(rows) > NEAR:
            self._covariance = (1 - WEIGHT) * (self._covariance + WEIGHT * rows * longer)
            self._variance = (1 - WEIGHT) * (self._variance + WEIGHT * rows * rows)
        self._rows += WEIGHT * rows
        self._seconds += WEIGHT * longer

    @property
    def per_row(self) -> float:
        """What one more row takes; 0 while all steps were alike."""
        return max(0.0, self._covariance / self._variance) if self._variance else 0.0

    def of(self, num_rows: int) -> float:
        """Of a step of so many rows; 0 while none was measured."""
        return max(self._seconds + self.per_row * (num_rows - self._rows), self.per_row * num_rows)
