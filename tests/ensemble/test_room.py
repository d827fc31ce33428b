"""What the engine tells the scheduler of its room."""

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
    teller = module.CapacityPublisher(problems.append, after=lambda: None)
    yield teller
    teller.stop()
    problems.clear()


problems: list[str | None] = []


def capacities(pb_utils: Any, count: int) -> list[EngineCapacity]:
    """Those that the scheduler was told, when there are so many."""
    from fastserve.ensemble.tensors import message_of

    pb_utils.server.wait(lambda each: len(each.requests) >= count)
    assert {request.model_name() for request in pb_utils.server.requests} == {"scheduler"}
    return [message_of(request, "capacity", EngineCapacity) for request in pb_utils.server.requests]  # type: ignore[misc]


def tell(capacity: Any, *numbers: Any) -> None:
    from fastserve.ensemble.capacity_publisher import Numbers

    capacity.tell(Numbers(*numbers))


def test_nothing_is_told_before_the_server_is_up(capacity: Any, pb_utils: Any) -> None:
    tell(capacity, *FIRST)
    assert pb_utils.server.requests == []
    capacity.open()
    (told,) = capacities(pb_utils, 1)
    assert (told.incarnation, told.serial, told.received, told.arrived) == ("a", 1, 1, 2)
    assert (told.free_slots, told.lowest_key, told.max_model_len) == (3, None, 2048)
    assert told.time > 0


def test_what_comes_while_one_is_sent_is_joined(capacity: Any, pb_utils: Any) -> None:
    goes_on = threading.Event()

    def answer(request: Any) -> Any:
        assert goes_on.wait(20)
        return []

    pb_utils.server.answer = answer
    capacity.open()
    tell(capacity, *FIRST)
    capacities(pb_utils, 1)
    for slots in range(10):
        tell(capacity, "a", 1, 2, slots, None, 2048)
    goes_on.set()
    assert [each.free_slots for each in capacities(pb_utils, 2)] == [3, 9]


def test_what_could_not_be_told_is_told_again(capacity: Any, pb_utils: Any) -> None:
    failures = [ValueError("broken"), pb_utils.TritonModelException("the scheduler is loading")]

    def answer(request: Any) -> Any:
        if failures:
            raise failures.pop()
        return []

    pb_utils.server.answer = answer
    capacity.open()
    tell(capacity, *FIRST)
    assert [each.serial for each in capacities(pb_utils, 3)] == [1, 2, 3]


def test_one_that_can_never_tell_says_so(capacity: Any, pb_utils: Any) -> None:
    def answer(request: Any) -> Any:
        if len(pb_utils.server.requests) <= 6:
            raise ValueError("broken")
        return []

    pb_utils.server.answer = answer
    capacity.open()
    tell(capacity, *FIRST)
    capacities(pb_utils, 7)
    capacity.stop()
    assert problems == ["the thread `capacity` keeps failing: ValueError: broken", None]


def test_what_has_not_changed_is_repeated_with_a_newer_time(
    capacity: Any, pb_utils: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble import capacity_publisher as module

    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.02)
    capacity.open()
    tell(capacity, *FIRST)
    first, second = capacities(pb_utils, 2)[:2]
    assert second.time > first.time
    assert (second.serial, second.free_slots) == (2, first.free_slots)
