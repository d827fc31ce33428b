"""The engine's capacity, as it is published to the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from fastserve.scheduling.capacity import Ended, EngineCapacity, ReplicaCapacity, ResumeList
from fastserve.types import Resume

FIRST = ReplicaCapacity("a", 1, 2, 3, 100, 512, 1)


@pytest.fixture
def capacity(pb_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    publisher = module.CapacityPublisher(problems.append, after=lambda: None)
    yield publisher
    publisher.stop()
    problems.clear()


problems: list[str | None] = []


def capacities(pb_utils: Any, count: int) -> list[EngineCapacity]:
    """The messages that the scheduler was sent, when there are so many."""
    from fastserve.ensemble.messaging import message_of

    pb_utils.server.wait(lambda each: len(each.requests) >= count)
    assert {request.model_name() for request in pb_utils.server.requests} == {"scheduler"}
    return [message_of(request, "capacity", EngineCapacity) for request in pb_utils.server.requests]  # type: ignore[misc]


def publish(capacity: Any, replica: ReplicaCapacity = FIRST) -> None:
    capacity.publish(EngineCapacity(0, 0.0, [replica], block_size=16, max_model_len=2048))


def test_nothing_is_sent_before_the_server_is_up(capacity: Any, pb_utils: Any) -> None:
    publish(capacity)
    assert pb_utils.server.requests == []
    capacity.open()
    (published,) = capacities(pb_utils, 1)
    assert (published.replicas, published.block_size, published.max_model_len) == ([FIRST], 16, 2048)
    assert published.serial == 1
    assert published.time > 0


def test_what_comes_while_one_is_sent_is_joined(capacity: Any, pb_utils: Any) -> None:
    goes_on = threading.Event()

    def wait(request: Any) -> Any:
        assert goes_on.wait(20)
        return []

    pb_utils.server.answer = wait
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 1)
    for slots in range(10):
        publish(capacity, replace(FIRST, free_slots=slots))
    goes_on.set()
    assert [each.replicas[0].free_slots for each in capacities(pb_utils, 2)] == [3, 9]


def test_what_could_not_be_sent_is_sent_again(capacity: Any, pb_utils: Any) -> None:
    failures = [ValueError("broken"), pb_utils.TritonModelException("the scheduler is loading")]

    def fail(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return []

    pb_utils.server.answer = fail
    capacity.open()
    publish(capacity)
    assert [each.serial for each in capacities(pb_utils, 3)] == [1, 2, 3]


def test_one_that_can_never_send_reports_so(capacity: Any, pb_utils: Any) -> None:
    def fail(request: Any) -> Any:
        if len(pb_utils.server.requests) <= 6:
            raise ValueError("broken")
        return []

    pb_utils.server.answer = fail
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 7)
    capacity.stop()
    assert problems == ["the thread `capacity` keeps failing: ValueError: broken", None]


def test_what_has_not_changed_is_repeated_with_a_newer_time(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.02)
    capacity.open()
    publish(capacity)
    first, second = capacities(pb_utils, 2)[:2]
    assert second.time > first.time
    assert (second.serial, second.replicas) == (2, first.replicas)


def test_while_nobody_waits_changes_that_release_nothing_are_joined(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "QUIET_SECONDS", 0.3)
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 1)
    for blocks in range(10):
        publish(capacity, replace(FIRST, free_blocks=blocks))
    first, second = capacities(pb_utils, 2)
    assert second.replicas[0].free_blocks == 9
    assert second.time - first.time >= 0.3


@pytest.mark.parametrize("change", [{"free_blocks": 7}, {"free_slots": 7}])
def test_while_somebody_waits_every_change_is_sent_at_once(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "QUIET_SECONDS", 600.0)
    monkeypatch.setattr(module, "REPEAT_SECONDS", 600.0)
    assert capacity.take(ResumeList(0, [], num_waiting=1)) == []
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 1)
    publish(capacity, replace(FIRST, **change))
    assert capacities(pb_utils, 2)[1].replicas == [replace(FIRST, **change)]


def test_what_runs_again_is_taken_once_and_the_queue_hears_that_it_has_come(
    capacity: Any, pb_utils: Any
) -> None:
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 1)
    resumes = [Resume("a", 0)]
    assert capacity.take(ResumeList(1, resumes)) == resumes
    assert capacity.take(ResumeList(1, resumes)) == []
    publish(capacity)
    assert [each.resumes_seen for each in capacities(pb_utils, 2)] == [0, 1]


def test_what_must_not_be_lost_is_sent_at_once(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "QUIET_SECONDS", 600.0)
    monkeypatch.setattr(module, "REPEAT_SECONDS", 600.0)
    capacity.open()
    publish(capacity)
    capacities(pb_utils, 1)
    capacity.tell(Ended("a", 0))
    publish(capacity)
    assert capacities(pb_utils, 2)[1].events == [Ended("a", 0)]
