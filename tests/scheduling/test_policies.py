from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import Config
from fastserve.scheduling.policies import Fcfs, PriorityAge, make_policy

weights = st.floats(0.001, 1000.0)
priorities = st.integers(-1000, 1000)
moments = st.floats(0.0, 1e6)


@given(weights, weights, priorities, priorities, moments, st.floats(0.0, 1e6))
def test_a_request_is_overtaken_only_by_those_that_came_within_the_bound(
    alpha: float, beta: float, priority: int, other: int, arrival: float, later: float
) -> None:
    policy = PriorityAge(alpha, beta)
    gap = other - priority
    overtakes = policy.key(other, arrival + later) > policy.key(priority, arrival)
    rounding = 1e-9 * (alpha * 1000 + beta * 2e6) / beta
    if overtakes:
        assert later <= alpha * gap / beta + rounding
    elif later < alpha * gap / beta - rounding:
        raise AssertionError("a more urgent request within the bound should go first")


@given(weights, weights, priorities, priorities, moments, moments, st.floats(0.0, 1e6))
def test_the_key_orders_requests_as_their_scores_do_at_any_moment(
    alpha: float, beta: float, priority: int, other: int, arrival: float, other_arrival: float, waited: float
) -> None:
    policy = PriorityAge(alpha, beta)
    now = max(arrival, other_arrival) + waited
    score_gap = alpha * (priority - other) + beta * ((now - arrival) - (now - other_arrival))
    key_gap = policy.key(priority, arrival) - policy.key(other, other_arrival)
    assert abs(score_gap - key_gap) <= 1e-9 * (alpha * 2000 + beta * 4e6)


def test_fcfs_ignores_priority() -> None:
    assert Fcfs().key(0, 1.0) > Fcfs().key(100, 2.0)


def test_settings_choose_the_policy() -> None:
    assert make_policy(Config(policy="fcfs")) == Fcfs()
    assert make_policy(Config(policy="priority_age", alpha=3.0, beta=0.5)) == PriorityAge(3.0, 0.5)
