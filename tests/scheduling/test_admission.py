from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scheduling.conftest import a_request, a_view

from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.admission import AdmissionQueue
from fastserve.scheduling.capacity import (
    Ended,
    EngineCapacity,
    Event,
    Preempted,
    Released,
    ReplicaCapacity,
    ResumeList,
    TenantTokens,
)
from fastserve.scheduling.outbox import Outbox
from fastserve.scheduling.policies.fair import Fair
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.replica import LOST_AFTER_SECONDS
from fastserve.types import Request, Resume

POLICY = PriorityAge(alpha=10.0, beta=1.0)


def an_admission(
    *requests: Request,
    policy: Policy = POLICY,
    max_queue_size: int = 100,
    max_queue_seconds: float = 0.0,
) -> AdmissionQueue:
    admission = AdmissionQueue(policy, max_queue_size, max_queue_seconds)
    for request in requests:
        admission.submit(request, 0.0)
    return admission


def a_replica(free_slots: int = 1, **fields: Any) -> ReplicaCapacity:
    """With blocks and tokens for all."""
    values: dict[str, Any] = {
        "incarnation": "a",
        "received": 0,
        "free_blocks": 1000,
        "free_tokens": 1000,
        "num_running": 1,
        "num_blocks": 1000,
    } | fields
    return ReplicaCapacity(free_slots=free_slots, **({"arrived": values["received"]} | values))


def report(serial: int, *replicas: ReplicaCapacity, **fields: Any) -> EngineCapacity:
    return EngineCapacity(serial, replicas=list(replicas), **({"time": 1.0, "block_size": 4} | fields))


def told(admission: AdmissionQueue, serial: int, *replicas: ReplicaCapacity, **fields: Any) -> list[str]:
    """What is released after a report."""
    admission.update(report(serial, *replicas, **fields), 0.0)
    return uids(admission.release(0.0))


def uids(releases: list[Released]) -> list[str]:
    return [release.request.uid for release in releases]


def test_nothing_is_released_before_the_engine_has_said_anything() -> None:
    admission = an_admission(a_request("r"))
    assert admission.release(0.0) == []
    assert told(admission, 1, a_replica()) == ["r"]


def test_the_first_by_rank_go_first_and_no_more_than_there_is_room_for() -> None:
    requests = a_request("low"), a_request("high", priority=2), a_request("middle", priority=1)
    admission = an_admission(*requests)
    assert told(admission, 1, a_replica(2)) == ["high", "middle"]
    assert admission.release(0.0) == []
    assert told(admission, 2, a_replica(0, received=2)) == []
    assert told(admission, 3, a_replica(1, received=2)) == ["low"]


def test_what_the_engine_has_not_counted_yet_takes_room() -> None:
    admission = an_admission(*(a_request(str(number)) for number in range(4)))
    assert len(told(admission, 1, a_replica(2))) == 2
    assert told(admission, 2, a_replica(1, received=1)) == []
    assert len(told(admission, 3, a_replica(2, received=2))) == 2


def test_blocks_and_tokens_are_room_too() -> None:
    admission = an_admission(a_request("long", [1] * 40, priority=1), a_request("short", [1]))
    assert told(admission, 1, a_replica(9, free_blocks=9)) == [], "nothing passes the first"
    assert told(admission, 2, a_replica(9, free_tokens=0)) == []
    assert told(admission, 3, a_replica(9, free_blocks=10)) == ["long"]
    assert told(admission, 4, a_replica(9, received=1, free_blocks=1)) == ["short"]


def test_a_request_needs_a_slot_for_each_of_its_sequences() -> None:
    admission = an_admission(a_request("three", priority=1, n=3), a_request("one"))
    admission.update(report(1, a_replica(4)), 0.0)
    assert told(admission, 2, a_replica(2)) == []
    assert told(admission, 3, a_replica(4)) == ["three", "one"]


def test_a_request_of_more_sequences_than_there_are_slots_gets_them_all() -> None:
    admission = an_admission(a_request("eight", n=8))
    admission.update(report(1, a_replica(2)), 0.0)
    assert told(admission, 2, a_replica(1)) == []
    assert told(admission, 3, a_replica(2)) == ["eight"]


def test_a_new_worker_may_have_fewer_slots() -> None:
    admission = an_admission(a_request("eight", n=8))
    admission.update(report(1, a_replica(4)), 0.0)
    assert told(admission, 2, a_replica(2, incarnation="b")) == ["eight"]


def test_a_stale_message_changes_nothing() -> None:
    admission = an_admission(a_request("r"))
    admission.update(report(2, a_replica(0)), 0.0)
    assert told(admission, 1, a_replica(5)) == []
    assert told(admission, 2, a_replica(5)) == []


def test_a_request_lost_before_the_engine_has_said_anything_is_given_up_in_time() -> None:
    admission = an_admission(a_request("lost", priority=1), a_request("next"))
    admission.update(report(0, a_replica(1), time=0.0), 0.0)
    assert uids(admission.release(100.0)) == ["lost"]
    due = admission.next_expiry
    assert due == 100.0 + LOST_AFTER_SECONDS
    assert admission.release(due - 0.01) == []
    assert uids(admission.release(due)) == ["next"]


def test_a_request_is_lost_when_the_engine_says_so() -> None:
    admission = an_admission(a_request("lost", priority=1), a_request("next"))
    admission.update(report(1, a_replica(1)), 0.0)
    assert uids(admission.release(100.0)) == ["lost"]
    assert admission.next_expiry is None
    assert admission.release(1000.0) == []
    assert told(admission, 2, a_replica(1), time=100.0 + LOST_AFTER_SECONDS - 0.01) == []
    assert told(admission, 3, a_replica(1), time=100.0 + LOST_AFTER_SECONDS) == ["next"]


def test_a_request_that_waits_for_a_long_step_is_not_lost() -> None:
    admission = an_admission(a_request("first", priority=1), a_request("next"))
    assert told(admission, 1, a_replica(1)) == ["first"]
    assert told(admission, 2, a_replica(1, arrived=1), time=500.0) == []
    assert told(admission, 3, a_replica(0, received=1), time=501.0) == []
    assert told(admission, 4, a_replica(1, received=1), time=502.0) == ["next"]


def test_only_those_that_did_not_arrive_are_lost() -> None:
    admission = an_admission(*(a_request(str(number)) for number in range(6)))
    assert len(told(admission, 1, a_replica(3))) == 3
    assert len(told(admission, 2, a_replica(3, arrived=2), time=50.0)) == 1


# --- preempted sequences


def waiting_by_priority(admission: AdmissionQueue) -> dict[int, int]:
    """How many wait under each label of priorities, over all tenants."""
    counts: Counter[int] = Counter()
    for labels, count in admission.waiting_by_label().items():
        counts[labels.priority] += count
    return dict(counts)


def preempted(uid: str, number: int, replica: int = 0, **fields: Any) -> dict[str, Any]:
    """The part of a report that tells of one."""
    can_move = fields.pop("can_move", True)
    event = Preempted(replica, a_view(uid, num_prompt_tokens=8, **fields), can_move)
    return {"events": [event], "events_number": number}


def test_a_preempted_sequence_waits_among_the_others_by_the_same_rank() -> None:
    admission = an_admission(a_request("high", priority=2), a_request("low"))
    admission.update(report(1, a_replica(0), **preempted("middle", 1, priority=1, index=3)), 0.0)
    assert (admission.num_waiting, waiting_by_priority(admission)) == (3, {2: 1, 0: 1, 1: 1})
    assert told(admission, 2, a_replica(2)) == ["high"]
    assert admission.take_resumes() == ResumeList(1, [Resume("middle", 3, 0)], num_waiting=1)
    assert told(admission, 3, a_replica(0, received=2), resumes_seen=1) == []
    assert admission.take_resumes() == ResumeList(1, [], num_waiting=1)


def test_what_is_told_twice_waits_once_and_what_is_not_acknowledged_is_told_again() -> None:
    admission = an_admission()
    told(admission, 1, a_replica(0), **preempted("r", 1))
    told(admission, 2, a_replica(0), **preempted("r", 1))
    assert admission.num_waiting == 1
    told(admission, 3, a_replica(1), **preempted("r", 1))
    for serial in (4, 5):
        assert admission.take_resumes() == ResumeList(1, [Resume("r", 0, 0)])
        told(admission, serial, a_replica(0), resumes_seen=0)
    told(admission, 6, a_replica(1, received=1), resumes_seen=1, **preempted("r", 2))
    assert admission.take_resumes() == ResumeList(2, [Resume("r", 0, 0)])


def test_a_preempted_sequence_that_has_ended_waits_no_longer() -> None:
    admission = an_admission()
    told(admission, 1, a_replica(0), **preempted("r", 1))
    told(admission, 2, a_replica(0), events=[Ended("r", 0), Ended("unknown", 0)], events_number=2)
    assert (admission.num_waiting, admission.take_resumes()) == (0, ResumeList(0, []))


def test_it_runs_where_its_blocks_are_if_that_has_room_and_else_elsewhere() -> None:
    for can_move, places in ((True, [1, 0]), (False, [1, 1])):
        admission = an_admission()
        event = preempted("r", 1, replica=1, can_move=can_move)
        told(admission, 1, a_replica(1), a_replica(1, num_running=3), **event)
        assert [each.replica for each in admission.take_resumes().resumes] == [places[0]]
        admission = an_admission()
        told(admission, 1, a_replica(1), a_replica(0, num_running=3), **event)
        assert [each.replica for each in admission.take_resumes().resumes] == places[1:] * can_move
        told(admission, 2, a_replica(1), a_replica(1), resumes_seen=1)
        assert [each.replica for each in admission.take_resumes().resumes] == places[1:] * (not can_move)


def test_preempted_sequences_do_not_count_as_queued_requests() -> None:
    admission = an_admission(max_queue_size=1)
    told(admission, 1, a_replica(0), **preempted("r", 1))
    admission.submit(a_request("new"), 0.0)
    with pytest.raises(RequestError, match="the queue is full: 1 wait already"):
        admission.submit(a_request("one more"), 0.0)


def test_what_the_engines_compute_is_told_to_the_policy_once() -> None:
    admission = an_admission(a_request("a", tenant="a"), a_request("b", tenant="b"), policy=Fair())
    served = {"events": [TenantTokens("a", 0, 10)], "events_number": 1}
    told(admission, 1, a_replica(0), **served)
    told(admission, 2, a_replica(0), **served)
    told(admission, 3, a_replica(0), events=[TenantTokens("b", 0, 15)], events_number=2)
    assert told(admission, 4, a_replica(1)) == ["a"]


# --- which replica


def test_a_request_goes_where_least_has_to_be_computed_first() -> None:
    requests = [a_request(str(number), [7] * 40) for number in range(2)]
    admission = an_admission(requests[0])
    assert told(admission, 1, a_replica(4, num_running=2), a_replica(4)) == ["0"]
    admission.submit(requests[1], 0.0)
    admission.update(report(2, a_replica(4, num_running=2), a_replica(4, received=1, num_running=3)), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [1], "its prefix is there"
    admission.submit(a_request("other", [8] * 40), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [0], "fewer run there"


def test_prompts_that_wait_to_be_computed_there_come_first() -> None:
    admission = an_admission(a_request("r", [7] * 40))
    busy = a_replica(4, num_running=1, free_tokens=-30)
    admission.update(report(1, busy, a_replica(4, num_running=3)), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [1]


@pytest.mark.parametrize(("num_waiting_tokens", "replica"), [(8, 1), (31, 1), (33, 0)])
def test_a_replica_with_the_prefix_is_waited_for_where_that_is_cheaper(
    num_waiting_tokens: int, replica: int
) -> None:
    """Of 40 tokens it holds 32, and computes others first; the other replica has nothing to do."""
    prompt = list(range(40))
    admission = an_admission(a_request("first", prompt))
    admission.update(report(1, a_replica(0), a_replica(1)), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [1]
    admission.submit(a_request("second", [*prompt[:32], *range(100, 108)]), 0.0)
    busy = a_replica(1, received=1, free_tokens=-num_waiting_tokens)
    admission.update(report(2, a_replica(1), busy), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [replica]


def test_where_no_replica_has_room_nobody_goes_for_the_sake_of_a_prefix() -> None:
    prompt = list(range(40))
    admission = an_admission(a_request("first", prompt))
    assert told(admission, 1, a_replica(1)) == ["first"]
    admission.submit(a_request("second", prompt), 0.0)
    assert told(admission, 2, a_replica(1, received=1, free_tokens=-1)) == []
    assert told(admission, 3, a_replica(1, received=1, free_tokens=1)) == ["second"]


def test_a_restarted_worker_has_lost_its_prefixes() -> None:
    admission = an_admission(a_request("0", [7] * 40))
    admission.update(report(1, a_replica(4, num_running=2), a_replica(4)), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [1]
    admission.submit(a_request("1", [7] * 40), 0.0)
    restarted = a_replica(4, received=1, incarnation="b", num_running=3)
    admission.update(report(2, a_replica(4, num_running=2), restarted), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [0]


# --- prompts longer than the KV cache


def test_a_prompt_that_cannot_be_held_is_refused_before_it_waits() -> None:
    admission = an_admission()
    told(admission, 1, a_replica(0), max_model_len=8)
    with pytest.raises(RequestError, match="prompt: got 8 tokens; allowed: at most 7") as caught:
        admission.submit(a_request("r", [1] * 8), 0.0)
    assert caught.value.code is ErrorCode.INVALID_ARG
    admission.submit(a_request("s", [1] * 7), 0.0)
    assert (admission.num_waiting, admission.refuse_too_long()) == (1, [])


def test_those_that_wait_already_are_refused_when_the_limit_is_known() -> None:
    long = a_request("long", [1] * 8)
    admission = an_admission(long, a_request("short"), max_queue_size=2)
    told(admission, 1, a_replica(0))
    assert admission.refuse_too_long() == []
    told(admission, 2, a_replica(0), max_model_len=8)
    ((request, error),) = admission.refuse_too_long()
    assert (request, error.code) == (long, ErrorCode.INVALID_ARG)
    assert admission.num_waiting == 1
    assert admission.refuse_too_long() == []
    admission.submit(a_request("there is room again"), 0.0)


# --- preemption


def test_one_who_ranks_before_the_last_that_runs_goes_beyond_the_room() -> None:
    requests = a_request("same", priority=1), a_request("lower"), a_request("higher", priority=2)
    admission = an_admission(*requests)
    running = POLICY.rank(a_view(priority=1), 0.0)
    assert told(admission, 1, a_replica(0, running_ranks=[running])) == ["higher"]


def test_several_may_go_at_once_and_each_preempts_another() -> None:
    admission = an_admission(*(a_request(str(number), priority=1) for number in range(4)))
    running = [POLICY.rank(a_view(), 0.0)] * 2
    assert len(told(admission, 1, a_replica(0, running_ranks=running))) == 2
    assert admission.release(0.0) == []
    assert len(told(admission, 2, a_replica(0, received=2, running_ranks=running[:1]))) == 1


def test_the_replica_whose_last_ranks_last_makes_way() -> None:
    admission = an_admission(a_request("r", priority=5))
    ranks = [POLICY.rank(a_view(priority=priority), 0.0) for priority in (2, 0, 1)]
    admission.update(report(1, *(a_replica(0, running_ranks=[rank]) for rank in ranks)), 0.0)
    assert [each.replica for each in admission.release(0.0)] == [1]


def test_nobody_is_preempted_in_an_engine_that_runs_nothing() -> None:
    admission = an_admission(a_request("r", priority=9))
    assert told(admission, 1, a_replica(0, num_running=0)) == []


# --- bounds, deadlines, and what time does


def test_a_full_queue_refuses_and_says_so() -> None:
    admission = an_admission(a_request("r"), max_queue_size=1)
    with pytest.raises(RequestError, match="1 wait already; allowed: at most 1") as caught:
        admission.submit(a_request("s"), 0.0)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert (admission.num_waiting, waiting_by_priority(admission)) == (1, {0: 1})


def test_a_request_waits_once() -> None:
    admission = an_admission(a_request("r"), max_queue_size=2)
    with pytest.raises(ValueError, match="sequence 0 of request r waits already"):
        admission.submit(a_request("r"), 0.0)
    admission.submit(a_request("s"), 0.0)


def test_the_gauge_goes_back_to_zero() -> None:
    admission = an_admission(a_request("r", priority=3), a_request("s", priority=10), a_request("t"))
    told(admission, 1, a_replica(2))
    assert waiting_by_priority(admission) == {3: 0, 10: 0, 0: 1}


def test_the_earlier_of_both_deadlines_counts() -> None:
    admission = an_admission(a_request("own", deadline=3.0), a_request("queue"), max_queue_seconds=5.0)
    assert admission.next_expiry == 3.0
    assert admission.expire(2.9) == []
    assert [each.uid for each in admission.expire(3.0)] == ["own"]
    assert admission.next_expiry == 5.0
    assert [each.uid for each in admission.expire(9.0)] == ["queue"]
    assert admission.next_expiry is None


def test_without_a_limit_only_its_own_deadline_ends_a_wait() -> None:
    admission = an_admission(a_request("r"), a_request("s", deadline=1e6))
    assert [each.uid for each in admission.expire(1e6)] == ["s"]


def test_a_preempted_sequence_is_not_expired_here() -> None:
    admission = an_admission(max_queue_seconds=5.0)
    told(admission, 1, a_replica(0), **preempted("r", 1))
    assert (admission.next_expiry, admission.expire(1e6), admission.num_waiting) == (None, [], 1)


def test_it_wakes_when_time_changes_who_is_first() -> None:
    policy = MLFQ(starvation_seconds=60.0)
    admission = an_admission(a_request("low", priority=-1), policy=policy)
    running = policy.rank(a_view(priority=1), 0.0)
    assert told(admission, 1, a_replica(0, running_ranks=[running])) == []
    assert admission.next_expiry == 60.0
    assert admission.release(59.9) == []
    assert uids(admission.release(60.0)) == ["low"]


# --- against an engine whose messages get lost and come late


class FakeEngine:
    """Gives its slots by rank, hands back whom it preempts, and takes in what has come when a step begins."""

    def __init__(self, max_num_seqs: int, step_seconds: float) -> None:
        self.max_num_seqs = max_num_seqs
        self.step_seconds = step_seconds
        self.now = 0.0
        self.busy_until = 0.0
        self.incarnation = 0
        self.serial = 0
        self.arrived = 0
        self.received = 0
        self.inbox: list[Request] = []
        self.running: list[Request] = []
        self.parked: dict[str, Request] = {}
        self.served: list[str] = []
        self.events: Outbox[Event] = Outbox()
        self.resumes_seen = 0

    def rank(self, request: Request) -> tuple[float, ...]:
        return POLICY.rank(a_view(priority=request.priority, arrival=request.arrival), self.now)

    def slots(self, requests: list[Request]) -> int:
        return sum(min(each.sampling.n, self.max_num_seqs) for each in requests)

    def receive(self, request: Request) -> None:
        self.arrived += 1
        self.inbox.append(request)

    def answer(self, resumes: ResumeList) -> None:
        if resumes.number > self.resumes_seen:
            self.resumes_seen = resumes.number
            for resume in resumes.resumes:
                self.arrived += 1
                if (request := self.parked.pop(resume.uid, None)) is not None:
                    self.inbox.append(request)
                else:
                    self.received += 1

    def take_in(self) -> None:
        if self.now < self.busy_until:
            return
        self.busy_until = self.now + self.step_seconds
        self.received += len(self.inbox)
        candidates = sorted([*self.running, *self.inbox], key=self.rank)
        self.inbox.clear()
        self.running = []
        while candidates and self.slots([*self.running, candidates[0]]) <= self.max_num_seqs:
            self.running.append(candidates.pop(0))
        for request in candidates:
            self.parked[request.uid] = request
            view = a_view(request.uid, priority=request.priority, arrival=request.arrival)
            self.events.add(Preempted(0, view, can_move=False))

    def finish(self, rng: random.Random) -> None:
        for request in list(self.running):
            if rng.random() < 0.5:
                self.running.remove(request)
                self.served.append(request.uid)

    def cancel(self, uid: str) -> None:
        del self.parked[uid]
        self.events.add(Ended(uid, 0))

    def die(self) -> list[str]:
        """Those that are lost with it. What is parked stays, as the relay has it."""
        lost = [request.uid for request in [*self.running, *self.inbox]]
        self.incarnation += 1
        self.received += len(self.inbox)
        self.running.clear()
        self.inbox.clear()
        return lost

    def capacity(self) -> EngineCapacity:
        self.serial += 1
        ranks = [self.rank(each) for each in self.running for _ in range(min(each.sampling.n, 4))]
        replica = a_replica(
            self.max_num_seqs - self.slots(self.running),
            incarnation=str(self.incarnation),
            received=self.received,
            arrived=self.arrived,
            num_running=len(self.running),
            running_ranks=sorted(ranks, reverse=True),
        )
        events = self.events.batch()
        return report(
            self.serial,
            replica,
            time=max(self.now, 1e-9),
            events=list(events),
            events_number=self.events.number,
            resumes_seen=self.resumes_seen,
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

    A report and its answer are one exchange: if either is lost, the engine does not know what was seen. Steps
    may take longer than it takes to call a request lost.
    """
    rng = random.Random(seed)
    admission = an_admission(max_queue_size=1000)
    engine = FakeEngine(max_num_seqs, step_seconds)
    to_come = deque(
        a_request(
            str(number),
            priority=rng.randint(0, priorities),
            arrival=float(number),
            n=rng.choice([1, 1, 1, 2, 6]),
        )
        for number in range(num_requests)
    )
    on_the_way: list[Request] = []
    reports = [engine.capacity()]
    answers: list[tuple[int, ResumeList]] = []
    gone: list[str] = []
    now = 0.0
    while len(engine.served) + len(gone) < num_requests:
        now += 0.2
        engine.now = now
        engine.take_in()
        assert now < 100.0 * num_requests + 1000.0, "something is stuck"
        if to_come and rng.random() < 0.5:
            admission.submit(to_come.popleft(), now)
        if reports and rng.random() < 0.8:
            capacity = reports.pop(rng.randrange(len(reports)))
            admission.update(capacity, now)
            on_the_way += [release.request for release in admission.release(now)]
            answers.append((capacity.events_number, admission.take_resumes()))
        if answers and rng.random() < 0.8:
            number, resumes = answers.pop(rng.randrange(len(answers)))
            if not lossy or rng.random() < 0.9:
                engine.events.acknowledge(number)
                engine.answer(resumes)
        if on_the_way and rng.random() < 0.6:
            request = on_the_way.pop(rng.randrange(len(on_the_way)))
            if lossy and rng.random() < 0.1:
                gone.append(request.uid)
            else:
                engine.receive(request)
        engine.finish(rng)
        if engine.parked and rng.random() < 0.02:
            uid = rng.choice(sorted(engine.parked))
            engine.cancel(uid)
            gone.append(uid)
        if lossy and rng.random() < 0.02:
            gone += engine.die()
        reports.append(engine.capacity())
        if lossy and rng.random() < 0.3:
            reports.pop(rng.randrange(len(reports)))
    assert sorted([*engine.served, *gone], key=int) == [str(number) for number in range(num_requests)]
    for _ in range(3):  # what has ended is told in the end
        capacity = engine.capacity()
        admission.update(capacity, now)
        engine.events.acknowledge(capacity.events_number)
    assert admission.num_waiting == 0


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
    admission = an_admission(max_queue_size=1000)
    engine = FakeEngine(max_num_seqs, step_seconds)
    on_the_way: deque[Request] = deque()
    reports = deque([engine.capacity()])
    for number in range(100):
        engine.now = now = number * pause
        engine.take_in()
        admission.submit(a_request(str(number), priority=rng.randint(0, priorities), arrival=now), now)
        while reports and rng.random() < 0.5:
            admission.update(reports.popleft(), now)
        released = [release.request for release in admission.release(now)]
        assert [engine.rank(each) for each in released] == sorted(map(engine.rank, released))
        on_the_way += released
        while on_the_way and rng.random() < 0.5:
            engine.receive(on_the_way.popleft())
        excess = len(on_the_way) + len(engine.inbox) + len(engine.running) - max_num_seqs
        urgent = sum(each.priority > 0 for each in [*engine.running, *engine.inbox, *on_the_way])
        assert excess <= urgent
        assert len(on_the_way) + len(engine.inbox) <= 2 * max_num_seqs
        if rng.random() < 0.3:
            engine.finish(rng)
        reports.append(engine.capacity())
