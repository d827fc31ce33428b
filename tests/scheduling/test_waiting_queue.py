from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.scheduling.conftest import POLICIES, QUICK, a_view

from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.waiting_queue import WaitingQueue
from fastserve.types import RequestView


def test_ties_go_to_the_earlier_arrival_then_to_the_earlier_push() -> None:
    queue: WaitingQueue[str] = WaitingQueue(MLFQ())
    queue.push("late", a_view("1", arrival=2.0), 2.0)
    queue.push("early", a_view("2", arrival=1.0), 2.0)
    queue.push("early, second", a_view("3", arrival=1.0), 2.0)
    queue.push("high", a_view("4", arrival=2.0, priority=5), 2.0)
    assert [queue.pop(2.0) for _ in range(4)] == ["high", "early", "early, second", "late"]


def test_a_sequence_waits_once() -> None:
    queue: WaitingQueue[str] = WaitingQueue(FCFS())
    queue.push("a", a_view("a"), 0.0)
    queue.push("its sibling", a_view("a", index=1), 0.0)
    with pytest.raises(ValueError, match="sequence 0 of request a waits already"):
        queue.push("a", a_view("a"), 0.0)
    assert len(queue) == 2


def test_an_empty_queue() -> None:
    queue: WaitingQueue[str] = WaitingQueue(FCFS())
    assert queue.peek(0.0) is None
    assert (queue.next_deadline, queue.next_change) == (None, None)
    assert queue.remove("a") is None
    assert queue.expired(1e9) == []
    with pytest.raises(IndexError):
        queue.pop(0.0)


def test_what_has_left_does_not_pile_up() -> None:
    queue: WaitingQueue[int] = WaitingQueue(MLFQ())
    queue.push(-1, a_view("first", priority=1), 0.0, deadline=0.5)
    for number in range(10_000):
        queue.push(number, a_view(str(number)), 0.0, deadline=1e9)
        queue.remove(str(number))
        assert queue.next_deadline == 0.5
    assert len(queue._by_deadline) < 50
    assert len(queue._by_change) < 50
    assert sum(map(len, queue._groups.values())) < 50


@pytest.mark.parametrize("arrival", [0.0, 0.1, 1e5 + 0.1, 1e9 / 3])
def test_a_change_by_time_comes_when_it_was_announced(arrival: float) -> None:
    """Within what floating point leaves of it: `now - waiting_since` is rounded."""
    queue: WaitingQueue[str] = WaitingQueue(MLFQ(starvation_seconds=0.3))
    queue.push("low", a_view("low", arrival=arrival, priority=-1), arrival)
    queue.push("high", a_view("high", arrival=arrival + 0.1), arrival + 0.1)
    assert queue.peek(arrival + 0.2) == "high"
    now = arrival + 0.2
    looks = 0
    while queue.peek(now) == "high":
        change = queue.next_change
        assert change == pytest.approx(arrival + 0.3, abs=1e-6)
        assert change is not None
        assert change > now
        now = change
        looks += 1
    assert looks <= 3
    assert queue.pop(now) == "low"


@dataclass
class Entry:
    view: RequestView
    label: int
    deadline: float | None


class QueueMachine(RuleBasedStateMachine):
    """Against a plain list that is sorted by the policy's rank whenever somebody asks."""

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def start(self, name: str) -> None:
        self.policy = POLICIES[name]()
        self.queue: WaitingQueue[int] = WaitingQueue(self.policy)
        self.model: dict[int, Entry] = {}
        self.running: list[RequestView] = []
        self.labels: set[int] = set()
        self.num_pushed = 0
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 8.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        ago=st.sampled_from([0.0, 0.0, 1.0, 7.9, 20.0]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("abc"),
        num_prompt_tokens=st.integers(1, 40),
        expected=st.integers(1, 40),
        deadline=st.none() | st.integers(0, 50),
    )
    def push(
        self,
        ago: float,
        priority: int,
        tenant: str,
        num_prompt_tokens: int,
        expected: int,
        deadline: int | None,
    ) -> None:
        view = a_view(
            str(self.num_pushed),
            priority=priority,
            tenant=tenant,
            arrival=self.now - ago,
            num_prompt_tokens=num_prompt_tokens,
            expected_output_tokens=expected,
        )
        self.enter(view, deadline)

    def enter(self, view: RequestView, deadline: float | None = None) -> None:
        self.queue.push(self.num_pushed, view, self.now, label=view.priority, deadline=deadline)
        self.model[self.num_pushed] = Entry(view, view.priority, deadline)
        self.labels.add(view.priority)
        self.num_pushed += 1

    def first(self) -> int | None:
        def order(number: int) -> tuple[tuple[float, ...], float, int]:
            view = self.model[number].view
            return (self.policy.rank(view, self.now), view.arrival, number)

        return min(self.model, key=order, default=None)

    @precondition(lambda self: bool(self.model))
    @rule(count=st.integers(1, 3))
    def pop(self, count: int) -> None:
        """They run, as in a batch."""
        for _ in range(min(count, len(self.model))):
            number = self.first()
            assert number is not None
            assert self.queue.pop(self.now) == number
            view = self.model.pop(number).view
            view.waiting_since = None
            self.running.append(view)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data(), prompt=st.integers(0, 9), output=st.integers(0, 9))
    def serve(self, data: st.DataObject, prompt: int, output: int) -> None:
        view = data.draw(st.sampled_from(self.running))
        view.num_served_tokens += prompt + output
        self.policy.on_service(view, prompt, output, self.now)

    @precondition(lambda self: bool(self.running))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        view = data.draw(st.sampled_from(self.running))
        self.running.remove(view)
        view.waiting_since = self.now
        self.enter(view)

    @rule(tenant=st.sampled_from("abc"), prompt=st.integers(0, 9), output=st.integers(0, 9))
    def tenant_is_served(self, tenant: str, prompt: int, output: int) -> None:
        self.policy.on_tenant_service(tenant, prompt, output)

    @precondition(lambda self: bool(self.num_pushed))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.num_pushed - 1))
        found = self.model.pop(number, None)
        if found is not None:
            assert (found.view.uid, found.view.index) in self.queue
            assert self.queue.remove(found.view.uid) == number
            assert self.queue.remove(found.view.uid) is None

    @rule()
    def expire(self) -> None:
        late = {
            number
            for number, entry in self.model.items()
            if entry.deadline is not None and entry.deadline <= self.now
        }
        for number in late:
            del self.model[number]
        assert set(self.queue.expired(self.now)) == late

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.model)
        assert list(self.queue) == list(self.model)
        assert self.queue.peek(self.now) == self.first()
        deadlines = [entry.deadline for entry in self.model.values() if entry.deadline is not None]
        assert self.queue.next_deadline == min(deadlines, default=None)
        change = self.queue.next_change
        assert change is None or change > self.now
        counts = dict.fromkeys(self.labels, 0)
        for entry in self.model.values():
            counts[entry.label] += 1
        assert self.queue.count_by_label() == counts


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = QUICK
