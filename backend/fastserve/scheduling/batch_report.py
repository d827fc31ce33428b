"""What the common queue is told of a batch: what it could take, and what would make way."""

from __future__ import annotations

from typing import NamedTuple

from fastserve.scheduling.block_tables import RESERVED_TOKENS
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.policy import Rank
from fastserve.scheduling.sequence import Sequence
from fastserve.scheduling.token_budget import order_of

STEPS_UNDER_WAY = 2
"""From the report of what is free to the plan with what was released for it."""
_TOKENS_AHEAD = RESERVED_TOKENS + STEPS_UNDER_WAY


class BatchReport(NamedTuple):
    """Numbers that `EngineStats` and `ReplicaCapacity` have under the same names."""

    free_slots: int
    free_blocks: int
    free_tokens: int
    running_ranks: list[Rank]
    running_blocks: list[int]


def report_batch(scheduler: IterationScheduler, max_ranks: int) -> BatchReport:
    """The report after a step; it tells of `max_ranks` of those that would be preempted first, at most."""
    lowest = lowest_running(scheduler, max_ranks)
    return BatchReport(
        scheduler.free_slots,
        free_blocks(scheduler),
        free_tokens(scheduler),
        [sequence.rank for sequence in lowest],
        [scheduler.preemption.blocks_left_by(sequence, _TOKENS_AHEAD) for sequence in lowest],
    )


def free_blocks(scheduler: IterationScheduler) -> int:
    """KV blocks beyond those in use and those that are kept for running sequences, which will have grown when
    what is released now comes."""
    tables = scheduler.tables
    return scheduler.pool.num_free - sum(
        tables.reserved_blocks(each, _TOKENS_AHEAD) for each in scheduler.running
    )


def free_tokens(scheduler: IterationScheduler) -> int:
    """What is left of the next step's token budget; below zero when prompts take more steps than one."""
    missing = [each.num_tokens - each.num_computed_tokens for each in scheduler.running]
    return scheduler.budget.tokens(missing.count(1)) - sum(missing)


def lowest_running(scheduler: IterationScheduler, count: int) -> list[Sequence]:
    """The running sequences that would be preempted first, by their ranks after the last step.

    None while the policy would not preempt for the prompt of one step.
    """
    num_blocks = scheduler.pool.blocks_for(scheduler.max_num_batched_tokens)
    if not scheduler.preemption.is_allowed(scheduler.running, num_blocks):
        return []
    return sorted(scheduler.running, key=order_of)[: -count - 1 : -1]
