"""Each policy by itself: its formula, its ties, whom it preempts, what time and service change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.conftest import POLICIES, a_view

from fastserve.config import Config, ConfigError
from fastserve.scheduling.policies.fair import MAX_IDLE_TENANTS, OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, Fair
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.policies.hrrn import BUCKETS_PER_DOUBLING, HRRN
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.policies.registry import POLICIES as NAMED
from fastserve.scheduling.policies.registry import make_policy
from fastserve.scheduling.policies.srpt import SRPT
from fastserve.scheduling.policies.strict_priority import StrictPriority
from fastserve.types import RequestView

weights = st.floats(0.001, 1000.0)
priorities = st.integers(-1000, 1000)
moments = st.floats(0.0, 1e6)
views = st.builds(
    a_view,
    uid=st.just("r"),
    priority=st.integers(-10, 10),
    arrival=st.floats(0.0, 1e4),
    tenant=st.sampled_from(["", "b", "c"]),
    num_prompt_tokens=st.integers(1, 5000),
    expected_output_tokens=st.integers(1, 5000),
)


# --- all of them


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(view=views, other=views, later=st.floats(0.0, 1e4))
def test_ranks_are_of_one_length_finite_and_never_preempt_their_like(
    name: str, view: RequestView, other: RequestView, later: float
) -> None:
    policy = POLICIES[name]()
    now = max(view.arrival, other.arrival) + later
    for each in (view, other):
        policy.on_enqueue(each, now)
    rank, other_rank = policy.rank(view, now), policy.rank(other, now)
    assert len(rank) == len(other_rank)
    assert all(map(math.isfinite, rank + other_rank))
    assert not policy.preempts(rank, rank)
    assert not (policy.preempts(rank, other_rank) and policy.preempts(other_rank, rank))
    assert not policy.preempts(rank, other_rank) or rank < other_rank


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(waiting=st.lists(views, min_size=2, max_size=2), later=st.floats(0.0, 1e3))
def test_a_group_keeps_its_order_until_a_change_is_announced(
    name: str, waiting: list[RequestView], later: float
) -> None:
    policy = POLICIES[name]()
    start = max(view.arrival for view in waiting)
    for view in waiting:
        policy.on_enqueue(view, start)
    first, second = sorted(waiting, key=lambda view: (policy.order(view, start), view.arrival))
    changes = [policy.next_change(view, start) for view in waiting]
    end = min([start + later, *(change for change in changes if change is not None)])
    now = math.nextafter(end, -math.inf) if end > start else start
    if policy.group(first) == policy.group(second):
        assert (policy.rank(first, now), first.arrival) <= (policy.rank(second, now), second.arrival)


def test_a_policy_says_how_it_ranks() -> None:
    with pytest.raises(NotImplementedError):
        Policy().rank(a_view(), 0.0)


# --- priority and age


@given(weights, weights, priorities, priorities, moments, st.floats(0.0, 1e6))
def test_a_request_is_overtaken_only_by_those_that_came_within_the_bound(
    alpha: float, beta: float, priority: int, other: int, arrival: float, later: float
) -> None:
    policy = PriorityAge(alpha, beta)
    gap = other - priority
    view = a_view(priority=priority, arrival=arrival)
    overtaker = a_view(priority=other, arrival=arrival + later)
    rounding = 1e-9 * (alpha * 1000 + beta * 2e6) / beta
    if policy.rank(overtaker, arrival + later) < policy.rank(view, arrival + later):
        assert later <= alpha * gap / beta + rounding
    elif later < alpha * gap / beta - rounding:
        raise AssertionError("a more urgent request within the bound should go first")


@given(weights, weights, priorities, priorities, moments, moments, st.floats(0.0, 1e6))
def test_the_rank_orders_requests_as_their_scores_do_at_any_moment(
    alpha: float, beta: float, priority: int, other: int, arrival: float, other_arrival: float, waited: float
) -> None:
    policy = PriorityAge(alpha, beta)
    now = max(arrival, other_arrival) + waited
    score_gap = alpha * (priority - other) + beta * ((now - arrival) - (now - other_arrival))
    [rank] = policy.rank(a_view(priority=priority, arrival=arrival), now)
    [other_rank] = policy.rank(a_view(priority=other, arrival=other_arrival), now)
    assert abs(score_gap - (other_rank - rank)) <= 1e-9 * (alpha * 2000 + beta * 4e6)


@given(priorities, moments, moments)
def test_neither_running_nor_being_preempted_changes_the_rank(
    priority: int, arrival: float, later: float
) -> None:
    policy = PriorityAge(10.0, 1.0)
    view = a_view(priority=priority, arrival=arrival)
    rank = policy.rank(view, arrival)
    view.waiting_since = None
    assert not policy.on_service(view, 100, 100, arrival + later)
    assert policy.rank(view, arrival + later) == rank
    view.waiting_since = arrival + later
    assert policy.rank(view, arrival + 2 * later) == rank
    assert policy.next_change(view, arrival) is None


# --- first come, first served; vLLM's priority; shortest remaining


def test_fcfs_goes_by_arrival_alone() -> None:
    early, late = a_view(arrival=1.0), a_view(arrival=2.0, priority=100, num_prompt_tokens=9)
    assert FCFS().rank(early, 5.0) < FCFS().rank(late, 5.0)


def test_strict_priority_goes_by_priority_then_by_arrival_and_preempts_nobody() -> None:
    policy = StrictPriority()
    ranks = [
        policy.rank(a_view(priority=priority, arrival=arrival), 9.0)
        for priority, arrival in ((2, 5.0), (1, 1.0), (1, 2.0))
    ]
    assert ranks == sorted(ranks)
    assert not policy.preempts(ranks[0], ranks[2])


def test_srpt_counts_what_is_left() -> None:
    policy = SRPT()
    view = a_view(num_prompt_tokens=30, expected_output_tokens=20)
    assert policy.rank(view, 0.0) == (50,)
    view.num_served_tokens = 35
    assert policy.on_service(view, 30, 5, 1.0)
    assert policy.rank(view, 1.0) == (15,)
    view.num_served_tokens = 60
    assert policy.rank(view, 2.0) == (1,)
    assert policy.preempts((1,), (2,))


# --- highest response ratio next


@given(views, st.floats(0.0, 1e5))
def test_hrrn_is_the_response_ratio_within_a_bucket(view: RequestView, waited: float) -> None:
    now = view.arrival + waited
    [rank] = HRRN().rank(view, now)
    exact = (now - view.arrival) / (view.num_prompt_tokens + view.expected_output_tokens)
    rounding = 2.0 ** (0.5 / BUCKETS_PER_DOUBLING)
    assert exact / rounding <= -rank * (1 + 1e-12)
    assert -rank <= exact * rounding * (1 + 1e-12)


def test_hrrn_lets_the_short_go_first_and_the_long_pass_them_in_time() -> None:
    long = a_view(num_prompt_tokens=1000, expected_output_tokens=1000)
    short = a_view(arrival=10.0, num_prompt_tokens=10, expected_output_tokens=10)
    assert HRRN().rank(short, 11.0) < HRRN().rank(long, 11.0)
    late = a_view(arrival=1100.0, num_prompt_tokens=10, expected_output_tokens=10)
    assert HRRN().rank(long, 1101.0) < HRRN().rank(late, 1101.0)
    assert not HRRN().preempts((-9.0,), (-1.0,))


# --- skip-join multi-level feedback queue

HALVES: dict[str, Any] = {"quantum": 32.0, "growth": 2.0, "num_levels": 8, "prompt_token_cost": 0.25}
"""Numbers with which prompts of ordinary lengths skip levels."""


@pytest.mark.parametrize(
    ("num_prompt_tokens", "level"), [(1, 0), (128, 0), (129, 1), (256, 1), (257, 2), (1024, 3), (10**6, 7)]
)
def test_mlfq_joins_where_the_quantum_covers_the_prompt(num_prompt_tokens: int, level: int) -> None:
    policy, view = MLFQ(**HALVES), a_view(num_prompt_tokens=num_prompt_tokens)
    policy.on_enqueue(view, 0.0)
    assert policy.rank(view, 0.0)[-1] == level
    needed = num_prompt_tokens * policy.prompt_token_cost
    assert needed <= policy.quantum * policy.growth**level or level == policy.num_levels - 1
    assert level == 0 or needed > policy.quantum * policy.growth ** (level - 1)


@given(
    num_prompt_tokens=st.integers(1, 4000),
    services=st.lists(st.tuples(st.integers(0, 512), st.integers(0, 64)), max_size=30),
)
def test_mlfq_goes_down_when_the_quantum_is_used_up(
    num_prompt_tokens: int, services: list[tuple[int, int]]
) -> None:
    policy, view = MLFQ(**HALVES), a_view(num_prompt_tokens=num_prompt_tokens)
    policy.on_enqueue(view, 0.0)
    view.waiting_since = None
    level, used = policy.rank(view, 0.0)[-1], 0.0
    for prompt, output in services:
        used += policy.prompt_token_cost * prompt + output
        changed = policy.on_service(view, prompt, output, 0.0)
        expected = level < 7 and used >= 32 * 2**level
        assert changed == expected
        if expected:
            level, used = level + 1, 0.0
        assert policy.rank(view, 0.0) == (1.0, 0, level)


def test_mlfq_orders_classes_then_levels_then_arrivals() -> None:
    policy = MLFQ(**HALVES)
    short, long = a_view(arrival=2.0), a_view(arrival=1.0, num_prompt_tokens=1000)
    urgent = a_view(arrival=3.0, priority=1, num_prompt_tokens=1000)
    assert policy.rank(urgent, 3.0) < policy.rank(short, 3.0) < policy.rank(long, 3.0)
    assert policy.preempts(policy.rank(short, 3.0), policy.rank(long, 3.0))
    assert policy.rank(short, 3.0) == policy.rank(a_view(arrival=1.0), 3.0)


def test_mlfq_the_starved_go_first_and_nobody_takes_their_turn() -> None:
    policy = MLFQ(**HALVES, starvation_seconds=60.0)
    starved = a_view("starved", priority=-5, num_prompt_tokens=200)
    policy.on_enqueue(starved, 0.0)
    later = a_view("later", priority=-9, arrival=1.0)
    urgent = a_view("urgent", priority=9, arrival=60.0)
    assert policy.next_change(starved, 0.0) == 60.0
    assert policy.rank(urgent, 59.0) < policy.rank(starved, 59.0)
    assert policy.rank(starved, 61.0) < policy.rank(later, 61.0) < policy.rank(urgent, 61.0)
    assert policy.next_change(starved, 61.0) is None
    policy.on_admit(starved, 61.0)
    starved.waiting_since = None
    for other in (later, urgent):
        assert not policy.preempts(policy.rank(other, 70.0), policy.rank(starved, 70.0))
    assert not policy.on_service(starved, 200, 13, 70.0), "the quantum of level 1 covers the prompt and more"
    assert policy.on_service(starved, 0, 1, 70.0)
    assert policy.rank(starved, 70.0) == (1.0, 5, 0.0)


def test_mlfq_starvation_is_counted_from_when_it_last_ran() -> None:
    policy = MLFQ(starvation_seconds=60.0)
    view = a_view(arrival=0.0)
    view.waiting_since = 50.0
    policy.on_enqueue(view, 50.0)
    assert policy.next_change(view, 50.0) == 110.0
    assert policy.rank(view, 109.0)[0] == 1.0
    assert policy.rank(view, 110.0) == (0.0, 50.0, 0.0)
    view.waiting_since = None
    assert policy.rank(view, 200.0)[0] == 1.0
    assert policy.next_change(view, 200.0) is None


def test_mlfq_one_that_lost_its_blocks_comes_back_before_newcomers() -> None:
    policy, view = MLFQ(**HALVES), a_view(num_prompt_tokens=300)
    policy.on_enqueue(view, 0.0)
    policy.on_service(view, 300, 200, 1.0)
    newcomer = a_view(arrival=1.0)
    assert policy.rank(newcomer, 1.0) < policy.rank(view, 1.0)
    policy.on_evict(view, 1.0)
    assert policy.rank(view, 1.0) < policy.rank(newcomer, 1.0)
    assert policy.rank(a_view(priority=1), 1.0) < policy.rank(view, 1.0)
    policy.on_service(view, 0, 1, 2.0)
    assert policy.rank(view, 2.0) == policy.rank(newcomer, 2.0)


def hinted(policy: MLFQ, expected: int, served: int = 0, **fields: Any) -> float:
    """The level of a request whose prompt is one token and whose hint is `expected`."""
    view = a_view(expected_output_tokens=expected, has_length_hint=True, **fields)
    policy.on_enqueue(view, 0.0)
    view.num_served_tokens = served
    return policy.rank(view, 0.0)[-1]


def test_mlfq_goes_by_what_a_hint_says_is_left() -> None:
    policy = MLFQ(quantum=32.0, growth=2.0, num_levels=8)
    assert hinted(policy, 256, served=1) == pytest.approx(3.0)
    assert hinted(policy, 256, served=1 + 128) == pytest.approx(2.0)
    assert hinted(policy, 256, served=1 + 240) == pytest.approx(-1.0)
    order = [hinted(policy, 20), hinted(policy, 40), hinted(policy, 300, served=100), hinted(policy, 300)]
    assert order == sorted(order)
    assert hinted(policy, 10) < policy.rank(a_view(), 0.0)[-1] < hinted(policy, 40)


def test_mlfq_one_that_outlives_its_hint_goes_on_as_if_it_had_had_none() -> None:
    policy = MLFQ(**HALVES)
    views = [a_view(has_length_hint=hint, expected_output_tokens=10) for hint in (True, False)]
    for view in views:
        policy.on_enqueue(view, 0.0)
        for served in range(1, 200):
            view.num_served_tokens = served
            policy.on_service(view, int(served == 1), int(served > 1), 0.0)
    assert policy.rank(views[0], 0.0) == policy.rank(views[1], 0.0)
    assert policy.rank(views[0], 0.0)[-1] > 0.0


@given(
    expected=st.integers(1, 300),
    num_prompt_tokens=st.integers(1, 300),
    num_output_tokens=st.integers(0, 600),
)
def test_mlfq_the_rank_becomes_no_worse_within_the_tokens_at_once(
    expected: int, num_prompt_tokens: int, num_output_tokens: int
) -> None:
    policy = MLFQ(**HALVES)
    view = a_view(num_prompt_tokens=num_prompt_tokens, expected_output_tokens=expected, has_length_hint=True)
    policy.on_enqueue(view, 0.0)
    view.waiting_since, view.num_served_tokens = None, num_prompt_tokens
    policy.on_service(view, num_prompt_tokens, 0, 0.0)
    at_once, best = policy.tokens_at_once(view), policy.rank(view, 0.0)
    for _ in range(num_output_tokens):
        if at_once == 0:
            at_once, best = policy.tokens_at_once(view), policy.rank(view, 0.0)
        view.num_served_tokens += 1
        policy.on_service(view, 0, 1, 0.0)
        at_once = None if at_once is None else at_once - 1
        assert at_once == 0 or policy.rank(view, 0.0) <= best


# --- fairness over tenants


def counter(policy: Fair, tenant: str) -> float:
    return policy.rank(a_view(tenant=tenant), 0.0)[-1]


@pytest.mark.parametrize(("tenant", "weight"), [("a", 1.0), ("b", 4.0)])
def test_fair_charges_the_prompt_once_on_admission_and_the_answer_as_it_comes(
    tenant: str, weight: float
) -> None:
    policy = Fair({"b": 4.0})
    view = a_view(tenant=tenant, num_prompt_tokens=100)
    policy.on_enqueue(view, 0.0)
    assert counter(policy, tenant) == 0.0
    policy.on_admit(view, 0.0)
    assert counter(policy, tenant) == 100 * PROMPT_TOKEN_COST / weight
    assert policy.on_service(view, 100, 10, 0.0)
    policy.on_tenant_service(tenant, 50, 5)
    charged = (100 * PROMPT_TOKEN_COST + 15 * OUTPUT_TOKEN_COST) / weight
    assert counter(policy, tenant) == charged
    view.num_served_tokens = 110
    policy.on_enqueue(view, 1.0)
    policy.on_admit(view, 1.0)
    assert counter(policy, tenant) == charged, "it was preempted and comes back"


def test_fair_the_tenant_served_least_goes_first_within_its_class() -> None:
    policy = Fair()
    policy.on_tenant_service("greedy", 0, 100)
    greedy, modest = a_view(tenant="greedy"), a_view(tenant="modest", arrival=9.0)
    urgent = a_view(tenant="greedy", arrival=9.0, priority=1)
    assert policy.rank(urgent, 9.0) < policy.rank(modest, 9.0) < policy.rank(greedy, 9.0)
    assert policy.preempts(policy.rank(urgent, 9.0), policy.rank(modest, 9.0))
    assert not policy.preempts(policy.rank(modest, 9.0), policy.rank(greedy, 9.0))


def test_fair_who_lost_its_blocks_goes_on_before_others_of_its_class_until_it_is_admitted() -> None:
    policy = Fair()
    policy.on_tenant_service("greedy", 0, 100)
    evicted, modest = a_view(tenant="greedy", arrival=1.0), a_view(tenant="modest")
    urgent, older = a_view(tenant="modest", priority=1), a_view(tenant="greedy")
    policy.on_evict(evicted, 2.0)
    policy.on_enqueue(evicted, 2.0)
    assert policy.rank(urgent, 2.0) < policy.rank(evicted, 2.0) < policy.rank(modest, 2.0)
    assert policy.order(evicted, 2.0) < policy.order(older, 2.0)
    assert not policy.preempts(policy.rank(evicted, 2.0), policy.rank(modest, 2.0))
    policy.on_admit(evicted, 3.0)
    assert policy.rank(modest, 3.0) < policy.rank(evicted, 3.0)


def test_fair_idleness_saves_up_nothing() -> None:
    policy = Fair()
    policy.on_tenant_service("busy", 0, 1000)
    policy.on_enqueue(a_view("1", tenant="busy"), 0.0)
    policy.on_enqueue(a_view("2", tenant="idle"), 0.0)
    assert counter(policy, "idle") == counter(policy, "busy")


def test_fair_when_nobody_waits_the_last_counter_is_what_counts() -> None:
    policy = Fair()
    view = a_view("1", tenant="busy")
    policy.on_enqueue(view, 0.0)
    policy.on_tenant_service("busy", 0, 1000)
    policy.on_abandon(view)
    policy.on_enqueue(a_view("2", tenant="idle"), 0.0)
    assert counter(policy, "idle") == 1000 * OUTPUT_TOKEN_COST


def test_fair_the_starved_go_first_and_take_nobodys_place() -> None:
    policy = Fair(starvation_seconds=60.0)
    starved, urgent = a_view(priority=-10, tenant="a"), a_view(arrival=50.0, priority=10, tenant="b")
    assert policy.rank(urgent, 59.9) < policy.rank(starved, 59.9)
    assert policy.preempts(policy.rank(urgent, 59.9), policy.rank(starved, 59.9))
    assert policy.rank(starved, 60.0) < policy.rank(urgent, 60.0)
    for one, other in ((starved, urgent), (urgent, starved)):
        assert not policy.preempts(policy.rank(one, 60.0), policy.rank(other, 60.0))
    assert policy.next_change(starved, 59.9) == 60.0


def test_fair_forgets_the_idle_but_neither_who_joins_nor_who_waits() -> None:
    policy = Fair()
    waits = a_view("waits", tenant="waits")
    policy.on_enqueue(waits, 0.0)
    for number in range(5 * MAX_IDLE_TENANTS):
        view = a_view(str(number), tenant=str(number), num_prompt_tokens=1 + number % 3)
        policy.on_enqueue(view, 0.0)
        assert str(number) in policy._counters
        policy.on_admit(view, 0.0)
    assert len(policy._counters) <= MAX_IDLE_TENANTS + 2
    policy.on_admit(waits, 0.0)
    assert counter(policy, "waits") == PROMPT_TOKEN_COST


def test_fair_counters_that_were_forgotten_would_have_been_lifted() -> None:
    policy = Fair()
    for number in range(5 * MAX_IDLE_TENANTS):
        view = a_view(str(number), tenant=str(number))
        policy.on_enqueue(view, 0.0)
        assert counter(policy, str(number)) == number * PROMPT_TOKEN_COST
        policy.on_admit(view, 0.0)


# --- by name


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (Config(), PriorityAge(10.0, 1.0)),
        (Config(policy="priority_age", alpha=3.0, beta=0.5), PriorityAge(3.0, 0.5)),
        (Config(policy="mlfq", starvation_seconds=7.0), MLFQ(starvation_seconds=7.0)),
    ],
)
def test_settings_choose_the_policy(config: Config, policy: Policy) -> None:
    assert make_policy(config) == policy


def test_every_name_has_its_class() -> None:
    kinds = {name: type(make_policy(Config(policy=name))) for name in NAMED}
    assert kinds == {"priority_age": PriorityAge, "fcfs": FCFS, "mlfq": MLFQ, "hrrn": HRRN, "fair": Fair}


def test_fair_is_told_weights_and_starvation() -> None:
    policy = make_policy(Config(policy="fair", tenant_weights={"b": 2.0}, starvation_seconds=7.0))
    assert isinstance(policy, Fair)
    policy.on_tenant_service("b", 0, 10)
    assert counter(policy, "b") == 10 * OUTPUT_TOKEN_COST / 2.0
    assert policy.rank(a_view(priority=-1), 7.0)[0] < policy.rank(a_view(priority=-1), 6.9)[0]


def own_policy(directory: Path, source: str) -> Config:
    (directory / "mine.py").write_text(source)
    return Config(policy=f"{directory}/mine.py:make", alpha=3.0, beta=0.5)


def test_a_policy_of_ones_own_is_loaded_from_its_file_and_told_the_settings(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
from dataclasses import dataclass
from fastserve.scheduling.policies.policy import Policy

@dataclass
class make(Policy):
    config: object

    def rank(self, view, now):
        return (2 * view.arrival - self.config.alpha * view.priority,)
"""
    policy = make_policy(own_policy(tmp_path, source))
    assert policy.rank(a_view(priority=2, arrival=1.5), 0.0) == (-3.0,)


def test_a_file_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Config(policy="mine.py:make").policy == f"{tmp_path}/mine.py:make"


@pytest.mark.parametrize("name", ["random", "srpt", ""])
def test_a_policy_of_no_known_name_is_refused(name: str) -> None:
    allowed = "allowed: priority_age, fcfs, mlfq, hrrn, fair, or FILE.py:NAME"
    with pytest.raises(ConfigError, match=f"got '{name}'; {allowed}"):
        make_policy(Config(policy=name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_file.py:make", "cannot be loaded: FileNotFoundError"),
        ("notes.txt:make", "is no Python file"),
        ("broken.py:make", "cannot be loaded: SyntaxError"),
        ("failing.py:make", "cannot be loaded: ZeroDivisionError"),
        ("failing.py:make:make", "is no Python file"),
        ("good.py:make", "has no class or function 'make'"),
        ("good.py:number", "has no class or function 'number'"),
        ("good.py:", "has no class or function ''"),
        ("good.py:rankless", r"SimpleNamespace gives no tuple of finite numbers.*has no attribute"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(")
    (tmp_path / "failing.py").write_text("1 / 0")
    (tmp_path / "good.py").write_text(
        "import types\nnumber = 3\ndef rankless(config): return types.SimpleNamespace()"
    )
    with pytest.raises(ConfigError, match=f"policy: got '{tmp_path}/{name}'.*{reason}"):
        make_policy(Config(policy=f"{tmp_path}/{name}"))


@pytest.mark.parametrize(
    "rank", ["(float('nan'),)", "(float('inf'),)", "None", "1.0", "('1',)", "(2.0 ** view.priority,)"]
)
def test_a_policy_whose_ranks_cannot_be_ordered_is_refused(rank: str, tmp_path: Path) -> None:
    """Of any priority that a request may have."""
    source = f"""
from fastserve.scheduling.policies.policy import Policy

class make(Policy):
    def __init__(self, config): pass
    def rank(self, view, now): return {rank} if view.priority > 0 else (0.0,)
"""
    with pytest.raises(
        ConfigError, match=r"make gives no tuple of finite numbers as the rank of .* 2147483647: "
    ):
        make_policy(msgspec.structs.replace(own_policy(tmp_path, source), priority_range=(0, 2**31 - 1)))


def test_a_policy_that_does_not_rank_is_refused(tmp_path: Path) -> None:
    source = """
from fastserve.scheduling.policies.policy import Policy

class make(Policy):
    def __init__(self, config): pass
"""
    with pytest.raises(ConfigError, match=r"make gives no tuple of finite numbers.*NotImplementedError"):
        make_policy(own_policy(tmp_path, source))
