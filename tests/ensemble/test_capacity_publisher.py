"""The engine's capacity, as it is published to the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve.types import EngineCapacity

FIRST = ("a", 1, 2, 3, None, 2048)


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


def publish(capacity: Any, *numbers: Any) -> None:
    incarnation, received, arrived, free_slots, lowest_key, max_model_len = numbers
    capacity.publish(
        EngineCapacity(incarnation, 0, received, arrived, free_slots, lowest_key, 0.0, max_model_len)
    )


def test_nothing_is_sent_before_the_server_is_up(capacity: Any, pb_utils: Any) -> None:
    publish(capacity, *FIRST)
    assert pb_utils.server.requests == []
    capacity.open()
    (published,) = capacities(pb_utils, 1)
    assert (published.incarnation, published.serial, published.received, published.arrived) == ("a", 1, 1, 2)
    assert (published.free_slots, published.lowest_key, published.max_model_len) == (3, None, 2048)
    assert published.time > 0


def test_what_comes_while_one_is_sent_is_joined(capacity: Any, pb_utils: Any) -> None:
    goes_on = threading.Event()

    def answer(request: Any) -> Any:
        assert goes_on.wait(20)
        return []

    pb_utils.server.answer = answer
    capacity.open()
    publish(capacity, *FIRST)
    capacities(pb_utils, 1)
    for slots in range(10):
        publish(capacity, "a", 1, 2, slots, None, 2048)
    goes_on.set()
    assert [each.free_slots for each in capacities(pb_utils, 2)] == [3, 9]


def test_what_could_not_be_sent_is_sent_again(capacity: Any, pb_utils: Any) -> None:
    failures = [ValueError("broken"), pb_utils.TritonModelException("the scheduler is loading")]

    def answer(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return []

    pb_utils.server.answer = answer
    capacity.open()
    publish(capacity, *FIRST)
    assert [each.serial for each in capacities(pb_utils, 3)] == [1, 2, 3]


def test_one_that_can_never_send_reports_so(capacity: Any, pb_utils: Any) -> None:
    def answer(request: Any) -> Any:
        if len(pb_utils.server.requests) <= 6:
            raise ValueError("broken")
        return []

    pb_utils.server.answer = answer
    capacity.open()
    publish(capacity, *FIRST)
    capacities(pb_utils, 7)
    capacity.stop()
    assert problems == ["the thread `capacity` keeps failing: ValueError: broken", None]


def test_what_has_not_changed_is_repeated_with_a_newer_time(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.02)
    capacity.open()
    publish(capacity, *FIRST)
    first, second = capacities(pb_utils, 2)[:2]
    assert second.time > first.time
    assert (second.serial, second.free_slots) == (2, first.free_slots)
