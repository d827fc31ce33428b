"""When a worker counts as stalled."""

from __future__ import annotations

from fastserve.ensemble.worker_watch import STALL_SECONDS, WorkerWatch


class Watched:
    """A watch, its clock and what it has said."""

    def __init__(self) -> None:
        self.now = 100.0
        self.said: list[str | None] = []
        self.watch = WorkerWatch(self.said.append, clock=lambda: self.now)

    def look(self, after: float, has_requests: bool = True, messages: int = 0, cpu: float = 0.0) -> None:
        self.now += after
        self.watch.look(has_requests, messages, cpu)


def test_one_that_neither_answers_nor_computes_is_said_once_until_it_goes_on() -> None:
    watched = Watched()
    watched.look(2, cpu=5.0)
    watched.look(STALL_SECONDS - 1, cpu=5.0)
    assert watched.said == []
    watched.look(1, cpu=5.1)
    watched.look(100, cpu=5.1)
    assert len(watched.said) == 1
    assert "has neither answered nor computed for 60 s" in str(watched.said[0])
    watched.look(1, messages=1, cpu=5.1)
    assert watched.said[1:] == [None]


def test_a_long_step_on_a_slow_machine_an_idle_worker_and_one_that_speaks_are_well() -> None:
    watched = Watched()
    for second in range(0, 600, 2):
        watched.look(2, cpu=0.05 * second)
    for _ in range(300):
        watched.look(2, has_requests=False)
    for number in range(20):
        watched.look(STALL_SECONDS - 1, messages=number)
    assert watched.said == []
