"""Who makes way for a newcomer, and what it took to let a preempted sequence go on."""

from __future__ import annotations

from collections import Counter
from enum import Enum

from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.block_tables import RESERVED_TOKENS, BlockTables
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.sequence import Sequence


class PreemptionKind(str, Enum):
    """The label `kind` of `fastserve_preemptions_total`."""

    KEPT = "kept"
    """Nothing: its blocks were still in the cache."""
    SWAP = "swap"
    """Blocks came back from host memory, and nothing was computed again."""
    RECOMPUTE = "recompute"
    """Some of its tokens are computed again."""


def preemption_kind(sequence: Sequence, num_copied_blocks: int) -> PreemptionKind:
    """Of a preempted sequence that has just been given blocks, so many of them from host memory."""
    if sequence.num_computed_tokens < sequence.view.num_served_tokens:
        return PreemptionKind.RECOMPUTE
    return PreemptionKind.SWAP if num_copied_blocks else PreemptionKind.KEPT


class Preemption:
    """Chooses the running sequences that make way; knows the blocks that preempted ones left behind."""

    def __init__(self, pool: BlockPool, tables: BlockTables, policy: Policy, max_num_seqs: int) -> None:
        self._pool = pool
        self._tables = tables
        self._policy = policy
        self._max_num_seqs = max_num_seqs
        self._num_left: dict[tuple[str, int], int] = {}
        """Blocks that a preempted sequence left behind and will want, by request and index."""
        self._num_left_in_all = 0

    def leave(self, sequence: Sequence) -> None:
        """A sequence is preempted, and has its blocks still."""
        self._num_left[sequence.request.uid, sequence.index] = len(sequence.block_table)
        self._num_left_in_all += len(sequence.block_table)

    def forget(self, uid: str, index: int) -> None:
        """A preempted sequence is admitted again, or never will be."""
        self._num_left_in_all -= self._num_left.pop((uid, index), 0)

    def candidates(
        self, running: list[Sequence], newcomer: Sequence, num_blocks: int
    ) -> list[Sequence] | None:
        """The lowest of `running`, which is by rank, that must leave before a newcomer has a slot and so many
        blocks.

        None if those that it may preempt do not suffice: then none of them should leave. Blocks are kept for
        the next tokens of the others alone: those that it may preempt leave when they lack a block.
        """
        candidates: list[Sequence] = []
        num_staying, free = len(running), self._pool.num_free
        if num_staying < self._max_num_seqs and free >= num_blocks + self._most_reserved(num_staying):
            return candidates
        num_own = self._num_left.get((newcomer.request.uid, newcomer.index), 0)
        may = self.is_allowed(running, num_blocks, num_own)
        may_preempt = [may and self._policy.preempts(newcomer.rank, each.rank) for each in running]
        needed = num_blocks
        for each, leaves in zip(running, may_preempt, strict=True):
            needed += 0 if leaves else self._tables.reserved_blocks(each)
        dropped: Counter[int] = Counter()
        while free < needed or num_staying >= self._max_num_seqs:
            num_staying -= 1
            if num_staying < 0 or not may_preempt[num_staying]:
                return None
            candidate = running[num_staying]
            candidates.append(candidate)
            dropped.update(candidate.block_table)
            free += sum(dropped[block] == self._pool.ref_count(block) for block in candidate.block_table)
        return candidates

    def victim_for_blocks(self, running: list[Sequence]) -> Sequence:
        """The one of `running`, which is by rank, that makes way where a block lacks: of the last and those
        that the policy does not spare, the one of which the least would be computed again."""
        last = running[-1].rank
        candidates = [each for each in reversed(running) if not self._policy.spares(each.rank, last)]
        return min(candidates, key=lambda each: each.num_computed_tokens)

    def is_allowed(self, running: list[Sequence], num_blocks: int, num_own: int = 0) -> bool:
        """Whether any of `running` may make way for so many blocks: unless the policy does it at any cost,
        only while the blocks of all that run or were preempted find room, in host memory too.

        `num_own`: of the blocks that were left behind, the newcomer's, which come back with it.
        """
        if self._policy.preempts_at_a_loss:
            return True
        pool = self._pool
        num_left = self._num_left_in_all - num_own
        free = pool.num_blocks + pool.host.num_blocks - pool.num_used - num_left - num_blocks
        return free >= self._most_reserved(len(running)) or free >= sum(
            map(self._tables.reserved_blocks, running)
        )

    def blocks_left_by(self, sequence: Sequence, tokens_ahead: int) -> int:
        """KV blocks that are free, and reserved for nobody, once a running sequence is preempted: at most;
        those that it shares stay in use. Nobody goes through all block tables at each step to count them."""
        return len(sequence.block_table) + self._tables.reserved_blocks(sequence, tokens_ahead)

    def _most_reserved(self, num_running: int) -> int:
        """Not less than the blocks that are reserved for so many running sequences."""
        return num_running * (RESERVED_TOKENS // self._pool.block_size + 2)
