from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.scheduling.conftest import POLICIES, a_request, sequences_of

from fastserve.scheduling.batch_report import free_blocks, lowest_running
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.block_tables import RESERVED_TOKENS, CacheTooSmallError
from fastserve.scheduling.iteration_scheduler import (
    IterationScheduler,
    SchedulerError,
)
from fastserve.scheduling.policies.mlfq import MLFQ
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.priority_age import PriorityAge
from fastserve.scheduling.sequence import Sequence, StepPlan
from fastserve.scheduling.token_budget import order_of
from fastserve.types import RequestView

POLICY = PriorityAge(alpha=10.0, beta=1.0)


def some(uid: str, prompt: list[int], **fields: Any) -> list[Sequence]:
    """All `n` sequences of a request, for which no room is kept: the client's hint is an empty answer."""
    sequences = sequences_of(a_request(uid, prompt, **fields))
    for sequence in sequences:
        sequence.view.expected_output_tokens = 0
    return sequences


def a_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    prefix_caching: bool = True,
    num_host_blocks: int = 0,
    policy: Policy = POLICY,
) -> IterationScheduler:
    pool = BlockPool(num_blocks, block_size, prefix_caching, num_host_blocks)
    return IterationScheduler(pool, policy, max_num_seqs, max_num_batched_tokens)


def add(scheduler: IterationScheduler, sequences: list[Sequence], now: float = 0.0) -> list[Sequence]:
    for sequence in sequences:
        scheduler.add(sequence, now)
    return sequences


def chunks(plan: StepPlan) -> list[tuple[str, int]]:
    return [(item.sequence.request.uid, item.num_tokens) for item in plan.scheduled]


def step(scheduler: IterationScheduler, token: int = 7, now: float = 0.0) -> StepPlan:
    """Plans and computes; every sequence that reached its end gets `token`."""
    plan = scheduler.plan(now)
    ended = [item.sequence for item in plan.scheduled if item.is_last_chunk]
    scheduler.mark_computed(plan, now)
    for sequence in ended:
        sequence.token_ids.append(token)
    return plan


# --- the budget


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = a_scheduler()
    add(scheduler, some("short", [1, 2, 3]))
    assert chunks(step(scheduler)) == [("short", 3)]
    add(scheduler, some("long", list(range(40)), priority=1))
    assert chunks(step(scheduler)) == [("short", 1), ("long", 15)]
    assert chunks(step(scheduler)) == [("short", 1), ("long", 15)]
    assert chunks(step(scheduler)) == [("short", 1), ("long", 10)]
    assert chunks(step(scheduler)) == [("long", 1), ("short", 1)]


def test_prompts_share_the_budget_by_key() -> None:
    scheduler = a_scheduler()
    add(scheduler, some("low", list(range(40))))
    step(scheduler)
    add(scheduler, some("high", list(range(50, 60)), priority=1))
    add(scheduler, some("lower", list(range(70, 80)), priority=-1))
    assert chunks(step(scheduler)) == [("high", 10), ("low", 6)]
    assert chunks(step(scheduler)) == [("high", 1), ("low", 15)]
    assert chunks(step(scheduler)) == [("high", 1), ("low", 3), ("lower", 10)]


def test_a_budget_in_which_a_full_batch_could_not_decode_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`max_num_batched_tokens`: got 3; allowed: at least `max_num_seqs`, 4"
    ):
        a_scheduler(max_num_seqs=4, max_num_batched_tokens=3)


# --- room for proposed tokens


def test_proposed_tokens_get_blocks_that_nobody_needs() -> None:
    scheduler = a_scheduler(num_blocks=6, block_size=4)
    first, second = add(scheduler, [*some("first", [1, 2, 3]), *some("second", [4, 5, 6])])
    step(scheduler)
    scheduler.plan(0.0)
    assert scheduler.reserve(first, 5) == 5
    assert (len(first.block_table), scheduler.pool.num_free) == (3, 2)
    assert scheduler.reserve(second, 5) == 0  # the two that are left may be wanted next
    assert scheduler.reserve(first, 20) == 8
    scheduler.check()
    scheduler.remove("first", now=0.0)
    assert scheduler.reserve(second, 3) == 3
    assert scheduler.reserve(second, 20) == 16
    scheduler.remove("second", now=0.0)
    assert scheduler.pool.num_used == 0


def test_proposed_tokens_take_no_block_of_a_preempted_sequence() -> None:
    scheduler = a_scheduler(num_blocks=6, block_size=4, max_num_seqs=1)
    [low] = add(scheduler, some("low", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    step(scheduler)
    [high] = add(scheduler, some("high", [10, 11, 12], priority=1))
    assert step(scheduler).preempted == [low]
    assert scheduler.reserve(high, 20) == 4  # of three free blocks that "low" has not left one may be wanted
    scheduler.check()


# --- slots and preemption


def test_a_higher_key_takes_a_slot_from_the_lowest_at_the_next_step() -> None:
    scheduler = a_scheduler(max_num_seqs=2)
    [low] = add(scheduler, some("low", [1]))
    [middle] = add(scheduler, some("middle", [1], priority=1))
    step(scheduler)
    add(scheduler, some("high", [1], priority=2))
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1), ("middle", 1)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (2, 1, 1)
    assert (scheduler.free_slots, lowest_running(scheduler, 1)) == (-1, [middle])
    assert (low.token_ids, low.num_computed_tokens, low.block_table) == ([1, 7], 0, [])
    scheduler.remove("high", now=0.0)
    assert chunks(step(scheduler)) == [("middle", 1), ("low", 1)]


def test_it_does_so_when_decodes_use_up_the_budget() -> None:
    scheduler = a_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    [a] = add(scheduler, some("a", [1], arrival=0.0))
    [b] = add(scheduler, some("b", [1], arrival=1.0))
    step(scheduler)
    add(scheduler, some("high", [1, 2], priority=9))
    plan = step(scheduler)
    assert plan.preempted == [b]
    assert chunks(plan) == [("a", 1), ("high", 1)]
    assert a.num_generated_tokens == 2


def test_an_equal_key_takes_nothing() -> None:
    scheduler = a_scheduler(max_num_seqs=1)
    add(scheduler, some("first", [1]))
    step(scheduler)
    add(scheduler, some("second", [1]))
    assert step(scheduler).preempted == []
    assert scheduler.num_waiting == 1


def test_a_higher_key_takes_blocks_of_as_many_as_it_needs() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    for priority, token in enumerate((10, 20, 30)):
        add(scheduler, some(f"p{priority}", [token] * 3, priority=priority))
    step(scheduler)
    add(scheduler, some("high", [40] * 9, priority=9))
    plan = step(scheduler)
    assert [each.request.uid for each in plan.preempted] == ["p0", "p1"]
    assert chunks(plan) == [("p2", 1), ("high", 9)]


def test_nobody_leaves_where_that_would_not_suffice() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    add(scheduler, some("low", [10] * 3, priority=0))
    add(scheduler, some("top", [20] * 8, priority=9))
    step(scheduler)
    add(scheduler, some("large", [30] * 7, priority=5))
    plan = scheduler.plan(0.0)
    assert plan.preempted == []
    assert chunks(plan) == [("top", 1), ("low", 1)]
    assert scheduler.num_waiting == 1


def test_blocks_that_a_newcomer_shares_are_not_counted_as_won() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    add(scheduler, some("low", prompt))
    step(scheduler)
    add(scheduler, some("other", [9], priority=9))
    step(scheduler)
    [high] = add(scheduler, some("high", [*prompt[:4], 8, 8, 8, 8, 8], priority=5))
    plan = step(scheduler)
    assert [each.request.uid for each in plan.preempted] == ["low"]
    assert (high.num_cached_tokens, len(high.block_table)) == (4, 3)
    scheduler.check()


def test_nobody_leaves_for_blocks_that_a_newcomer_shares_with_it() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    [low] = add(scheduler, some("low", [1, 2, 3, 4, 5]))
    add(scheduler, some("top", [9], priority=9))
    step(scheduler)
    add(scheduler, some("high", [1, 2, 3, 4, *[8] * 9], priority=5))
    plan = step(scheduler)
    assert plan.preempted == []
    assert len(low.block_table) == 2
    scheduler.check()


def test_of_equal_keys_the_earlier_arrival_ranks_first() -> None:
    scheduler = a_scheduler()
    add(scheduler, some("late", [1] * 20, priority=1, arrival=10.0))
    step(scheduler)
    add(scheduler, some("early", [2] * 10, priority=0, arrival=0.0))
    assert chunks(step(scheduler)) == [("early", 10), ("late", 4)]


def test_a_lower_key_does_not_pass_one_that_waits_for_blocks() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    add(scheduler, some("top", [10] * 8, priority=9))
    step(scheduler)
    add(scheduler, some("large", [30] * 8, priority=5))
    add(scheduler, some("small", [40], priority=0))
    assert chunks(step(scheduler)) == [("top", 1)]
    scheduler.remove("top", now=0.0)
    assert chunks(step(scheduler)) == [("small", 1), ("large", 8)]


def test_a_decode_without_a_block_preempts_the_lowest() -> None:
    scheduler = a_scheduler(num_blocks=3, max_num_batched_tokens=64)
    [high] = add(scheduler, some("high", [10] * 4, priority=1))
    [low] = add(scheduler, some("low", [20] * 5))
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1)]
    assert len(high.block_table) == 2


def test_a_decode_without_a_block_may_be_the_lowest_itself() -> None:
    scheduler = a_scheduler(num_blocks=3, max_num_batched_tokens=64)
    add(scheduler, some("high", [10] * 5, priority=1))
    [low] = add(scheduler, some("low", [20] * 4))
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1)]
    assert low.token_ids == [20] * 4 + [7]


def test_a_resume_finds_its_blocks_and_is_no_prefix_hit() -> None:
    scheduler = a_scheduler(max_num_seqs=1)
    [low] = add(scheduler, some("low", list(range(9))))
    step(scheduler)
    add(scheduler, some("high", [50], priority=1))
    step(scheduler)
    scheduler.remove("high", now=0.0)
    assert chunks(step(scheduler)) == [("low", 1)]
    assert (low.num_cached_tokens, scheduler.num_prefix_cache_hit_tokens) == (0, 0)


def test_what_can_never_fit_is_refused() -> None:
    scheduler = a_scheduler(num_blocks=2)
    with pytest.raises(CacheTooSmallError, match="has 9 tokens and needs 3 KV blocks; the cache has 2"):
        add(scheduler, some("r", [1] * 9))
    assert (scheduler.num_waiting, scheduler.remove("r", now=0.0)) == (0, [])


def test_what_outgrows_the_cache_is_named_and_can_be_removed() -> None:
    scheduler = a_scheduler(num_blocks=1)
    [sequence] = add(scheduler, some("r", [1] * 4))
    step(scheduler)
    with pytest.raises(CacheTooSmallError) as caught:
        scheduler.plan(0.0)
    assert caught.value.sequence is sequence
    assert scheduler.remove("r", now=0.0) == [sequence]
    assert step(scheduler) == StepPlan([], [])
    scheduler.pool.check([])


# --- prefixes


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = a_scheduler()
    prompt = list(range(10))
    [first] = add(scheduler, some("first", prompt))
    step(scheduler)
    [second] = add(scheduler, some("second", prompt))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 2)]
    assert second.block_table[:2] == first.block_table[:2]
    assert (second.num_cached_tokens, scheduler.num_prefix_cache_hit_tokens) == (8, 8)


def test_the_last_token_is_always_computed() -> None:
    scheduler = a_scheduler()
    add(scheduler, some("first", list(range(8))))
    step(scheduler)
    [second] = add(scheduler, some("second", list(range(8))))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 4)]
    assert second.num_cached_tokens == 4


def test_an_answer_is_cached_too() -> None:
    scheduler = a_scheduler()
    [first] = add(scheduler, some("first", [1, 2, 3]))
    for _ in range(6):
        step(scheduler)
    scheduler.remove("first", now=0.0)
    [second] = add(scheduler, some("second", first.token_ids))
    step(scheduler)
    assert second.num_cached_tokens == 8


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    scheduler = a_scheduler()
    add(scheduler, some("first", list(range(10))))
    step(scheduler)
    add(scheduler, some("second", list(range(10)), prompt_logprobs=0))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 10)]


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    scheduler = a_scheduler(max_num_batched_tokens=8)
    siblings = add(scheduler, some("r", list(range(10)), n=3))
    assert chunks(step(scheduler)) == [("r", 8)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.free_slots) == (1, 2, 1)
    assert chunks(step(scheduler)) == [("r", 2)]
    assert chunks(step(scheduler)) == [("r", 1), ("r", 2), ("r", 2)]
    assert all(each.block_table[:2] == siblings[0].block_table[:2] for each in siblings)
    assert len({each.block_table[2] for each in siblings}) == 3


def test_siblings_do_not_wait_for_one_that_is_gone() -> None:
    scheduler = a_scheduler()
    siblings = add(scheduler, some("r", [1, 2], n=3))
    assert scheduler.remove("r", 0, now=0.0) == siblings[:1]
    assert scheduler.remove("r", 2, now=0.0) == siblings[2:]
    assert [item.sequence for item in step(scheduler).scheduled] == siblings[1:2]


@pytest.mark.parametrize(
    ("prefix_caching", "sampling"),
    [(False, {"n": 2}), (True, {"n": 2, "prompt_logprobs": 1})],
)
def test_siblings_that_have_nothing_to_share_do_not_wait(
    prefix_caching: bool, sampling: dict[str, int]
) -> None:
    scheduler = a_scheduler(prefix_caching=prefix_caching)
    add(scheduler, some("r", [1, 2], **sampling))
    assert chunks(step(scheduler)) == [("r", 2), ("r", 2)]


# --- coming and going


def test_a_sequence_is_added_once() -> None:
    scheduler = a_scheduler()
    [sequence] = add(scheduler, some("r", [1]))
    with pytest.raises(ValueError, match="sequence 0 of request r was added already"):
        scheduler.add(sequence, 0.0)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_removed_request_leaves_nothing_behind(steps: int) -> None:
    scheduler = a_scheduler(max_num_batched_tokens=4)
    siblings = add(scheduler, some("r", list(range(6)), n=2))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.remove("r", now=0.0) == siblings
    assert scheduler.remove("r", now=0.0) == []
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.free_slots) == (0, 0, 4)
    assert lowest_running(scheduler, 4) == []
    scheduler.pool.check([])


def test_two_that_outrank_each_other_once_admitted_do_not_take_turns_for_ever() -> None:
    class Generous(Policy):
        """Whoever waits ranks before whoever runs."""

        def rank(self, view: RequestView, now: float) -> tuple[float, ...]:
            return (0.0 if view.waiting_since is not None else 1.0,)

    scheduler = a_scheduler(max_num_seqs=1, policy=Generous())
    [first] = add(scheduler, some("first", [1]))
    [second] = add(scheduler, some("second", [1], arrival=1.0))
    assert [step(scheduler).preempted for _ in range(3)] == [[first], [second], [first]]


def test_what_was_preempted_is_not_computed_again_while_the_cache_keeps_it() -> None:
    for prefix_caching in (True, False):
        scheduler = a_scheduler(max_num_seqs=1, max_num_batched_tokens=7, prefix_caching=prefix_caching)
        [low] = add(scheduler, some("low", list(range(30))))
        for number in range(8):
            step(scheduler)
            add(scheduler, some(f"high{number}", [50], priority=1))
            assert step(scheduler).preempted == [low]
            assert scheduler.take_waiting() == [low]
            scheduler.remove(f"high{number}", now=0.0)
            add(scheduler, [low])
        assert low.num_generated_tokens == 4
        assert scheduler.num_recomputed_tokens == 0


def test_what_host_memory_keeps_is_copied_back() -> None:
    scheduler = a_scheduler(num_blocks=3, max_num_seqs=1, num_host_blocks=3)
    [low] = add(scheduler, some("low", list(range(10))))
    step(scheduler)
    add(scheduler, some("high", list(range(50, 60)), priority=1))
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert sorted(target for _, target in plan.copies_out) == [0, 1, 2]
    scheduler.remove("high", now=0.0)
    plan = step(scheduler)
    assert chunks(plan) == [("low", 1)]
    assert {block for _, block in plan.copies_in} == set(low.block_table)
    assert plan.copies_out == [], "its own blocks are not pushed out by what makes room for them"
    assert scheduler.num_recomputed_tokens == 0


def test_blocks_that_come_back_with_a_sequence_are_not_counted_as_blocks_of_others() -> None:
    """A policy that preempts only where all blocks find room lets it take its place again."""
    scheduler = a_scheduler(
        num_blocks=11, block_size=1, max_num_seqs=1, prefix_caching=False, num_host_blocks=1, policy=MLFQ()
    )
    [middle] = add(scheduler, sequences_of(a_request("middle", [1] * 5, max_tokens=6, priority=1)))
    step(scheduler)
    add(scheduler, some("high", [2], priority=2))
    assert step(scheduler).preempted == [middle]
    assert scheduler.take_waiting() == [middle]
    scheduler.remove("high", now=0.0)
    [low] = add(scheduler, sequences_of(a_request("low", [3] * 3, max_tokens=2)))
    step(scheduler)
    add(scheduler, [middle])
    plan = step(scheduler)
    assert (plan.preempted, chunks(plan)) == ([low], [("middle", 1)])


def test_prompt_logprobs_of_a_preempted_prompt_come_from_its_own_tokens() -> None:
    scheduler = a_scheduler(max_num_seqs=1, max_num_batched_tokens=10)
    [low] = add(scheduler, some("low", list(range(20)), prompt_logprobs=0))
    assert chunks(step(scheduler)) == [("low", 10)]
    add(scheduler, some("high", list(range(20)), priority=1))
    step(scheduler)
    step(scheduler)
    scheduler.remove("high", now=0.0)
    assert chunks(step(scheduler)) == [("low", 10)]
    assert low.num_computed_tokens == 20


def test_without_prefix_caching_a_resume_finds_its_own_blocks_alone() -> None:
    scheduler = a_scheduler(max_num_seqs=2, prefix_caching=False)
    siblings = add(scheduler, some("r", list(range(8)), n=2))
    step(scheduler)
    add(scheduler, some("high", [50], priority=1) + some("higher", [60], priority=2))
    assert set(step(scheduler).preempted) == set(siblings)
    for uid in ("high", "higher"):
        scheduler.remove(uid, now=0.0)
    assert chunks(step(scheduler)) == [("r", 1), ("r", 1)]
    assert not set(siblings[0].block_table) & set(siblings[1].block_table)
    assert scheduler.num_recomputed_tokens == 0


def test_siblings_go_with_the_first_that_is_taken_out() -> None:
    scheduler = a_scheduler(max_num_seqs=1, max_num_batched_tokens=4)
    siblings = add(scheduler, some("r", list(range(10)), n=3))
    step(scheduler)
    assert scheduler.take_waiting() == []
    add(scheduler, some("high", [50], priority=1))
    assert step(scheduler).preempted == siblings[:1]
    assert scheduler.take_waiting() == siblings
    assert (scheduler.num_waiting, scheduler.remove("r", now=0.0)) == (0, [])
    scheduler.check()
    elsewhere = a_scheduler()
    add(elsewhere, siblings[1:])
    assert chunks(step(elsewhere)) == [("r", 10), ("r", 6)]


def test_room_is_kept_for_the_next_tokens_of_those_that_run() -> None:
    num_kept = (9 + RESERVED_TOKENS + 3) // 4
    scheduler = a_scheduler(num_blocks=num_kept + 1, block_size=4, max_num_batched_tokens=64)
    runs = add(scheduler, sequences_of(a_request("runs", [1] * 8, max_tokens=1000)))
    step(scheduler)
    assert free_blocks(scheduler) == 1
    add(scheduler, some("waits", [2] * 9))
    assert step(scheduler).preempted == []
    assert scheduler.num_waiting == 1
    scheduler.remove("waits", now=0.0)
    add(scheduler, some("fits", [3] * 4))
    assert chunks(step(scheduler)) == [("runs", 1), ("fits", 4)]
    assert runs[0].num_generated_tokens == 3


def test_check_notices_a_sequence_in_no_queue() -> None:
    scheduler = a_scheduler()
    [sequence] = add(scheduler, some("r", [1]))
    scheduler._waiting.remove("r")
    with pytest.raises(SchedulerError, match="1 sequences are in no queue, 0 in more"):
        scheduler.check()
    scheduler._waiting.push(sequence, sequence.view, 0.0)
    sequence.view.waiting_since = None
    with pytest.raises(SchedulerError, match="counts as waiting that runs"):
        scheduler.check()


# --- against a model that shows what it reads


def true_next_token(token_ids: list[int], index: int) -> int:
    """What the fake model says: few different tokens, so that many requests share prefixes."""
    return (sum((place + 1) * token for place, token in enumerate(token_ids)) + index) % 2


def true_answer(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt_token_ids)
    for _ in range(sequence.request.sampling.max_tokens):
        tokens.append(true_next_token(tokens, sequence.index))
    return tokens


Cells = dict[int, dict[int, tuple[int, ...]]]
"""By block and place in it, the prefix up to the token whose keys and values are there."""


class BatchMachine(RuleBasedStateMachine):
    """Random requests, cancels and steps over a tiny cache whose cells hold the prefix they came from.

    What a cell holds stands for keys and values: they depend on every token up to their own. A sequence that
    reads, at any position, a cell that was not computed from precisely its own prefix would answer wrongly.
    Host memory has such cells too, and a plan's copies move what they hold. With `takes_waiting`, what waits
    is taken out after every plan, as the worker does, and comes back when the machine says.
    """

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.block_size = data.draw(st.integers(1, 4), "block_size")
        self.num_blocks = data.draw(st.integers(2, 16), "num_blocks")
        self.max_num_seqs = data.draw(st.integers(1, 4), "max_num_seqs")
        self.prefix_caching = data.draw(st.booleans(), "prefix_caching")
        self.takes_waiting = data.draw(st.booleans(), "takes_waiting")
        self.name = data.draw(st.sampled_from(sorted(POLICIES)), "policy")
        self.scheduler = a_scheduler(
            self.num_blocks,
            self.block_size,
            self.max_num_seqs,
            data.draw(st.integers(self.max_num_seqs, 10), "budget"),
            self.prefix_caching,
            data.draw(st.sampled_from([0, 0, 1, 2, 5, 40]), "num_host_blocks"),
            POLICIES[self.name](),
        )
        self.device: Cells = {block: {} for block in range(self.num_blocks)}
        self.host: Cells = {}
        self.live: list[Sequence] = []
        self.taken: list[Sequence] = []
        self.computed: dict[Sequence, set[int]] = {}
        """Positions that were computed for it."""
        self.had: dict[Sequence, int] = {}
        """The most of its positions that were in the cache at once."""
        self.num_recomputed = 0
        self.num_added = 0
        self.clock = 0.0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("ab"),
        wait=st.sampled_from([0.0, 1.0, 6.0]),
    )
    def arrive(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        prompt_logprobs: int | None,
        priority: int,
        tenant: str,
        wait: float,
    ) -> None:
        capacity = self.num_blocks * self.block_size
        prompt = prompt[: capacity - 1]
        self.clock += wait
        request = a_request(
            str(self.num_added),
            prompt,
            priority=priority,
            tenant=tenant,
            arrival=self.clock,
            n=n,
            max_tokens=min(max_tokens, capacity - len(prompt)),
            prompt_logprobs=prompt_logprobs,
        )
        self.num_added += 1
        sequences = add(self.scheduler, sequences_of(request), self.clock)
        self.live += sequences
        self.computed |= {sequence: set() for sequence in sequences}
        self.had |= dict.fromkeys(sequences, 0)

    @precondition(lambda self: bool(self.taken))
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """Of a request, the first sequence first."""
        chosen = data.draw(st.sampled_from(self.taken))
        first = min(
            (each for each in self.taken if each.request is chosen.request), key=lambda each: each.index
        )
        self.taken.remove(first)
        add(self.scheduler, [first], self.clock)

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data(), whole_request=st.booleans())
    def cancel(self, data: st.DataObject, whole_request: bool) -> None:
        candidate = data.draw(st.sampled_from(self.live))
        uid = candidate.request.uid
        removed = self.scheduler.remove(uid, None if whole_request else candidate.index, now=self.clock)
        expected = [each for each in self.live if each.request.uid == uid] if whole_request else [candidate]
        assert set(removed) == set(expected) - set(self.taken)
        for each in set(expected) & set(self.taken):
            self.scheduler.forget(uid, each.index)
        self.live = [each for each in self.live if each not in expected]
        self.taken = [each for each in self.taken if each not in expected]

    @rule(count=st.integers(1, 5), seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def compute(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.clock += seconds
            self.compute_one()

    def compute_one(self) -> None:
        lengths = {sequence: sequence.num_tokens for sequence in self.live}
        num_preemptions = self.scheduler.num_preemptions
        plan = self.scheduler.plan(self.clock)
        assert {sequence: sequence.num_tokens for sequence in self.live} == lengths
        assert self.scheduler.num_preemptions >= num_preemptions + len(plan.preempted)
        self.check_limits(plan)
        self.check_order(plan)
        if self.takes_waiting:
            self.take_waiting(plan)
        self.copy(plan)
        self.check_contents()
        for sequence in self.running():
            self.had[sequence] = max(self.had[sequence], sequence.num_computed_tokens)
        for item in plan.scheduled:
            start = item.sequence.num_computed_tokens
            for position in range(start, start + item.num_tokens):
                block, place = self.cell(item.sequence, position)
                self.device[block][place] = self.prefix(item.sequence, position)
                self.num_recomputed += position < self.had[item.sequence]
                self.computed[item.sequence].add(position)
        ended = [item.sequence for item in plan.scheduled if item.is_last_chunk]
        self.scheduler.mark_computed(plan, self.clock)
        self.check_contents()
        for item in plan.scheduled:
            self.had[item.sequence] = max(self.had[item.sequence], item.sequence.num_computed_tokens)
        for sequence in ended:
            self.check_prompt_logprobs(sequence)
            sequence.token_ids.append(true_next_token(sequence.token_ids, sequence.index))
            if sequence.num_generated_tokens == sequence.request.sampling.max_tokens:
                assert sequence.token_ids == true_answer(sequence)
                uid = sequence.request.uid
                assert self.scheduler.remove(uid, sequence.index, now=self.clock) == [sequence]
                self.live.remove(sequence)

    def take_waiting(self, plan: StepPlan) -> None:
        taken = self.scheduler.take_waiting()
        assert not set(taken) & set(self.running())
        assert set(plan.preempted) <= set(taken)
        assert len(self.scheduler._waiting) == 0
        self.taken += taken

    def copy(self, plan: StepPlan) -> None:
        """First out, then in; in any order within each, as copies of many blocks at once are made."""
        assert len({target for _, target in plan.copies_out}) == len(plan.copies_out)
        assert len({target for _, target in plan.copies_in}) == len(plan.copies_in)
        assert plan.scheduled or not plan.copies_in
        for block, host_block in plan.copies_out:
            assert 0 <= host_block < self.scheduler.pool.host.num_blocks
            self.host[host_block] = dict(self.device[block])
        for host_block, block in plan.copies_in:
            self.device[block] = dict(self.host[host_block])

    def cell(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def prefix(self, sequence: Sequence, position: int) -> tuple[int, ...]:
        return tuple(sequence.token_ids[: position + 1])

    def running(self) -> list[Sequence]:
        """The first by rank first."""
        running = [sequence for sequence in self.live if sequence.block_table]
        return sorted(running, key=lambda each: (each.rank, each.request.arrival, each.index))

    def check_contents(self) -> None:
        for sequence in self.running():
            for position in range(sequence.num_computed_tokens):
                block, place = self.cell(sequence, position)
                assert self.device[block].get(place) == self.prefix(sequence, position)
        if not self.prefix_caching:
            tables = [block for sequence in self.running() for block in sequence.block_table]
            assert len(set(tables)) == len(tables), "nothing is shared"

    def check_prompt_logprobs(self, sequence: Sequence) -> None:
        """They are made when a position is computed for the sequence itself."""
        if sequence.request.sampling.prompt_logprobs is not None:
            assert self.computed[sequence] >= set(range(sequence.num_prompt_tokens))

    def check_limits(self, plan: StepPlan) -> None:
        running = self.running()
        budget = self.scheduler.max_num_batched_tokens
        assert plan.num_tokens == sum(item.num_tokens for item in plan.scheduled) <= budget
        assert len(running) == self.scheduler.num_running <= self.max_num_seqs
        assert len({item.sequence for item in plan.scheduled}) == len(plan.scheduled)
        assert len(set(plan.preempted)) == len(plan.preempted)
        for item in plan.scheduled:
            assert item.sequence in running
            assert item.num_tokens >= 1
            assert item.sequence.num_computed_tokens + item.num_tokens <= item.sequence.num_tokens
        for sequence in running:
            assert len(sequence.block_table) == -(-sequence.num_tokens // self.block_size)
            if sequence.request.sampling.prompt_logprobs is not None:
                assert sequence.num_cached_tokens == 0

    def check_order(self, plan: StepPlan) -> None:
        running = self.running()
        here = [sequence for sequence in self.live if sequence not in self.taken]
        scheduled = {item.sequence for item in plan.scheduled}
        assert bool(running) == bool(here), "somebody always runs"
        first = [each for each in running if order_of(each) == order_of(running[0])]
        assert not running or scheduled.intersection(first), "whoever ranks first always gets on"
        for sequence in running:
            assert sequence in scheduled or sequence.num_tokens - sequence.num_computed_tokens > 1
        for sequence in plan.preempted:
            assert not sequence.block_table
            assert sequence.view.num_tokens == sequence.num_tokens
            if self.name in ("priority_age", "fcfs", "srpt"):
                rank = self.scheduler.policy.rank(sequence.view, self.clock)
                assert all(each.rank <= rank for each in running)
        if not self.prefix_caching:
            self.check_that_the_first_in_line_could_not_run(running, plan.preempted)

    def check_that_the_first_in_line_could_not_run(
        self, running: list[Sequence], preempted: list[Sequence]
    ) -> None:
        """Without shared blocks and siblings that wait, it can be said exactly. One that was preempted for
        this plan does not come back in it, wherever it ranks now."""
        policy = self.scheduler.policy
        waiting = [each for each in self.live if not each.block_table and each not in self.taken]
        if waiting:
            order = {each: (policy.rank(each.view, self.clock), each.request.arrival) for each in waiting}
            tied = [each for each in waiting if order[each] == min(order.values())]
            assert not all(
                each not in preempted and self.could_run(each, order[each][0], running) for each in tied
            )

    def could_run(self, first: Sequence, rank: tuple[float, ...], running: list[Sequence]) -> bool:
        """Whether some of the last of the batch may be preempted, so that it has slot, blocks and budget."""
        may_leave = [self.may_preempt(first, rank, each) for each in running]
        needed = -(-first.num_tokens // self.block_size)
        needed += sum(
            self.reserve(each) for each, leaves in zip(running, may_leave, strict=True) if not leaves
        )
        for num_staying in range(len(running), -1, -1):
            if not all(may_leave[num_staying:]):
                return False
            free = self.scheduler.pool.num_free
            free += sum(len(each.block_table) for each in running[num_staying:])
            if num_staying < self.max_num_seqs and free >= needed:
                return True
        return False

    def may_preempt(self, first: Sequence, rank: tuple[float, ...], other: Sequence) -> bool:
        """As the policy says, which may want all blocks to be kept."""
        policy, pool = self.scheduler.policy, self.scheduler.pool
        away = self.scheduler.preemption._num_left
        wanted = pool.num_used + sum(away.values()) - away.get((first.request.uid, first.index), 0)
        wanted += -(-first.num_tokens // self.block_size)
        wanted += sum(map(self.reserve, self.scheduler._running))
        has_room = wanted <= pool.num_blocks + pool.host.num_blocks
        return (policy.preempts_at_a_loss or has_room) and policy.preempts(rank, other.rank)

    def reserve(self, sequence: Sequence) -> int:
        """Blocks that are kept for its next tokens."""
        end = sequence.num_prompt_tokens + sequence.request.sampling.max_tokens
        tokens = min(end, sequence.num_tokens + RESERVED_TOKENS)
        return -(-tokens // self.block_size) - len(sequence.block_table)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_running + self.scheduler.num_waiting + len(self.taken) == len(self.live)
            assert self.scheduler.num_recomputed_tokens == self.num_recomputed
            assert {each: each.view.num_served_tokens for each in self.live} == {
                each: self.had[each] for each in self.live
            }
            for sequence in self.live:
                assert (sequence.view.waiting_since is None) == bool(sequence.block_table)

    def teardown(self) -> None:
        """Everything is answered in the end, and every block given back."""
        if not hasattr(self, "scheduler"):
            return
        missing = sum(len(true_answer(each)) for each in self.live)
        steps = 0
        while self.live:
            for sequence in sorted(self.taken, key=lambda each: each.index):
                add(self.scheduler, [sequence], self.clock)
            self.taken.clear()
            self.clock += 0.1
            self.compute_one()
            steps += 1
            assert steps <= 4 * missing, (
                "whoever ranks first gets on at each step; only a few lose what they did"
            )
        self.scheduler.pool.check([])
        assert not self.scheduler._sequences
        assert not self.scheduler._waiting_siblings
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert (self.scheduler.free_slots, free_blocks(self.scheduler)) == (
            self.max_num_seqs,
            self.num_blocks,
        )


TestBatchMachine = BatchMachine.TestCase
TestBatchMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
