"""What each step computes: continuous batching with chunked prefill, over a paged KV cache.

    add -> waiting -> running -> [plan -> (compute) -> mark_computed -> (append a token)] ... -> remove
               ^---- preempted ---'

A plan is made in three moves:

1. Every running sequence gets the block that its next token needs. Where none is free, the sequence of the
   lowest rank is preempted: it goes back to the queue and its blocks are freed.
2. Waiting sequences are admitted, the highest key first and none out of turn, while there are a slot, blocks
   and a share of the token budget for them. Where slots or blocks lack, running sequences of a lower key are
   preempted for them.
3. The token budget is shared out: to each decode its one token, so that none stalls behind a long prompt,
   then to prompts in chunks, by rank.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter

from fastserve.scheduling.block_pool import ROOT_HASH, BlockPool, hash_block
from fastserve.scheduling.sequence import ScheduledSequence, Sequence, StepPlan
from fastserve.scheduling.waiting_queue import WaitingQueue


class CacheTooSmallError(Exception):
    """A sequence needs more blocks than the cache has: it must be removed, for it can never run (again)."""

    def __init__(self, sequence: Sequence, num_blocks_needed: int, num_blocks: int) -> None:
        super().__init__(
            f"sequence {sequence.index} of request {sequence.request.uid} has {sequence.num_tokens} tokens "
            f"and needs {num_blocks_needed} KV blocks; the cache has {num_blocks}"
        )
        self.sequence = sequence


class SchedulerError(Exception):
    """The scheduler's books do not balance: there is a bug in it or in its caller."""


class IterationScheduler:
    """Composes the batch of every step. Not thread-safe.

    Rank: the higher key, then the earlier arrival, then the lower index. A preempted sequence keeps its
    tokens, and its blocks can be found until they are evicted, so that a resume seldom computes everything
    again. Of a request with n > 1, the others wait until the prompt of sequence 0 is computed, and then share
    its full blocks.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Raises ValueError for a token budget in which a full batch could not decode."""
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"`max_num_batched_tokens`: got {max_num_batched_tokens}; allowed: at least `max_num_seqs`, "
                f"{max_num_seqs}, so that each sequence of a full batch gets its token"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.num_prefix_cache_hit_tokens = 0
        """Prompt tokens that were not computed because the cache had them; resumes are not counted."""
        self._sequences: dict[str, dict[int, Sequence]] = {}
        """All that have not been removed, by request and index."""
        self._running: list[Sequence] = []
        """By rank, the highest first."""
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._waiting_siblings: dict[str, list[Sequence]] = {}
        """Sequences that wait for their request's sequence 0, by request."""
        self._preempted: set[Sequence] = set()
        """Sequences that wait and have run before."""
        self._lacks_blocks = False
        """Whether the last plan left somebody waiting for blocks alone."""

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the batch, preempted ones included."""
        return len(self._waiting) + sum(map(len, self._waiting_siblings.values()))

    @property
    def free_slots(self) -> int:
        """Sequences that could still be added to the batch; below zero when some wait for one.

        While one waits for KV blocks there is no slot, however small the batch.
        """
        lacks_blocks = self._lacks_blocks and len(self._waiting) > 0
        slots = 0 if lacks_blocks else self.max_num_seqs - self.num_running
        return slots - self.num_waiting

    @property
    def lowest_key(self) -> float | None:
        """The lowest key of a running sequence; None if none runs."""
        return self._running[-1].key if self._running else None

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in, to run when its turn comes.

        A request's sequence 0 is added before its others. Raises CacheTooSmallError, and ValueError for a
        sequence that was added already.
        """
        self._require_capacity(sequence)
        siblings = self._sequences.setdefault(sequence.request.uid, {})
        if sequence.index in siblings:
            raise ValueError(f"sequence {sequence.index} of request {sequence.request.uid} was added already")
        siblings[sequence.index] = sequence
        leader = siblings.get(0)
        if sequence.index > 0 and leader and leader.num_generated_tokens == 0 and self._uses_cache(sequence):
            self._waiting_siblings.setdefault(sequence.request.uid, []).append(sequence)
        else:
            self._enqueue(sequence)

    def remove(self, uid: str, index: int | None = None) -> list[Sequence]:
        """Lets a request, or one sequence of it, go: it has ended or was cancelled. Returns what was removed.

        Not between `plan` and `mark_computed`: the blocks are free at once.
        """
        siblings = self._sequences.get(uid, {})
        indices = list(siblings) if index is None else [index] if index in siblings else []
        removed = [siblings.pop(each) for each in indices]
        if uid in self._waiting_siblings:
            self._waiting_siblings[uid] = [
                each for each in self._waiting_siblings[uid] if each.index in siblings
            ]
            if 0 not in siblings:
                self._release_waiting_siblings(uid)
        for sequence in removed:
            if self._waiting.remove((uid, sequence.index)) is not None:
                self._preempted.discard(sequence)
            elif sequence in self._running:
                self._leave_batch(sequence)
        if not siblings:
            self._sequences.pop(uid, None)
        return removed

    def plan(self) -> StepPlan:
        """What to compute next. Whoever computes it calls `mark_computed`, then appends the sampled token to
        each sequence whose last chunk it was, or removes it.

        Raises CacheTooSmallError, and leaves all as it was, if a running sequence has outgrown the pool.
        """
        for sequence in self._running:
            self._require_capacity(sequence)
        left = self._extend_tables() + self._admit()
        preempted = [sequence for sequence in left if sequence in self._preempted]  # and is not back already
        return StepPlan(self._share_budget(), preempted)

    def mark_computed(self, plan: StepPlan) -> None:
        """Counts what was computed, and lets other sequences find the blocks that it filled."""
        block_size = self.pool.block_size
        for item in plan.scheduled:
            sequence = item.sequence
            first = sequence.num_computed_tokens // block_size
            sequence.num_computed_tokens += item.num_tokens
            last = sequence.num_computed_tokens // block_size
            if last > first and self.pool.enable_prefix_caching:
                self._hash_full_blocks(sequence)
                for number in range(first, last):
                    self.pool.cache(sequence.block_table[number], sequence.block_hashes[number])
            if sequence.index == 0 and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
                self._release_waiting_siblings(sequence.request.uid)

    def check(self) -> None:
        """Raises SchedulerError unless each sequence is in one queue or in the batch, and BlockPoolError
        unless the used blocks are exactly those of the running sequences."""
        siblings = [sequence for each in self._waiting_siblings.values() for sequence in each]
        waiting = [*self._waiting, *siblings]
        found = Counter([*self._running, *waiting])
        known = Counter(sequence for each in self._sequences.values() for sequence in each.values())
        if found != known:
            lost, extra = known - found, found - known
            raise SchedulerError(f"{len(lost)} sequences are in no queue, {len(extra)} in more than they may")
        if not self._preempted.issubset(waiting):
            raise SchedulerError("a sequence counts as preempted that does not wait")
        self.pool.check([sequence.block_table for sequence in self._running])

    # --- admission and preemption

    def _extend_tables(self) -> list[Sequence]:
        """Gives every running sequence the blocks of its tokens; returns those preempted for it."""
        preempted: list[Sequence] = []
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
            if missing <= self.pool.num_free:
                if missing > 0:
                    sequence.block_table += self.pool.allocate(missing)
                index += 1
            else:
                preempted.append(self._preempt(self._running[-1]))
        return preempted

    def _admit(self) -> list[Sequence]:
        """Moves sequences from the queue into the batch; returns those preempted for it."""
        preempted: list[Sequence] = []
        self._lacks_blocks = False
        while (sequence := self._waiting.peek()) is not None and self._reaches_budget(sequence):
            candidates = self._take_blocks(sequence)
            if candidates is None:
                self._lacks_blocks = self.num_running < self.max_num_seqs
                break
            self._waiting.pop()
            insort(self._running, sequence, key=_rank)
            preempted += candidates
        return preempted

    def _reaches_budget(self, newcomer: Sequence) -> bool:
        """Whether the token budget would reach a newcomer: decodes and prompts of higher rank come first."""
        rank = _rank(newcomer)
        claimed = 0
        staying = self._running[: self.max_num_seqs - 1]  # in a full batch, the last would make way
        for sequence in staying:
            missing = sequence.num_tokens - sequence.num_computed_tokens
            if missing == 1 or _rank(sequence) <= rank:
                claimed += missing
        return claimed < self.max_num_batched_tokens

    def _take_blocks(self, sequence: Sequence) -> list[Sequence] | None:
        """Fills the table of a sequence that is to be admitted, with cached blocks as far as there are any.

        Returns the sequences preempted for it; None, with nothing changed, if it does not fit. All
        its blocks are taken at once: two long prompts that fit only one after the other do not block each
        other half-way.
        """
        # Its last token is always computed, in a block of its own.
        if self._preemption_candidates(sequence.key, 1) is None:
            return None
        cached = self._match_prefix(sequence)
        missing = self.pool.blocks_for(sequence.num_tokens) - len(cached)
        candidates = self._preemption_candidates(sequence.key, missing)
        if candidates is None:
            self.pool.free(cached)
            return None
        for candidate in candidates:
            self._preempt(candidate)
        sequence.block_table = cached + self.pool.allocate(missing)
        sequence.num_computed_tokens = len(cached) * self.pool.block_size
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        else:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_cache_hit_tokens += sequence.num_cached_tokens
        return candidates

    def _preemption_candidates(self, key: float, num_blocks: int) -> list[Sequence] | None:
        """The lowest running sequences that must leave before one of that key has a slot and so many blocks.

        None if those of a lower key do not suffice: then none of them should leave.
        """
        candidates: list[Sequence] = []
        free = self.pool.num_free
        dropped: Counter[int] = Counter()
        while free < num_blocks or len(self._running) - len(candidates) >= self.max_num_seqs:
            if len(candidates) == len(self._running):
                return None
            candidate = self._running[-1 - len(candidates)]
            if candidate.key >= key:
                return None
            candidates.append(candidate)
            dropped.update(candidate.block_table)
            free += sum(dropped[block] == self.pool.ref_count(block) for block in candidate.block_table)
        return candidates

    def _match_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks of its prefix, which it uses now; never that of its last token."""
        if not self._uses_cache(sequence):
            return []
        self._hash_full_blocks(sequence)
        num_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        return self.pool.match_prefix(sequence.block_hashes[:num_blocks])

    def _uses_cache(self, sequence: Sequence) -> bool:
        """Prompt logprobs come from computing the whole prompt."""
        return self.pool.enable_prefix_caching and sequence.request.sampling.prompt_logprobs is None

    def _hash_full_blocks(self, sequence: Sequence) -> None:
        hashes, size = sequence.block_hashes, self.pool.block_size
        for number in range(len(hashes), sequence.num_tokens // size):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(hash_block(parent, sequence.token_ids[number * size : (number + 1) * size]))

    def _preempt(self, sequence: Sequence) -> Sequence:
        self._leave_batch(sequence)
        self._preempted.add(sequence)
        self._enqueue(sequence)
        self.num_preemptions += 1
        return sequence

    def _leave_batch(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def _enqueue(self, sequence: Sequence) -> None:
        request = sequence.request
        self._waiting.push(
            sequence, uid=(request.uid, sequence.index), key=sequence.key, arrival=request.arrival
        )

    def _release_waiting_siblings(self, uid: str) -> None:
        for sequence in self._waiting_siblings.pop(uid, ()):
            self._enqueue(sequence)

    def _require_capacity(self, sequence: Sequence) -> None:
        needed = self.pool.blocks_for(sequence.num_tokens)
        if needed > self.pool.num_blocks:
            raise CacheTooSmallError(sequence, needed, self.pool.num_blocks)

    # --- token budget

    def _share_budget(self) -> list[ScheduledSequence]:
        """Decodes, then chunks of prompts; both by rank."""
        scheduled, prompts = [], []
        for sequence in self._running:
            if sequence.num_tokens - sequence.num_computed_tokens == 1:
                scheduled.append(ScheduledSequence(sequence, 1))
            else:
                prompts.append(sequence)
        budget = self.max_num_batched_tokens - len(scheduled)
        for sequence in prompts:
            if budget == 0:
                break
            chunk = min(budget, sequence.num_tokens - sequence.num_computed_tokens)
            scheduled.append(ScheduledSequence(sequence, chunk))
            budget -= chunk
        return scheduled


def _rank(sequence: Sequence) -> tuple[float, float, int]:
    """The lowest goes first."""
    return (-sequence.key, sequence.request.arrival, sequence.index)
