"""The figures of a replay."""

from __future__ import annotations

import pytest

from fastserve.workload.replay_figures import replay_figures
from fastserve.workload.request_record import RequestRecord


def record(
    arrival: float, priority: int, first_token: float, completion: float, tokens: int
) -> RequestRecord:
    return RequestRecord(arrival, 0.001, first_token, completion, 5, tokens, priority, "", None)


def refused(arrival: float, priority: int, code: str, lateness: float = 0.0) -> RequestRecord:
    return RequestRecord(arrival, lateness, None, 0.5, 5, 0, priority, "", code)


RECORDS = [
    record(1.0, 0, 0.5, 2.0, 4),
    record(2.0, 0, 1.5, 9.0, 2),
    record(3.0, 5, 0.1, 1.0, 10),
    refused(4.0, 0, "UNAVAILABLE", lateness=0.3),
]


def test_each_class_has_its_row_the_most_urgent_first_and_all_come_last() -> None:
    top, rest, everything = replay_figures(RECORDS).classes
    assert [row.priority for row in (top, rest, everything)] == [5, 0, None]
    assert [(row.requests, row.served) for row in (top, rest, everything)] == [(1, 1), (3, 2), (4, 3)]
    assert rest.first_token_mean == pytest.approx(1.0)
    assert rest.first_token_p50 == pytest.approx(1.0)
    assert rest.first_token_p99 == pytest.approx(1.49)
    assert rest.completion_mean == pytest.approx(5.5)
    assert rest.completion_p99 == pytest.approx(8.93)
    assert rest.normalized_latency_mean == pytest.approx((2 / 4 + 9 / 2) / 2)


def test_tokens_count_over_the_time_from_the_first_due_to_the_last_end() -> None:
    """From 1.0 s to 2.0 + 9.0 s."""
    top, rest, everything = replay_figures(RECORDS).classes
    assert everything.tokens_per_second == pytest.approx(16 / 10)
    assert top.tokens_per_second + rest.tokens_per_second == pytest.approx(everything.tokens_per_second)


def test_refusals_are_counted_by_code_and_lateness_is_told() -> None:
    figures = replay_figures([*RECORDS, refused(5.0, 0, "UNAVAILABLE"), refused(5.0, 0, "INVALID_ARG")])
    assert figures.errors == {"UNAVAILABLE": 2, "INVALID_ARG": 1}
    assert figures.lateness.late == 1
    assert figures.lateness.largest == pytest.approx(0.3)
    assert figures.lateness.p50 == pytest.approx(0.001)


def test_a_class_of_which_nothing_was_served_has_no_latencies() -> None:
    row, _ = replay_figures([refused(0.0, 1, "UNAVAILABLE")]).classes
    assert row.served == 0
    assert row.first_token_mean is row.completion_p99 is row.normalized_latency_mean is None
    assert row.tokens_per_second == 0
