from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.iteration_scheduler import CacheTooSmallError, IterationScheduler
from fastserve.scheduling.policies import PriorityAge
from fastserve.scheduling.sequence import Sequence, StepPlan
from fastserve.types import OutputOptions, Request, SamplingParams

POLICY = PriorityAge(alpha=10.0, beta=1.0)


def sequences_of(
    uid: str,
    prompt: list[int],
    *,
    priority: int = 0,
    arrival: float = 0.0,
    sampling: SamplingParams | None = None,
) -> list[Sequence]:
    request = Request(
        uid=uid,
        request_id="",
        prompt="",
        prompt_token_ids=prompt,
        sampling=sampling or SamplingParams(),
        output=OutputOptions(),
        priority=priority,
        tenant="",
        arrival=arrival,
        deadline=None,
    )
    key = POLICY.key(priority, arrival)
    return [Sequence(request, index, key, list(prompt)) for index in range(request.sampling.n)]


def a_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    prefix_caching: bool = True,
) -> IterationScheduler:
    pool = BlockPool(num_blocks, block_size, prefix_caching)
    return IterationScheduler(pool, max_num_seqs, max_num_batched_tokens)


def add(scheduler: IterationScheduler, sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def chunks(plan: StepPlan) -> list[tuple[str, int]]:
    return [(item.sequence.request.uid, item.num_tokens) for item in plan.scheduled]


def step(scheduler: IterationScheduler, token: int = 7) -> StepPlan:
    """Plans and computes; every sequence that reached its end gets `token`."""
    plan = scheduler.plan()
    ended = [item.sequence for item in plan.scheduled if item.is_last_chunk]
    scheduler.mark_computed(plan)
    for sequence in ended:
        sequence.token_ids.append(token)
    return plan


# --- the budget


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = a_scheduler()
    add(scheduler, sequences_of("short", [1, 2, 3]))
    assert chunks(step(scheduler)) == [("short", 3)]
    add(scheduler, sequences_of("long", list(range(40)), priority=1))
    assert chunks(step(scheduler)) == [("short", 1), ("long", 15)]
    assert chunks(step(scheduler)) == [("short", 1), ("long", 15)]
    assert chunks(step(scheduler)) == [("short", 1), ("long", 10)]
    assert chunks(step(scheduler)) == [("long", 1), ("short", 1)]


def test_prompts_share_the_budget_by_key() -> None:
    scheduler = a_scheduler()
    add(scheduler, sequences_of("low", list(range(40))))
    step(scheduler)
    add(scheduler, sequences_of("high", list(range(50, 60)), priority=1))
    add(scheduler, sequences_of("lower", list(range(70, 80)), priority=-1))
    assert chunks(step(scheduler)) == [("high", 10), ("low", 6)]
    assert chunks(step(scheduler)) == [("high", 1), ("low", 15)]
    assert chunks(step(scheduler)) == [("high", 1), ("low", 3), ("lower", 10)]


def test_a_budget_in_which_a_full_batch_could_not_decode_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`max_num_batched_tokens`: got 3; allowed: at least `max_num_seqs`, 4"
    ):
        a_scheduler(max_num_seqs=4, max_num_batched_tokens=3)


# --- slots and preemption


def test_a_higher_key_takes_a_slot_from_the_lowest_at_the_next_step() -> None:
    scheduler = a_scheduler(max_num_seqs=2)
    [low] = add(scheduler, sequences_of("low", [1]))
    [middle] = add(scheduler, sequences_of("middle", [1], priority=1))
    step(scheduler)
    add(scheduler, sequences_of("high", [1], priority=2))
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1), ("middle", 1)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (2, 1, 1)
    assert (scheduler.free_slots, scheduler.lowest_key) == (-1, middle.key)
    assert (low.token_ids, low.num_computed_tokens, low.block_table) == ([1, 7], 0, [])
    scheduler.remove("high")
    assert chunks(step(scheduler)) == [("middle", 1), ("low", 2)]


def test_it_does_so_when_decodes_use_up_the_budget() -> None:
    scheduler = a_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    [a] = add(scheduler, sequences_of("a", [1], arrival=0.0))
    [b] = add(scheduler, sequences_of("b", [1], arrival=1.0))
    step(scheduler)
    add(scheduler, sequences_of("high", [1, 2], priority=9))
    plan = step(scheduler)
    assert plan.preempted == [b]
    assert chunks(plan) == [("a", 1), ("high", 1)]
    assert a.num_generated_tokens == 2


def test_an_equal_key_takes_nothing() -> None:
    scheduler = a_scheduler(max_num_seqs=1)
    add(scheduler, sequences_of("first", [1]))
    step(scheduler)
    add(scheduler, sequences_of("second", [1]))
    assert step(scheduler).preempted == []
    assert scheduler.num_waiting == 1


def test_a_higher_key_takes_blocks_of_as_many_as_it_needs() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    for priority, token in enumerate((10, 20, 30)):
        add(scheduler, sequences_of(f"p{priority}", [token] * 3, priority=priority))
    step(scheduler)
    add(scheduler, sequences_of("high", [40] * 9, priority=9))
    plan = step(scheduler)
    assert [each.request.uid for each in plan.preempted] == ["p0", "p1"]
    assert chunks(plan) == [("p2", 1), ("high", 9)]


def test_nobody_leaves_where_that_would_not_suffice() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    add(scheduler, sequences_of("low", [10] * 3, priority=0))
    add(scheduler, sequences_of("top", [20] * 8, priority=9))
    step(scheduler)
    add(scheduler, sequences_of("large", [30] * 7, priority=5))
    plan = scheduler.plan()
    assert plan.preempted == []
    assert chunks(plan) == [("top", 1), ("low", 1)]
    assert scheduler.free_slots == -1, "nobody can be added while one waits for blocks"


def test_blocks_that_a_newcomer_shares_are_not_counted_as_won() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    add(scheduler, sequences_of("low", prompt))
    step(scheduler)
    add(scheduler, sequences_of("other", [9], priority=9))
    step(scheduler)
    [high] = add(scheduler, sequences_of("high", [*prompt[:4], 8, 8, 8, 8, 8], priority=5))
    plan = step(scheduler)
    assert [each.request.uid for each in plan.preempted] == ["low"]
    assert (high.num_cached_tokens, len(high.block_table)) == (4, 3)
    scheduler.check()


def test_nobody_leaves_for_blocks_that_a_newcomer_shares_with_it() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    [low] = add(scheduler, sequences_of("low", [1, 2, 3, 4, 5]))
    add(scheduler, sequences_of("top", [9], priority=9))
    step(scheduler)
    add(scheduler, sequences_of("high", [1, 2, 3, 4, *[8] * 9], priority=5))
    plan = step(scheduler)
    assert plan.preempted == []
    assert len(low.block_table) == 2
    scheduler.check()


def test_a_batch_has_slots_again_when_the_one_that_waited_for_blocks_is_gone() -> None:
    scheduler = a_scheduler(num_blocks=2)
    add(scheduler, sequences_of("runs", [1, 2, 3]))
    step(scheduler)
    add(scheduler, sequences_of("waits", [1] * 6))
    step(scheduler)
    assert scheduler.free_slots == -1
    scheduler.remove("waits")
    assert scheduler.free_slots == 3


def test_of_equal_keys_the_earlier_arrival_ranks_first() -> None:
    scheduler = a_scheduler()
    add(scheduler, sequences_of("late", [1] * 20, priority=1, arrival=10.0))
    step(scheduler)
    add(scheduler, sequences_of("early", [2] * 10, priority=0, arrival=0.0))
    assert chunks(step(scheduler)) == [("early", 10), ("late", 4)]


def test_a_lower_key_does_not_pass_one_that_waits_for_blocks() -> None:
    scheduler = a_scheduler(num_blocks=4, max_num_batched_tokens=64)
    add(scheduler, sequences_of("top", [10] * 8, priority=9))
    step(scheduler)
    add(scheduler, sequences_of("large", [30] * 8, priority=5))
    add(scheduler, sequences_of("small", [40], priority=0))
    assert chunks(step(scheduler)) == [("top", 1)]
    scheduler.remove("top")
    assert chunks(step(scheduler)) == [("small", 1), ("large", 8)]


def test_a_decode_without_a_block_preempts_the_lowest() -> None:
    scheduler = a_scheduler(num_blocks=3, max_num_batched_tokens=64)
    [high] = add(scheduler, sequences_of("high", [10] * 4, priority=1))
    [low] = add(scheduler, sequences_of("low", [20] * 5))
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1)]
    assert len(high.block_table) == 2


def test_a_decode_without_a_block_may_be_the_lowest_itself() -> None:
    scheduler = a_scheduler(num_blocks=3, max_num_batched_tokens=64)
    add(scheduler, sequences_of("high", [10] * 5, priority=1))
    [low] = add(scheduler, sequences_of("low", [20] * 4))
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == [low]
    assert chunks(plan) == [("high", 1)]
    assert low.token_ids == [20] * 4 + [7]


def test_a_resume_finds_its_blocks_and_is_no_prefix_hit() -> None:
    scheduler = a_scheduler(max_num_seqs=1)
    [low] = add(scheduler, sequences_of("low", list(range(9))))
    step(scheduler)
    add(scheduler, sequences_of("high", [50], priority=1))
    step(scheduler)
    scheduler.remove("high")
    assert chunks(step(scheduler)) == [("low", 2)]
    assert (low.num_cached_tokens, scheduler.num_prefix_cache_hit_tokens) == (0, 0)


def test_what_can_never_fit_is_refused() -> None:
    scheduler = a_scheduler(num_blocks=2)
    with pytest.raises(CacheTooSmallError, match="has 9 tokens and needs 3 KV blocks; the cache has 2"):
        add(scheduler, sequences_of("r", [1] * 9))
    assert (scheduler.num_waiting, scheduler.remove("r")) == (0, [])


def test_what_outgrows_the_cache_is_named_and_can_be_removed() -> None:
    scheduler = a_scheduler(num_blocks=1)
    [sequence] = add(scheduler, sequences_of("r", [1] * 4))
    step(scheduler)
    with pytest.raises(CacheTooSmallError) as caught:
        scheduler.plan()
    assert caught.value.sequence is sequence
    assert scheduler.remove("r") == [sequence]
    assert step(scheduler) == StepPlan([], [])
    scheduler.pool.check([])


# --- prefixes


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = a_scheduler()
    prompt = list(range(10))
    [first] = add(scheduler, sequences_of("first", prompt))
    step(scheduler)
    [second] = add(scheduler, sequences_of("second", prompt))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 2)]
    assert second.block_table[:2] == first.block_table[:2]
    assert (second.num_cached_tokens, scheduler.num_prefix_cache_hit_tokens) == (8, 8)


def test_the_last_token_is_always_computed() -> None:
    scheduler = a_scheduler()
    add(scheduler, sequences_of("first", list(range(8))))
    step(scheduler)
    [second] = add(scheduler, sequences_of("second", list(range(8))))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 4)]
    assert second.num_cached_tokens == 4


def test_an_answer_is_cached_too() -> None:
    scheduler = a_scheduler()
    [first] = add(scheduler, sequences_of("first", [1, 2, 3]))
    for _ in range(6):
        step(scheduler)
    scheduler.remove("first")
    [second] = add(scheduler, sequences_of("second", first.token_ids))
    step(scheduler)
    assert second.num_cached_tokens == 8


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    scheduler = a_scheduler()
    add(scheduler, sequences_of("first", list(range(10))))
    step(scheduler)
    add(scheduler, sequences_of("second", list(range(10)), sampling=SamplingParams(prompt_logprobs=0)))
    assert chunks(step(scheduler)) == [("first", 1), ("second", 10)]


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    scheduler = a_scheduler(max_num_batched_tokens=8)
    siblings = add(scheduler, sequences_of("r", list(range(10)), sampling=SamplingParams(n=3)))
    assert chunks(step(scheduler)) == [("r", 8)]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.free_slots) == (1, 2, 1)
    assert chunks(step(scheduler)) == [("r", 2)]
    assert chunks(step(scheduler)) == [("r", 1), ("r", 2), ("r", 2)]
    assert all(each.block_table[:2] == siblings[0].block_table[:2] for each in siblings)
    assert len({each.block_table[2] for each in siblings}) == 3


def test_siblings_do_not_wait_for_one_that_is_gone() -> None:
    scheduler = a_scheduler()
    siblings = add(scheduler, sequences_of("r", [1, 2], sampling=SamplingParams(n=3)))
    assert scheduler.remove("r", 0) == siblings[:1]
    assert scheduler.remove("r", 2) == siblings[2:]
    assert [item.sequence for item in step(scheduler).scheduled] == siblings[1:2]


@pytest.mark.parametrize(
    ("prefix_caching", "sampling"),
    [(False, SamplingParams(n=2)), (True, SamplingParams(n=2, prompt_logprobs=1))],
)
def test_siblings_that_have_nothing_to_share_do_not_wait(
    prefix_caching: bool, sampling: SamplingParams
) -> None:
    scheduler = a_scheduler(prefix_caching=prefix_caching)
    add(scheduler, sequences_of("r", [1, 2], sampling=sampling))
    assert chunks(step(scheduler)) == [("r", 2), ("r", 2)]


# --- coming and going


def test_a_sequence_is_added_once() -> None:
    scheduler = a_scheduler()
    [sequence] = add(scheduler, sequences_of("r", [1]))
    with pytest.raises(ValueError, match="sequence 0 of request r was added already"):
        scheduler.add(sequence)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_removed_request_leaves_nothing_behind(steps: int) -> None:
    scheduler = a_scheduler(max_num_batched_tokens=4)
    siblings = add(scheduler, sequences_of("r", list(range(6)), sampling=SamplingParams(n=2)))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.remove("r") == siblings
    assert scheduler.remove("r") == []
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.free_slots) == (0, 0, 4)
    assert scheduler.lowest_key is None
    scheduler.pool.check([])


# --- against a model that shows what it reads


def true_next_token(token_ids: list[int], index: int) -> int:
    """What the fake model says: few different tokens, so that many requests share prefixes."""
    return (sum((place + 1) * token for place, token in enumerate(token_ids)) + index) % 2


def true_answer(sequence: Sequence) -> list[int]:
    tokens = list(sequence.request.prompt_token_ids)
    for _ in range(sequence.request.sampling.max_tokens):
        tokens.append(true_next_token(tokens, sequence.index))
    return tokens


class BatchMachine(RuleBasedStateMachine):
    """Random requests, cancels and steps over a tiny cache whose cells hold the prefix they came from.

    What a cell holds stands for keys and values: they depend on every token up to their own. A sequence that
    reads, at any position, a cell that was not computed from precisely its own prefix would answer wrongly.
    """

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.block_size = data.draw(st.integers(1, 4))
        self.num_blocks = data.draw(st.integers(2, 12))
        self.max_num_seqs = data.draw(st.integers(1, 4))
        self.budget = data.draw(st.integers(self.max_num_seqs, 10))
        self.prefix_caching = data.draw(st.booleans())
        self.scheduler = a_scheduler(
            self.num_blocks, self.block_size, self.max_num_seqs, self.budget, self.prefix_caching
        )
        self.cells: dict[tuple[int, int], tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.num_added = 0
        self.clock = 0.0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.integers(-1, 1),
        wait=st.sampled_from([0.0, 1.0, 6.0]),
    )
    def arrive(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        prompt_logprobs: int | None,
        priority: int,
        wait: float,
    ) -> None:
        capacity = self.num_blocks * self.block_size
        prompt = prompt[: capacity - 1]
        self.clock += wait
        sampling = SamplingParams(
            n=n, max_tokens=min(max_tokens, capacity - len(prompt)), prompt_logprobs=prompt_logprobs
        )
        uid = str(self.num_added)
        self.num_added += 1
        self.live += add(
            self.scheduler,
            sequences_of(uid, prompt, priority=priority, arrival=self.clock, sampling=sampling),
        )

    @precondition(lambda self: self.live)
    @rule(data=st.data(), whole_request=st.booleans())
    def cancel(self, data: st.DataObject, whole_request: bool) -> None:
        candidate = data.draw(st.sampled_from(self.live))
        uid = candidate.request.uid
        removed = self.scheduler.remove(uid, None if whole_request else candidate.index)
        expected = [each for each in self.live if each.request.uid == uid] if whole_request else [candidate]
        assert removed == expected
        self.live = [each for each in self.live if each not in removed]

    @rule(count=st.integers(1, 5))
    def compute(self, count: int) -> None:
        for _ in range(count):
            self.compute_one()

    def compute_one(self) -> None:
        lengths = {sequence: sequence.num_tokens for sequence in self.live}
        plan = self.scheduler.plan()
        assert {sequence: sequence.num_tokens for sequence in self.live} == lengths
        self.check_limits(plan)
        self.check_order(plan)
        self.check_contents()
        for item in plan.scheduled:
            start = item.sequence.num_computed_tokens
            for position in range(start, start + item.num_tokens):
                self.cells[self.cell(item.sequence, position)] = self.prefix(item.sequence, position)
        ended = [item.sequence for item in plan.scheduled if item.is_last_chunk]
        self.scheduler.mark_computed(plan)
        self.check_contents()
        for sequence in ended:
            sequence.token_ids.append(true_next_token(sequence.token_ids, sequence.index))
            if sequence.num_generated_tokens == sequence.request.sampling.max_tokens:
                assert sequence.token_ids == true_answer(sequence)
                assert self.scheduler.remove(sequence.request.uid, sequence.index) == [sequence]
                self.live.remove(sequence)

    def cell(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def prefix(self, sequence: Sequence, position: int) -> tuple[int, ...]:
        return tuple(sequence.token_ids[: position + 1])

    def running(self) -> list[Sequence]:
        """The highest rank first."""
        running = [sequence for sequence in self.live if sequence.block_table]
        return sorted(running, key=lambda each: (-each.key, each.request.arrival, each.index))

    def check_contents(self) -> None:
        for sequence in self.running():
            for position in range(sequence.num_computed_tokens):
                assert self.cells[self.cell(sequence, position)] == self.prefix(sequence, position)

    def check_limits(self, plan: StepPlan) -> None:
        running = self.running()
        assert plan.num_tokens == sum(item.num_tokens for item in plan.scheduled) <= self.budget
        assert len(running) == self.scheduler.num_running <= self.max_num_seqs
        assert len({item.sequence for item in plan.scheduled}) == len(plan.scheduled)
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
        scheduled = {item.sequence for item in plan.scheduled}
        assert bool(running) == bool(self.live), "somebody always runs"
        assert not running or running[0] in scheduled, "whoever ranks first always gets on"
        for sequence in running:
            assert sequence in scheduled or sequence.num_tokens - sequence.num_computed_tokens > 1
        for sequence in plan.preempted:
            assert not sequence.block_table
            assert all(sequence.key <= each.key for each in running)
        if not self.prefix_caching:
            self.check_that_the_first_in_line_could_not_run(running)

    def check_that_the_first_in_line_could_not_run(self, running: list[Sequence]) -> None:
        """Without shared blocks and siblings that wait, it can be said exactly."""
        waiting = [sequence for sequence in self.live if not sequence.block_table]
        if not waiting:
            return
        best = min((-each.key, each.request.arrival) for each in waiting)
        tied = [each for each in waiting if (-each.key, each.request.arrival) == best]
        assert not all(self.could_run(each, running) for each in tied)

    def could_run(self, first: Sequence, running: list[Sequence]) -> bool:
        lower = [sequence for sequence in running if sequence.key < first.key]
        has_slot = len(running) - len(lower) < self.max_num_seqs
        free = self.scheduler.pool.num_free + sum(len(each.block_table) for each in lower)
        has_blocks = free >= -(-first.num_tokens // self.block_size)
        ahead = [each for each in running if each not in lower]
        decodes = [each for each in lower if each.num_tokens - each.num_computed_tokens == 1]
        claims = sum(each.num_tokens - each.num_computed_tokens for each in ahead) + len(decodes)
        if len(running) == self.max_num_seqs and running[-1] in decodes:
            claims -= 1
        return has_slot and has_blocks and claims < self.budget

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def teardown(self) -> None:
        """Everything is answered in the end, and every block given back."""
        if not hasattr(self, "scheduler"):
            return
        missing = sum(len(true_answer(each)) for each in self.live)
        steps = 0
        while self.live:
            self.compute_one()
            steps += 1
            assert steps <= 4 * missing, (
                "whoever ranks first gets on at each step; only a few lose what they did"
            )
        self.scheduler.pool.check([])
        assert not self.scheduler._sequences
        assert not self.scheduler._waiting_siblings
        assert not self.scheduler._preempted
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.free_slots == self.max_num_seqs


TestBatchMachine = BatchMachine.TestCase
TestBatchMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
