"""When a call is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_client import FastServeError
from fastserve_client.backoff import FIRST_DELAY, LONGEST_DELAY, LONGEST_RETRY_AFTER, Backoff
from fastserve_client.deadline import Deadline

UNAVAILABLE = FastServeError("UNAVAILABLE", "the queue is full")


@given(st.integers(0, 12))
def test_waits_double_up_to_the_longest_and_end(retries: int) -> None:
    waits = Backoff(retries, Deadline(None))
    for attempt in range(retries):
        longest = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY)
        assert longest / 2 <= waits.delay_after(UNAVAILABLE) <= longest
    with pytest.raises(FastServeError, match="the queue is full"):
        waits.delay_after(UNAVAILABLE)


def test_no_wait_beyond_the_deadline() -> None:
    with pytest.raises(FastServeError, match="the queue is full"):
        Backoff(2, Deadline(FIRST_DELAY / 4)).delay_after(UNAVAILABLE)


def over_quota(seconds: float) -> FastServeError:
    return FastServeError("UNAVAILABLE", f"tenant 'a' is over its quota; try again in {seconds:.3f} s")


def test_the_wait_that_the_server_asks_for_is_kept() -> None:
    delay = Backoff(1, Deadline(None)).delay_after(over_quota(20))
    assert 20 + FIRST_DELAY / 2 <= delay <= 20 + FIRST_DELAY


@pytest.mark.parametrize(("seconds", "timeout"), [(LONGEST_RETRY_AFTER + 1, None), (5.0, 5.0)])
def test_a_wait_that_is_too_long_is_the_callers(seconds: float, timeout: float | None) -> None:
    with pytest.raises(FastServeError) as caught:
        Backoff(2, Deadline(timeout)).delay_after(over_quota(seconds))
    assert caught.value.retry_after == seconds
