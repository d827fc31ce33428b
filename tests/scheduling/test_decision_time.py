"""How long a decision takes over 10,000 waiting and 256 running requests. `pytest -s` prints it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

from fastserve.config import Config
from fastserve.scheduling.admission import AdmissionQueue
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.capacity import EngineCapacity, ReplicaCapacity
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.registry import POLICIES
from fastserve.scheduling.policies.srpt import SRPT
from fastserve.scheduling.policies.strict_priority import StrictPriority
from fastserve.scheduling.sequence import Sequence
from fastserve.types import OutputOptions, Request, SamplingParams, view_of

NUM_WAITING, NUM_RUNNING, NUM_DECISIONS = 10_000, 256, 300
MILLISECOND = 1e-3
FACTORIES: dict[str, Callable[[], Policy]] = {
    **{name: (lambda make=make: make(Config())) for name, make in POLICIES.items()},  # type: ignore[misc]
    "srpt": SRPT,
    "strict_priority": StrictPriority,
}


def a_request(number: int) -> Request:
    return Request(
        uid=str(number),
        request_id="",
        prompt="",
        prompt_token_ids=[1] * (1 + number * 37 % 500),
        sampling=SamplingParams(max_tokens=1 + number * 61 % 700),
        output=OutputOptions(),
        priority=number * 7 % 11 - 5,
        tenant=f"tenant {number % 20}",
        arrival=number * 0.01,
        deadline=None,
    )


def capacity_of(serial: int, received: int, num_running: int) -> EngineCapacity:
    replica = ReplicaCapacity("one", received, received, NUM_RUNNING - num_running, 10_000, 400, num_running)
    return EngineCapacity(serial, 1e3 + serial, [replica], block_size=16)


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


@pytest.mark.parametrize("policy", FACTORIES)
def test_the_queue_releases_one_of_10000_in_under_a_millisecond(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message of the engine's comes, with one free slot, and one is released."""
    queue = AdmissionQueue(FACTORIES[policy](), NUM_WAITING, 0.0)
    for number in range(NUM_WAITING):
        queue.submit(a_request(number), number * 0.01)
    taken, now = [], 200.0
    for number in range(1, NUM_DECISIONS + 1):
        now += 0.05
        start = time.thread_time()
        queue.update(capacity_of(number, number - 1, NUM_RUNNING - 1), now)
        released = queue.release(now)
        taken.append(time.thread_time() - start)
        assert len(released) == 1
    with capsys.disabled():
        print(f"\n{policy}: one of {NUM_WAITING} released in {1e6 * p99(taken):.0f} us (p99)", end=" ")
    assert p99(taken) < MILLISECOND


@pytest.mark.parametrize("policy", FACTORIES)
def test_a_batch_of_256_is_planned_in_under_a_millisecond(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = BlockPool(NUM_RUNNING * 80, 16, True)
    scheduler = IterationScheduler(pool, FACTORIES[policy](), NUM_RUNNING, 4096)
    for number in range(NUM_RUNNING):
        request = a_request(number)
        scheduler.add(Sequence(request, 0, view_of(request), list(request.prompt_token_ids)), 10.0)
    taken, now = [], 200.0
    for _ in range(NUM_DECISIONS):
        now += 0.05
        start = time.thread_time()
        plan = scheduler.plan(now)
        taken.append(time.thread_time() - start)
        sampled = [item.sequence for item in plan.scheduled if item.is_last_chunk]
        scheduler.mark_computed(plan, now)
        for sequence in sampled:
            sequence.token_ids.append(7)
    assert scheduler.num_running == NUM_RUNNING
    steady = taken[50:]
    with capsys.disabled():
        print(f"\n{policy}: a batch of {NUM_RUNNING} planned in {1e6 * p99(steady):.0f} us (p99)", end=" ")
    assert p99(steady) < MILLISECOND
