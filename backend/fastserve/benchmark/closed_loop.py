"""A closed loop of clients over a list of jobs, and its figures."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastserve.benchmark.job import Job
from fastserve.benchmark.targets import Target


@dataclass(frozen=True)
class Timing:
    """One request as its client saw it; seconds."""

    num_tokens: int
    first_token: float
    total: float
    between_responses: list[float]
    """The time from each response to the next."""

    @property
    def per_output_token(self) -> float:
        """Mean seconds between tokens after the first (TPOT)."""
        return (self.total - self.first_token) / max(1, self.num_tokens - 1)

    @property
    def num_responses(self) -> int:
        """Those that brought tokens."""
        return len(self.between_responses) + 1


@dataclass(frozen=True)
class Figures:
    """What a run of many jobs gave."""

    tokens_per_second: float
    """Output tokens of all jobs over the time from the first start to the last end."""
    timings: list[Timing]

    def first_token_ms(self, percent: int) -> float:
        """That percentile of the time to first token (TTFT), in milliseconds."""
        return 1e3 * _percentile([timing.first_token for timing in self.timings], percent)

    def per_output_token_ms(self, percent: int) -> float:
        """That percentile of the time per output token (TPOT), in milliseconds."""
        return 1e3 * _percentile([timing.per_output_token for timing in self.timings], percent)

    def inter_token_ms(self, percent: int) -> float:
        """That percentile of the time from one response to the next (ITL), in milliseconds."""
        gaps = [gap for timing in self.timings for gap in timing.between_responses]
        return 1e3 * _percentile(gaps, percent)

    @property
    def responses_per_token(self) -> float:
        """1 if each token comes by itself, less if responses join some."""
        num_tokens = sum(timing.num_tokens for timing in self.timings)
        return sum(timing.num_responses for timing in self.timings) / num_tokens


def run_load(target: Target, jobs: list[Job], num_clients: int) -> Figures:
    """Serves the jobs with `num_clients` clients, each sending its next job when its last one has ended.

    Raises what a job raises.
    """
    queue = iter(jobs)
    lock = threading.Lock()
    timings: list[Timing] = []
    errors: list[Exception] = []

    def client() -> None:
        try:
            for job in _shared(queue, lock):
                timings.append(_time(target, job))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Figures(sum(timing.num_tokens for timing in timings) / seconds, timings)


def _shared(queue: Iterator[Job], lock: threading.Lock) -> Iterator[Job]:
    while True:
        with lock:
            job = next(queue, None)
        if job is None:
            return
        yield job


def _time(target: Target, job: Job) -> Timing:
    start = time.perf_counter()
    times, num_tokens = [], 0
    for new in target.stream(job):
        if new:
            times.append(time.perf_counter())
            num_tokens += new
    total = time.perf_counter() - start
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Timing(num_tokens, times[0] - start if times else total, total, gaps)


def _percentile(values: list[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else 0.0
