from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.admission import LOST_AFTER_SECONDS, MAX_PREEMPTING_IN_FLIGHT, AdmissionQueue
from fastserve.scheduling.policies import PriorityAge
from fastserve.types import EngineCapacity, OutputOptions, Request, SamplingParams

POLICY = PriorityAge(alpha=10.0, beta=1.0)


def a_request(
    uid: str, priority: int = 0, arrival: float = 0.0, n: int = 1, deadline: float | None = None
) -> Request:
    return Request(
        uid=uid,
        request_id="",
        prompt="",
        prompt_token_ids=[1],
        sampling=SamplingParams(n=n),
        output=OutputOptions(),
        priority=priority,
        tenant="",
        arrival=arrival,
        deadline=deadline,
    )


def an_admission(
    *requests: Request, max_queue_size: int = 100, max_queue_seconds: float = 0.0
) -> AdmissionQueue:
    admission = AdmissionQueue(POLICY, max_queue_size, max_queue_seconds)
    for request in requests:
        admission.submit(request, 0.0)
    return admission


def a_capacity(
    serial: int,
    free_slots: int,
    received: int = 0,
    lowest_key: float | None = None,
    incarnation: str = "a",
    arrived: int | None = None,
    time: float = 1.0,
) -> EngineCapacity:
    return EngineCapacity(
        incarnation, serial, received, received if arrived is None else arrived, free_slots, lowest_key, time
    )


def uids(requests: list[Request]) -> list[str]:
    return [request.uid for request in requests]


def test_nothing_is_released_before_the_has_engine_report() -> None:
    admission = an_admission(a_request("r"))
    assert admission.release(0.0) == []
    admission.update(a_capacity(1, 1))
    assert uids(admission.release(0.0)) == ["r"]


def test_the_best_go_first_and_no_more_than_there_is_room_for() -> None:
    admission = an_admission(a_request("low"), a_request("high", 2), a_request("middle", 1))
    admission.update(a_capacity(1, 2))
    assert uids(admission.release(0.0)) == ["high", "middle"]
    assert admission.release(0.0) == []
    admission.update(a_capacity(2, 0, received=2))
    assert admission.release(0.0) == []
    admission.update(a_capacity(3, 1, received=2))
    assert uids(admission.release(0.0)) == ["low"]


def test_what_the_engine_has_not_counted_yet_takes_room() -> None:
    admission = an_admission(*(a_request(str(number)) for number in range(4)))
    admission.update(a_capacity(1, 2))
    assert len(admission.release(0.0)) == 2
    admission.update(a_capacity(2, 1, received=1))
    assert admission.release(0.0) == []
    admission.update(a_capacity(3, 2, received=2))
    assert len(admission.release(0.0)) == 2


def test_a_request_needs_a_slot_for_each_of_its_sequences() -> None:
    admission = an_admission(a_request("three", 1, n=3), a_request("one"))
    admission.update(a_capacity(1, 4))
    admission.update(a_capacity(2, 2))
    assert admission.release(0.0) == []
    admission.update(a_capacity(3, 4))
    assert uids(admission.release(0.0)) == ["three", "one"]


def test_a_request_of_more_sequences_than_there_are_slots_gets_them_all() -> None:
    admission = an_admission(a_request("eight", n=8))
    admission.update(a_capacity(1, 2))
    admission.update(a_capacity(2, 1))
    assert admission.release(0.0) == []
    admission.update(a_capacity(3, 2))
    assert uids(admission.release(0.0)) == ["eight"]


def test_a_new_worker_may_have_fewer_slots() -> None:
    admission = an_admission(a_request("eight", n=8))
    admission.update(a_capacity(1, 4))
    admission.update(a_capacity(2, 2, incarnation="b"))
    assert uids(admission.release(0.0)) == ["eight"]


def test_a_stale_message_changes_nothing() -> None:
    admission = an_admission(a_request("r"))
    admission.update(a_capacity(2, 0))
    admission.update(a_capacity(1, 5))
    admission.update(a_capacity(2, 5))
    assert admission.release(0.0) == []


def test_a_new_incarnation_replaces_the_numbers_for_good() -> None:
    admission = an_admission(a_request("r"), a_request("s"))
    admission.update(a_capacity(9, 0))
    admission.update(a_capacity(1, 1, incarnation="b"))
    assert uids(admission.release(0.0)) == ["r"]
    admission.update(a_capacity(10, 5))
    assert admission.release(0.0) == []


def test_a_request_lost_before_the_has_engine_report_is_given_up_in_time() -> None:
    admission = an_admission(a_request("lost", 1), a_request("next"))
    admission.update(a_capacity(0, 1, time=0.0))
    assert uids(admission.release(100.0)) == ["lost"]
    due = admission.next_expiry
    assert due == 100.0 + LOST_AFTER_SECONDS
    assert admission.release(due - 0.01) == []
    assert uids(admission.release(due)) == ["next"]


def test_a_request_is_lost_when_the_engine_says_so() -> None:
    admission = an_admission(a_request("lost", 1), a_request("next"))
    admission.update(a_capacity(1, 1))
    assert uids(admission.release(100.0)) == ["lost"]
    assert admission.next_expiry is None
    assert admission.release(1000.0) == []
    admission.update(a_capacity(2, 1, time=100.0 + LOST_AFTER_SECONDS - 0.01))
    assert admission.release(1000.0) == []
    admission.update(a_capacity(3, 1, time=100.0 + LOST_AFTER_SECONDS))
    assert uids(admission.release(1000.0)) == ["next"]


def test_a_request_that_waits_for_a_long_step_is_not_lost() -> None:
    admission = an_admission(a_request("first", 1), a_request("next"))
    admission.update(a_capacity(1, 1))
    assert uids(admission.release(100.0)) == ["first"]
    admission.update(a_capacity(2, 1, arrived=1, time=500.0))
    assert admission.release(500.0) == []
    admission.update(a_capacity(3, 0, received=1, time=501.0))
    assert admission.release(501.0) == []
    admission.update(a_capacity(4, 1, received=1, time=502.0))
    assert uids(admission.release(502.0)) == ["next"]


def test_only_those_that_did_not_arrive_are_lost() -> None:
    admission = an_admission(*(a_request(str(number)) for number in range(6)))
    admission.update(a_capacity(1, 3))
    assert len(admission.release(0.0)) == 3
    admission.update(a_capacity(2, 3, arrived=2, time=50.0))
    assert len(admission.release(50.0)) == 1


# --- prompts longer than the KV cache


def too_long(limit: int) -> EngineCapacity:
    return msgspec.structs.replace(a_capacity(limit, 0), max_model_len=limit)


def test_a_prompt_that_cannot_be_held_is_refused_before_it_waits() -> None:
    admission = an_admission()
    admission.update(too_long(8))
    with pytest.raises(RequestError, match="prompt: got 8 tokens; allowed: at most 7") as caught:
        admission.submit(msgspec.structs.replace(a_request("r"), prompt_token_ids=[1] * 8), 0.0)
    assert caught.value.code is ErrorCode.INVALID_ARG
    admission.submit(msgspec.structs.replace(a_request("s"), prompt_token_ids=[1] * 7), 0.0)
    assert (admission.num_waiting, admission.refuse_too_long()) == (1, [])


def test_those_that_wait_already_are_refused_when_the_limit_is_known() -> None:
    long = msgspec.structs.replace(a_request("long"), prompt_token_ids=[1] * 8)
    admission = an_admission(long, a_request("short"))
    admission.update(a_capacity(1, 0))
    assert admission.refuse_too_long() == []
    admission.update(too_long(8))
    ((request, error),) = admission.refuse_too_long()
    assert (request, error.code) == (long, ErrorCode.INVALID_ARG)
    assert admission.num_waiting == 1
    assert admission.refuse_too_long() == []


# --- displacement


def test_a_key_above_the_lowest_goes_beyond_the_room() -> None:
    admission = an_admission(a_request("same", 1), a_request("lower"), a_request("higher", 2))
    admission.update(a_capacity(1, 0, lowest_key=POLICY.key(1, 0.0)))
    assert uids(admission.release(0.0)) == ["higher"]


def test_several_arrive_at_once_and_each_displaces_one() -> None:
    admission = an_admission(*(a_request(str(number), 1) for number in range(MAX_PREEMPTING_IN_FLIGHT + 2)))
    admission.update(a_capacity(1, 0, lowest_key=0.0))
    assert len(admission.release(0.0)) == MAX_PREEMPTING_IN_FLIGHT
    assert admission.release(0.0) == []
    admission.update(a_capacity(2, -1, received=1, lowest_key=0.0))
    assert len(admission.release(0.0)) == 1


def test_nobody_is_displaced_from_an_engine_that_runs_nothing() -> None:
    admission = an_admission(a_request("r", 9))
    admission.update(a_capacity(1, 0, lowest_key=None))
    assert admission.release(0.0) == []


# --- bounds and deadlines


def test_a_full_queue_refuses_and_says_so() -> None:
    admission = an_admission(a_request("r"), max_queue_size=1)
    with pytest.raises(RequestError, match="1 wait already; allowed: at most 1") as caught:
        admission.submit(a_request("s"), 0.0)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert (admission.num_waiting, admission.waiting_by_priority()) == (1, {0: 1})


def test_the_gauge_goes_back_to_zero() -> None:
    admission = an_admission(a_request("r", 3), a_request("s", 3), a_request("t"))
    admission.update(a_capacity(1, 2))
    admission.release(0.0)
    assert admission.waiting_by_priority() == {3: 0, 0: 1}


def test_the_earlier_of_both_deadlines_counts() -> None:
    admission = an_admission(a_request("own", deadline=3.0), a_request("queue"), max_queue_seconds=5.0)
    assert admission.next_expiry == 3.0
    assert admission.expire(2.9) == []
    assert uids(admission.expire(3.0)) == ["own"]
    assert admission.next_expiry == 5.0
    assert uids(admission.expire(9.0)) == ["queue"]
    assert admission.next_expiry is None


def test_without_a_limit_only_its_own_deadline_ends_a_wait() -> None:
    admission = an_admission(a_request("r"), a_request("s", deadline=1e6))
    assert uids(admission.expire(1e6)) == ["s"]


# --- against an engine whose messages get lost and come late


@dataclass
class FakeEngine:
    """Gives its slots by key; whoever holds one may finish. It takes in what has come when a step begins."""

    max_num_seqs: int
    now: float = 0.0
    step_seconds: float = 0.0
    busy_until: float = 0.0
    arrived: int = 0
    inbox: list[Request] = field(default_factory=list)
    incarnation: int = 0
    serial: int = 0
    received: int = 0
    requests: list[Request] = field(default_factory=list)
    served: list[str] = field(default_factory=list)

    def key(self, request: Request) -> float:
        return POLICY.key(request.priority, request.arrival)

    def receive(self, request: Request) -> None:
        self.arrived += 1
        self.inbox.append(request)
        self.take_in()

    def take_in(self) -> None:
        if self.now < self.busy_until:
            return
        self.busy_until = self.now + self.step_seconds
        self.received += len(self.inbox)
        self.requests += self.inbox
        self.inbox.clear()
        self.requests.sort(key=self.key, reverse=True)

    def running(self) -> list[Request]:
        running: list[Request] = []
        for request in self.requests:
            slots = sum(min(each.sampling.n, self.max_num_seqs) for each in [*running, request])
            if slots > self.max_num_seqs:
                break
            running.append(request)
        return running

    def finish(self, rng: random.Random) -> None:
        for request in self.running():
            if rng.random() < 0.5:
                self.requests.remove(request)
                self.served.append(request.uid)

    def free_slots(self) -> int:
        return self.max_num_seqs - sum(min(each.sampling.n, self.max_num_seqs) for each in self.requests)

    def capacity(self) -> EngineCapacity:
        self.serial += 1
        running = self.running()
        lowest = min(map(self.key, running)) if running else None
        return EngineCapacity(
            str(self.incarnation),
            self.serial,
            self.received,
            self.arrived,
            self.free_slots(),
            lowest,
            max(self.now, 1e-9),
        )


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_num_seqs=st.integers(1, 5),
    num_requests=st.integers(1, 30),
    lossy=st.booleans(),
    priorities=st.integers(0, 2),
    step_seconds=st.sampled_from([0.0, 0.4, 12.0]),
)
def test_everything_is_served_whatever_becomes_of_the_messages(
    seed: int, max_num_seqs: int, num_requests: int, lossy: bool, priorities: int, step_seconds: float
) -> None:
    """Messages of both directions come late, reordered and, if `lossy`, not at all; workers die too.

    Steps may take longer than it takes to call a request lost.
    """
    rng = random.Random(seed)
    admission = AdmissionQueue(POLICY, max_queue_size=1000, max_queue_seconds=0.0)
    engine = FakeEngine(max_num_seqs, step_seconds=step_seconds)
    to_come = [
        a_request(str(number), rng.randint(0, priorities), float(number), rng.choice([1, 1, 1, 2, 6]))
        for number in range(num_requests)
    ]
    on_the_way: list[Request] = []
    capacities: list[EngineCapacity] = [engine.capacity()]
    lost: list[str] = []
    now = 0.0
    while len(engine.served) + len(lost) < num_requests:
        now += 0.2
        engine.now = now
        engine.take_in()
        assert now < 100.0 * num_requests + 1000.0, "something is stuck"
        if to_come and rng.random() < 0.5:
            admission.submit(to_come.pop(0), now)
        if capacities and rng.random() < 0.8:
            admission.update(capacities.pop(rng.randrange(len(capacities))))
        on_the_way += admission.release(now)
        if on_the_way and rng.random() < 0.6:
            request = on_the_way.pop(rng.randrange(len(on_the_way)))
            if lossy and rng.random() < 0.1:
                lost.append(request.uid)
            else:
                engine.receive(request)
        engine.finish(rng)
        if lossy and rng.random() < 0.02:
            engine.incarnation += 1
            lost += [request.uid for request in [*engine.requests, *engine.inbox]]
            engine.received += len(engine.inbox)
            engine.requests.clear()
            engine.inbox.clear()
        capacities.append(engine.capacity())
        if lossy and rng.random() < 0.3:
            capacities.pop(rng.randrange(len(capacities)))
    assert sorted([*engine.served, *lost], key=int) == [str(number) for number in range(num_requests)]
    assert admission.num_waiting == 0
    assert lossy or not lost


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_num_seqs=st.integers(1, 6),
    priorities=st.integers(0, 2),
    pause=st.sampled_from([0.01, 0.3]),
    step_seconds=st.sampled_from([0.0, 14.0]),
)
def test_no_more_go_than_there_is_room_for(
    seed: int, max_num_seqs: int, priorities: int, pause: float, step_seconds: float
) -> None:
    """Messages come late but in order, steps may be long. Beyond the room go only the urgent."""
    rng = random.Random(seed)
    admission = AdmissionQueue(POLICY, max_queue_size=1000, max_queue_seconds=0.0)
    engine = FakeEngine(max_num_seqs, step_seconds=step_seconds)
    on_the_way: list[Request] = []
    capacities: list[EngineCapacity] = [engine.capacity()]
    for number in range(100):
        engine.now = now = number * pause
        engine.take_in()
        admission.submit(a_request(str(number), rng.randint(0, priorities), now), now)
        while capacities and rng.random() < 0.5:
            admission.update(capacities.pop(0))
        released = admission.release(now)
        assert [engine.key(each) for each in released] == sorted(map(engine.key, released), reverse=True)
        on_the_way += released
        while on_the_way and rng.random() < 0.5:
            engine.receive(on_the_way.pop(0))
        excess = len(on_the_way) + len(engine.inbox) - engine.free_slots()
        urgent = sum(each.priority > 0 for each in [*engine.requests, *engine.inbox, *on_the_way])
        assert excess <= urgent
        assert len(on_the_way) + len(engine.inbox) <= max_num_seqs + MAX_PREEMPTING_IN_FLIGHT
        if rng.random() < 0.3:
            engine.finish(rng)
        capacities.append(engine.capacity())
