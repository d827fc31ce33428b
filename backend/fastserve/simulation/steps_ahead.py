"""How many steps go alike: the simulator takes them at once."""

from __future__ import annotations

from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.sequence import StepPlan


def steps_ahead(scheduler: IterationScheduler, plan: StepPlan, limit: int) -> int:
    """How many steps, up to `limit`, go as `plan` does if nobody is added and nobody ends.

    More than one only if all do nothing but decode, and while blocks are free for them. Where a host cache
    takes what is evicted, a step that evicts goes alone: it has something to copy.
    """
    if plan.num_tokens != scheduler.num_running or len(plan.scheduled) != scheduler.num_running:
        return 1
    pool = scheduler.pool
    available = pool.num_unretained if pool.host.num_blocks else pool.num_free
    if _blocks_lacking_for(scheduler, limit) <= available:
        return limit
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        fits = _blocks_lacking_for(scheduler, middle) <= available
        low, high = (middle, high) if fits else (low, middle)
    return low


def _blocks_lacking_for(scheduler: IterationScheduler, num_steps: int) -> int:
    """Blocks to be allocated for the steps after the one that is planned."""
    size, ahead = scheduler.pool.block_size, num_steps - 1
    lacking = 0
    for sequence in scheduler.running:
        lacking += max(0, -(-(sequence.num_tokens + ahead) // size) - len(sequence.block_table))
    return lacking
