"""How many overtook a request, against counting them one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.scheduling import overtaking
from fastserve.scheduling.overtaking import OvertakingCounter


@given(st.lists(st.integers(0, 20)))
def test_those_are_counted_that_came_later_and_left_earlier(arrivals: list[int]) -> None:
    counter = OvertakingCounter()
    for place, arrival in enumerate(arrivals):
        expected = sum(earlier > arrival for earlier in arrivals[:place])
        assert counter.release(float(arrival)) == expected


def test_only_the_last_are_remembered() -> None:
    counter = OvertakingCounter()
    most = 2 * overtaking.MAX_REMEMBERED
    for arrival in range(most + 1):
        assert counter.release(float(arrival)) == 0
    assert counter.release(-1.0) == overtaking.MAX_REMEMBERED + 1
