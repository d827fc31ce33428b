from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from fastserve import service_thread
from fastserve.service_thread import UNHEALTHY_AFTER_FAILURES, ServiceThread

WAIT_SECONDS = 20.0
Piece = Callable[[], bool]


class Service:
    """A thread that does the pieces that a test hands it, and what it said."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.failures: list[Exception] = []
        self.health: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.thread = ServiceThread(
            "service", lambda: self._pieces.get()(), self.failures.append, self.health.put
        )
        self.thread.start()

    def do(self, name: str) -> None:
        def piece() -> bool:
            self.done.put(name)
            return True

        self._pieces.put(piece)

    def fail(self, error: BaseException) -> None:
        def piece() -> bool:
            raise error

        self._pieces.put(piece)

    def stop(self) -> None:
        self._pieces.put(lambda: False)
        self.thread.join(WAIT_SECONDS)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stop()


def test_a_failure_is_told_and_the_next_piece_is_done(service: Service) -> None:
    error = ValueError("one bad message")
    service.fail(error)
    service.do("next")
    assert service.done.get(timeout=WAIT_SECONDS) == "next"
    assert service.failures == [error]
    assert service.health.empty()


def test_one_that_keeps_failing_reports_so_once_and_that_it_works_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_thread, "MAX_BACKOFF_SECONDS", 0.0)
    for _ in range(UNHEALTHY_AFTER_FAILURES + 2):
        service.fail(ValueError("no shared memory"))
    problem = service.health.get(timeout=WAIT_SECONDS)
    assert problem == "the thread `service` keeps failing: ValueError: no shared memory"
    service.do("next")
    assert service.health.get(timeout=WAIT_SECONDS) is None
    assert len(service.failures) == UNHEALTHY_AFTER_FAILURES + 2


def test_what_could_not_be_reported_is_reported_again() -> None:
    said: list[str | None] = []
    refusals = [RuntimeError("no shared memory")] * 2

    def say(problem: str | None) -> None:
        said.append(problem)
        if len(said) in (1, 3):
            raise refusals.pop()

    failures = [ValueError("broken")] * (UNHEALTHY_AFTER_FAILURES + 1)
    answers = [False, True]

    def work() -> bool:
        if failures:
            raise failures.pop()
        return answers.pop()

    thread = ServiceThread("service", work, on_health=say)
    thread.start()
    thread.join(WAIT_SECONDS)
    problem = "the thread `service` keeps failing: ValueError: broken"
    assert said == [problem, problem, None, None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_ends_unasked_says_so(service: Service) -> None:
    service.fail(KeyboardInterrupt())
    assert service.health.get(timeout=WAIT_SECONDS) == "the thread `service` has ended"
    service.thread.join(WAIT_SECONDS)
    assert not service.thread.is_alive


def test_failing_its_requests_may_fail_too() -> None:
    def broken(error: Exception) -> None:
        raise RuntimeError("again")

    pieces: list[Piece] = [lambda: False, lambda: 1 // 0 == 0]
    thread = ServiceThread("service", lambda: pieces.pop()(), broken)
    thread.start()
    thread.join(WAIT_SECONDS)
    assert pieces == []


def test_one_that_is_told_to_end_says_nothing(service: Service) -> None:
    service.stop()
    assert not service.thread.is_alive
    assert service.health.empty()
