"""A start that is slow is told from one that does nothing."""

from __future__ import annotations

import pytest

from fastserve.launcher.server_process import requests_in_flight
from fastserve.launcher.stall_detector import MIN_BYTES, MIN_CPU, SAMPLE_SECONDS, StallDetector

MINUTES = 10


class Start:
    """A start as `StallDetector` sees it, each second."""

    def __init__(self, cpu: float = 0.0, read: float = 0.0, logged: float = 0.0) -> None:
        """What comes in a second."""
        self._rates = (cpu, read, logged)
        self.now = 0.0
        self._progress = StallDetector(self._work, lambda: int(self._rates[2] * self.now), lambda: self.now)

    def _work(self) -> tuple[float, int]:
        return self._rates[0] * self.now, int(self._rates[1] * self.now)

    def longest_silence(self) -> float:
        silences = []
        for _ in range(60 * MINUTES):
            self.now += 1.0
            silences.append(self._progress.stalled_seconds())
        return max(silences)


@pytest.mark.parametrize(
    "rates", [{"cpu": 2 * MIN_CPU}, {"cpu": 8.0}, {"read": MIN_BYTES / 20}, {"logged": 0.1}]
)
def test_a_slow_start_shows_progress(rates: dict[str, float]) -> None:
    assert Start(**rates).longest_silence() <= 20 + 2 * SAMPLE_SECONDS


@pytest.mark.parametrize("rates", [{}, {"cpu": MIN_CPU / 2}, {"read": 100.0}])
def test_threads_that_only_wake_now_and_then_are_none(rates: dict[str, float]) -> None:
    assert Start(**rates).longest_silence() > 120


def test_a_process_that_ends_is_a_change() -> None:
    work, now = [100.0], [0.0]
    detector = StallDetector(lambda: (work[0], 0), lambda: 0, lambda: now[0])
    detector.stalled_seconds()
    work[0], now[0] = 1.0, 30.0
    assert detector.stalled_seconds() == 0.0


def test_requests_in_flight_are_the_sum_of_the_gauges() -> None:
    page = """# TYPE fastserve_requests_waiting gauge
fastserve_requests_waiting{model="scheduler",priority="0"} 3
fastserve_requests_waiting{model="scheduler",priority="5"} 1.000000
fastserve_requests_running{model="engine"} 16
fastserve_requests_preempted{model="engine"} 2
fastserve_requests_total{model="postprocess",outcome="stop"} 400
nv_inference_count{model="engine"} 7
"""
    assert requests_in_flight(page) == 22
    assert requests_in_flight("nv_inference_count 7\n") == 0
