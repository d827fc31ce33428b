from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.scheduling.conftest import a_request, sequences_of

from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.fcfs import FCFS
from fastserve.scheduling.token_budget import MIN_PROMPT_TOKENS, TokenBudget


def a_budget(target: float) -> TokenBudget:
    """20 ms a step and 1 ms for each prompt token, as it has learned; 512 tokens at most."""
    budget = TokenBudget(512, target)
    budget.observe(0, 0.02)
    budget.observe(100, 0.12)
    return budget


@pytest.mark.parametrize(
    ("target", "num_decodes", "tokens"),
    [
        (0.0, 8, 512),
        (0.07, 0, 512),
        (0.07, 8, 8 + 50),
        (0.07, 1, 1 + 50),
        (0.021, 8, 8 + MIN_PROMPT_TOKENS),
        (0.001, 8, 8 + MIN_PROMPT_TOKENS),
        (9.0, 8, 512),
    ],
)
def test_as_many_prompt_tokens_as_the_target_leaves_time_for(
    target: float, num_decodes: int, tokens: int
) -> None:
    assert a_budget(target).tokens(num_decodes) == tokens


def test_nothing_is_limited_before_a_prompt_was_computed() -> None:
    budget = TokenBudget(512, 0.01)
    budget.observe(0, 0.02)
    assert budget.tokens(4) == 512


def test_it_follows_what_steps_take() -> None:
    budget = a_budget(0.07)
    for _ in range(50):
        budget.observe(0, 0.05)
        budget.observe(10, 0.07)
    assert budget.prompt_token_seconds == pytest.approx(0.002, rel=0.01)
    assert budget.tokens(8) in (8 + 16, 8 + MIN_PROMPT_TOKENS)


@given(seconds=st.floats(1e-4, 1.0), before=st.floats(1e-4, 1.0), count=st.integers(1, 200))
def test_many_steps_at_once_are_as_one_after_another(seconds: float, before: float, count: int) -> None:
    at_once, one_by_one = TokenBudget(512), TokenBudget(512)
    for budget in (at_once, one_by_one):
        budget.observe(50, before)
    at_once.observe(50, seconds, count)
    for _ in range(count):
        one_by_one.observe(50, seconds)
    assert at_once.prompt_token_seconds == pytest.approx(one_by_one.prompt_token_seconds)


def test_a_long_prompt_delays_the_streams_that_run_no_longer_than_the_target() -> None:
    """Steps that take 10 ms and 1 ms for each prompt token; the target is 40 ms."""
    scheduler = IterationScheduler(BlockPool(512, 16, True), FCFS(), 8, 512, target_itl_seconds=0.04)
    waits, longest = [], 0.0
    for uid, num_tokens in (("learned", 64), ("stream", 8), ("long", 1000)):
        [sequence] = sequences_of(a_request(uid, prompt=list(range(num_tokens)), max_tokens=200))
        scheduler.add(sequence, 0.0)
        for _ in range(100 if uid == "long" else 4):
            plan = scheduler.plan(0.0)
            seconds = 0.01 + 0.001 * plan.num_prompt_tokens
            if uid == "long" and sequence.num_generated_tokens == 0:
                waits.append(seconds)
                assert len(plan.scheduled) == 3, "those that run get their tokens meanwhile"
            scheduler.observe(plan, seconds)
            scheduler.mark_computed(plan, 0.0)
            for item in plan.scheduled:
                if item.sequence.num_computed_tokens == item.sequence.num_tokens:
                    item.sequence.token_ids.append(7)
    longest = max(waits)
    assert 0.03 < longest < 0.045
    assert sequence.num_generated_tokens > 0


def test_blocks_are_swapped_only_while_that_is_cheaper_than_computing_them_again() -> None:
    pool = BlockPool(8, 16, True, num_host_blocks=4)
    pool.host.copy_seconds = 0.001
    scheduler = IterationScheduler(pool, FCFS(), 8, 512)
    [sequence] = sequences_of(a_request("a", prompt=list(range(100)), max_tokens=20))
    scheduler.add(sequence, 0.0)
    plan = scheduler.plan(0.0)
    scheduler.observe(plan, 100 * 0.001)  # 16 ms a block
    pool.host.put(b"dear", 0)
    assert b"dear" in pool.host
    for _ in range(50):
        scheduler.observe(plan, 100 * 0.0001)  # 1.6 ms a block, 2 ms to copy it twice
    pool.host.put(b"cheap", 1)
    assert b"cheap" not in pool.host
