from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastserve.scheduling.waiting_queue import QueueFullError, WaitingQueue


def test_ties_go_to_the_earlier_arrival_then_to_the_earlier_push() -> None:
    queue: WaitingQueue[str] = WaitingQueue()
    queue.push("late", uid=1, key=1.0, arrival=2.0)
    queue.push("early", uid=2, key=1.0, arrival=1.0)
    queue.push("early, second", uid=3, key=1.0, arrival=1.0)
    queue.push("high", uid=4, key=5.0, arrival=9.0)
    assert [queue.pop() for _ in range(4)] == ["high", "early", "early, second", "late"]


def test_a_full_queue_refuses() -> None:
    queue: WaitingQueue[str] = WaitingQueue(capacity=1)
    queue.push("a", uid="a", key=0.0, arrival=0.0)
    with pytest.raises(QueueFullError, match="at most 1"):
        queue.push("b", uid="b", key=9.0, arrival=0.0)
    queue.pop()
    queue.push("b", uid="b", key=9.0, arrival=0.0)


def test_a_uid_waits_once() -> None:
    queue: WaitingQueue[str] = WaitingQueue()
    queue.push("a", uid="a", key=0.0, arrival=0.0)
    with pytest.raises(ValueError, match="'a' waits already"):
        queue.push("a", uid="a", key=0.0, arrival=0.0)


def test_an_empty_queue() -> None:
    queue: WaitingQueue[str] = WaitingQueue()
    assert queue.peek() is None
    assert queue.next_deadline is None
    assert queue.remove("a") is None
    assert queue.expired(1e9) == []
    with pytest.raises(IndexError):
        queue.pop()


def test_what_has_left_does_not_pile_up() -> None:
    queue: WaitingQueue[int] = WaitingQueue()
    queue.push(-1, uid=-1, key=1.0, arrival=0.0, deadline=0.5)
    for uid in range(10_000):
        queue.push(uid, uid=uid, key=0.0, arrival=0.0, deadline=1e9)
        queue.remove(uid)
        assert queue.next_deadline == 0.5
    assert len(queue._by_deadline) < 50
    assert len(queue._by_rank) < 50


class QueueMachine(RuleBasedStateMachine):
    """Against a plain list that is sorted when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: WaitingQueue[int] = WaitingQueue()
        self.model: list[tuple[float, float, int, int, float | None]] = []
        self.num_pushed = 0

    @rule(
        key=st.integers(0, 3),
        arrival=st.integers(0, 3),
        priority=st.integers(0, 2),
        deadline=st.none() | st.integers(0, 9),
    )
    def push(self, key: int, arrival: int, priority: int, deadline: int | None) -> None:
        uid = self.num_pushed
        self.num_pushed += 1
        self.queue.push(uid, uid=uid, key=key, arrival=arrival, priority=priority, deadline=deadline)
        self.model.append((-key, arrival, uid, priority, deadline))
        self.model.sort(key=lambda entry: entry[:3])

    @rule()
    def pop(self) -> None:
        if self.model:
            assert self.queue.pop() == self.model.pop(0)[2]

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.num_pushed:
            uid = data.draw(st.integers(0, self.num_pushed - 1))
            waits = any(entry[2] == uid for entry in self.model)
            self.model = [entry for entry in self.model if entry[2] != uid]
            assert self.queue.remove(uid) == (uid if waits else None)

    @rule(now=st.integers(0, 9))
    def expire(self, now: int) -> None:
        late = {entry[2] for entry in self.model if entry[4] is not None and entry[4] <= now}
        self.model = [entry for entry in self.model if entry[2] not in late]
        assert set(self.queue.expired(now)) == late

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.peek() == (self.model[0][2] if self.model else None)
        deadlines = [entry[4] for entry in self.model if entry[4] is not None]
        assert self.queue.next_deadline == min(deadlines, default=None)
        for priority, count in self.queue.count_by_priority().items():
            assert count == sum(entry[3] == priority for entry in self.model)


TestQueueMachine = QueueMachine.TestCase
