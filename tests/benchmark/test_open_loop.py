"""Requests that are sent when they are due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fastserve.benchmark.job import Job
from fastserve.benchmark.open_loop import replay
from fastserve.errors import ErrorCode, RequestError
from fastserve.workload.arrival import Arrival
from fastserve_client import FastServeError

Serve = Callable[[Job], Iterator[int]]


class FakeTarget:
    """Serves jobs as the test says, and notes when each came."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._lock = threading.Lock()
        self.came: list[tuple[float, Job]] = []

    def stream(self, job: Job) -> Iterator[int]:
        with self._lock:
            self.came.append((time.perf_counter(), job))
        yield from self._serve(job)

    def close(self) -> None:
        pass


def one_by_one(job: Job) -> Iterator[int]:
    for _ in range(job.max_tokens):
        yield 1


def test_a_request_that_does_not_end_delays_no_other() -> None:
    """All of them end only when the last has been sent."""
    last = threading.Event()

    def serve(job: Job) -> Iterator[int]:
        if job.max_tokens == 50:
            last.set()
        assert last.wait(60)
        yield job.max_tokens

    target = FakeTarget(serve)
    records = replay(target, [Arrival(number / 1000, 1, number + 1) for number in range(50)], seed=0)
    assert [record.num_output_tokens for record in records] == [*range(1, 51)]
    assert all(record.error is None for record in records)


def test_requests_are_sent_at_their_times_with_what_the_workload_says() -> None:
    target = FakeTarget(one_by_one)
    arrivals = [
        Arrival(0.05, 3, 2, priority=7, tenant="a"),
        Arrival(0.20, 4, 1, block_hashes=(1,), block_size=4),
        Arrival(0.25, 4, 1, block_hashes=(1,), block_size=4),
    ]
    start = time.perf_counter()
    records = replay(target, arrivals, seed=0)
    jobs = [job for _, job in target.came]
    assert [came - start >= arrival.time for (came, _), arrival in zip(target.came, arrivals, strict=True)]
    assert [(len(job.prompt_token_ids), job.max_tokens, job.priority, job.tenant) for job in jobs] == [
        (3, 2, 7, "a"),
        (4, 1, 0, ""),
        (4, 1, 0, ""),
    ]
    assert jobs[1].prompt_token_ids == jobs[2].prompt_token_ids
    for record, arrival in zip(records, arrivals, strict=True):
        assert (record.arrival, record.priority, record.tenant) == (
            arrival.time,
            arrival.priority,
            arrival.tenant,
        )
        assert record.first_token is not None
        assert 0 <= record.lateness <= record.first_token <= record.completion


def test_a_late_sender_is_seen_and_its_delay_is_in_the_latencies() -> None:
    """The arrivals were due a second ago when the first one is sent."""
    arrivals = [Arrival(-1.0, 1, 1), Arrival(0.0, 1, 1)]
    late, punctual = replay(FakeTarget(one_by_one), arrivals, seed=0)
    assert late.lateness >= 1
    assert late.first_token is not None
    assert late.first_token >= late.lateness
    assert late.completion >= late.first_token
    assert punctual.lateness < late.lateness


def test_refusals_are_records_and_end_nothing() -> None:
    ended = threading.Semaphore(0)

    def serve(job: Job) -> Iterator[int]:
        if job.max_tokens == 1:
            raise FastServeError("UNAVAILABLE", "the queue is full")
        if job.max_tokens == 2:
            raise RequestError("the prompt is too long", ErrorCode.INVALID_ARG)
        yield 2
        if job.max_tokens == 3:
            raise FastServeError("INTERNAL", "the worker has died")
        yield job.max_tokens - 2

    arrivals = [Arrival(0.0, 1, number) for number in (1, 2, 3, 4)]
    records = replay(FakeTarget(serve), arrivals, seed=0, on_end=ended.release)
    assert [record.error for record in records] == ["UNAVAILABLE", "INVALID_ARG", "INTERNAL", None]
    assert [record.num_output_tokens for record in records] == [0, 0, 2, 4]
    assert [record.first_token is None for record in records] == [True, True, False, False]
    assert all(ended.acquire(blocking=False) for _ in arrivals)
    assert not ended.acquire(blocking=False)


def test_what_is_no_refusal_is_raised_and_nothing_is_sent_after_it() -> None:
    def serve(job: Job) -> Iterator[int]:
        raise ZeroDivisionError
        yield

    target = FakeTarget(serve)
    with pytest.raises(ZeroDivisionError):
        replay(target, [Arrival(0.0, 1, 1), Arrival(3600.0, 1, 1)], seed=0)
    assert len(target.came) == 1
