"""What each step computes: continuous batching with chunked prefill, over a paged KV cache.

    add -> waiting -> running -> [plan -> (compute) -> mark_computed -> (append a token)] ... -> remove
               ^---- preempted ---'

A plan is made in three moves:

1. Every running sequence gets the block that its next token needs. Where none is free, the last by rank is
   preempted, or a shorter one that the policy does not spare: it waits again, and its blocks are freed.
2. Waiting sequences are admitted by rank and none out of turn, while there are a slot and blocks for them.
   Where those lack, running sequences are preempted for them, as far as the policy allows.
3. The token budget is shared out: to each decode its one token, so that none stalls behind a long prompt,
   then to prompts in chunks, by rank.
"""

from __future__ import annotations

from collections import Counter

from msgspec.structs import replace

from fastserve.scheduling.block_pool import BlockPool, private_root_hash
from fastserve.scheduling.block_tables import BlockTables
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.preemption import Preemption, PreemptionKind, preemption_kind
from fastserve.scheduling.sequence import Sequence, StepPlan
from fastserve.scheduling.service_counter import ServiceCounter
from fastserve.scheduling.token_budget import TokenBudget, order_of, share_budget
from fastserve.scheduling.waiting_queue import WaitingQueue


class SchedulerError(Exception):
    """The scheduler's books do not balance: there is a bug in it or in its caller."""


class IterationScheduler:
    """Composes the batch of every step. Not thread-safe.

    Rank: the policy's, then the earlier arrival, then the lower index. A preempted sequence keeps its
    tokens, and its blocks can be found until they are evicted, so that a resume seldom computes everything
    again. Of a request with n > 1, the others wait until the prompt of sequence 0 is computed, and then share
    its full blocks. `now` is monotonic seconds everywhere.
    """

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        target_itl_seconds: float = 0.0,
        num_micro_batches: int = 1,
    ) -> None:
        """`target_itl_seconds`: see `TokenBudget`. `num_micro_batches`: plans that are computed at a time,
        each of an equal part of the batch.

        Raises ValueError for a token budget in which a full batch could not decode.
        """
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"`max_num_batched_tokens`: got {max_num_batched_tokens}; allowed: at least `max_num_seqs`, "
                f"{max_num_seqs}, so that each sequence of a full batch gets its token"
            )
        self.pool = pool
        self.policy = policy
        self.tables = BlockTables(pool)
        self._service = ServiceCounter(policy)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.budget = TokenBudget(max_num_batched_tokens, target_itl_seconds)
        self.num_preemptions = 0
        self.num_prefix_cache_hit_tokens = 0
        """Prompt tokens that were not computed because the cache had them; resumes are not counted."""
        self.num_swapped_blocks = 0
        """Blocks that came back from host memory."""
        self.num_resumed: Counter[PreemptionKind] = Counter()
        """Preempted sequences that went on, by what that took."""
        self._sequences: dict[str, dict[int, Sequence]] = {}
        """All that have not been removed, by request and index."""
        self.num_micro_batches = num_micro_batches
        self.in_flight: dict[Sequence, object] = {}
        """Sequences of plans that are computed still, by whoever computes them: no other plan has them. One
        that leaves the batch meanwhile is none any more."""
        self._running: list[Sequence] = []
        """By rank, the lowest, which runs first, in front."""
        self._waiting: WaitingQueue[Sequence] = WaitingQueue(policy)
        self.preemption = Preemption(pool, self.tables, policy, max_num_seqs)
        self._waiting_siblings: dict[str, list[Sequence]] = {}
        """Sequences that wait for their request's sequence 0, by request."""

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens that were computed again after a preemption."""
        return self._service.num_recomputed_tokens

    @property
    def running(self) -> list[Sequence]:
        """The batch, not to be changed."""
        return self._running

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def has_sequences(self) -> bool:
        """Whether any sequence is here, running or waiting."""
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the batch, preempted ones included."""
        return len(self._waiting) + sum(map(len, self._waiting_siblings.values()))

    @property
    def free_slots(self) -> int:
        """Sequences that could still be added to the batch; below zero when more wait than it has places."""
        return self.max_num_seqs - self.num_running - self.num_waiting

    def forget(self, uid: str, index: int) -> None:
        """A sequence that was handed back by `take_waiting` will not be added again."""
        self.preemption.forget(uid, index)

    def add(self, sequence: Sequence, now: float) -> None:
        """Takes a sequence in, new or taken out by `take_waiting`, to run when its turn comes.

        A request's sequence 0 is added before its others. Raises CacheTooSmallError, and ValueError for a
        sequence that is there already.
        """
        self.tables.require_capacity(sequence)
        siblings = self._sequences.setdefault(sequence.request.uid, {})
        if sequence.index in siblings:
            raise ValueError(f"sequence {sequence.index} of request {sequence.request.uid} was added already")
        siblings[sequence.index] = sequence
        if not self.pool.enable_prefix_caching:
            sequence.root_hash = private_root_hash(sequence.request.uid, sequence.index)
        leader = siblings.get(0)
        if (
            sequence.index > 0
            and leader
            and leader.num_generated_tokens == 0
            and self.tables.uses_cache(sequence)
        ):
            self._waiting_siblings.setdefault(sequence.request.uid, []).append(sequence)
        else:
            self._waiting.push(sequence, sequence.view, now)

    def remove(self, uid: str, index: int | None = None, *, now: float) -> list[Sequence]:
        """Lets a request, or one sequence of it, go: it has ended or was cancelled. Returns what was removed.

        Not between `plan` and `mark_computed`, unless it is in flight: the blocks are free at once. What is
        in flight writes to them before what is planned later does.
        """
        siblings = self._sequences.get(uid, {})
        indices = list(siblings) if index is None else [index] if index in siblings else []
        removed = [siblings.pop(each) for each in indices]
        for each in indices:
            self.forget(uid, each)
        if uid in self._waiting_siblings:
            self._waiting_siblings[uid] = [
                each for each in self._waiting_siblings[uid] if each.index in siblings
            ]
            if 0 not in siblings:
                self._release_waiting_siblings(uid, now)
        for sequence in removed:
            if self._waiting.remove(uid, sequence.index) is None and sequence in self._running:
                self._leave_batch(sequence)
        if not siblings:
            self._sequences.pop(uid, None)
        return removed

    def take_waiting(self) -> list[Sequence]:
        """Hands back the sequences that wait for a place, to be added again when somebody else says so.

        With a sequence 0 go those that wait for it: it may come back elsewhere.
        """
        taken = []
        for sequence in list(self._waiting):
            self._waiting.remove(sequence.request.uid, sequence.index)
            taken.append(sequence)
            if sequence.index == 0:
                taken += self._waiting_siblings.pop(sequence.request.uid, ())
        for sequence in taken:
            siblings = self._sequences[sequence.request.uid]
            del siblings[sequence.index]
            if not siblings:
                del self._sequences[sequence.request.uid]
        return taken

    def plan(self, now: float) -> StepPlan:
        """What to compute next. Whoever computes it calls `mark_computed`, then appends the sampled token to
        each sequence whose last chunk it was, or removes it.

        Raises CacheTooSmallError, and leaves all as it was, if a running sequence has outgrown the pool.
        """
        self.pool.host.begin_step()
        rank, max_tokens = self.policy.rank, self.pool.num_blocks * self.pool.block_size
        for sequence in self._running:
            if sequence.num_tokens > max_tokens:
                self.tables.require_capacity(sequence)
            sequence.rank = rank(sequence.view, now)
        self._running.sort(key=order_of)
        preempted = self._extend_tables(now)
        self._admit(now, preempted)
        host = self.pool.host
        self.num_swapped_blocks += len(host.copies_in)
        scheduled = share_budget(self._next_micro_batch(), self.budget)
        return StepPlan(scheduled, preempted, host.copies_out, host.copies_in)

    def reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Makes room for up to so many tokens behind the last of a running one; returns for how many it is.

        It takes no block that a running sequence needs next, or that a preempted one left behind.
        """
        table, pool = sequence.block_table, self.pool
        missing = pool.blocks_for(sequence.num_tokens + num_tokens) - len(table)
        if missing > 0:
            table += pool.allocate(max(0, min(missing, pool.num_unretained - len(self._running))))
        return min(num_tokens, len(table) * pool.block_size - sequence.num_tokens)

    def mark_computed(self, plan: StepPlan, now: float, num_steps: int = 1) -> None:
        """Counts what was computed, and lets other sequences find the blocks that it filled.

        Proposed tokens do not count. Each that was right is appended, then counted as a decode of its own.

        With `num_steps`, which go alike (see the simulator's `steps_ahead`), as many steps like `plan` were
        computed, and all their tokens but those of the last one are appended already.
        """
        pool, block_size = self.pool, self.pool.block_size
        for item in plan.scheduled:
            sequence = item.sequence
            first = sequence.num_computed_tokens // block_size
            num_tokens = item.num_tokens * num_steps
            sequence.num_computed_tokens += num_tokens
            self._service.count(sequence, num_tokens, now)
            last = sequence.num_computed_tokens // block_size
            if last > first:
                missing = pool.blocks_for(sequence.num_computed_tokens) - len(sequence.block_table)
                if missing > 0:
                    sequence.block_table += pool.allocate(missing)
                if pool.enable_prefix_caching:
                    sequence.hash_full_blocks(block_size)
                    for number in range(first, last):
                        pool.cache(sequence.block_table[number], sequence.block_hashes[number])
            is_leader = sequence.index == 0 and sequence.request.uid in self._waiting_siblings
            if is_leader and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
                self._release_waiting_siblings(sequence.request.uid, now)

    def observe(self, plan: StepPlan, seconds: float, num_steps: int = 1) -> None:
        """Learns how long a plan took to compute, or each of so many like it. Before `mark_computed`."""
        self.budget.observe(plan.num_prompt_tokens, seconds, num_steps)
        self.pool.host.recompute_seconds = self.pool.block_size * self.budget.prompt_token_seconds

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
        if any((sequence.view.waiting_since is None) is (sequence in waiting) for sequence in found):
            raise SchedulerError("a sequence counts as waiting that runs, or the other way round")
        self.pool.check([sequence.block_table for sequence in self._running])

    def _next_micro_batch(self) -> list[Sequence]:
        """The running sequences that the next plan may have."""
        if self.num_micro_batches == 1:
            return self._running
        free = [sequence for sequence in self._running if sequence not in self.in_flight]
        return free[: -(-len(self._running) // self.num_micro_batches)]

    # --- admission and preemption

    def _extend_tables(self, now: float) -> list[Sequence]:
        """Gives every running sequence the blocks of its tokens; returns those preempted for it."""
        preempted: list[Sequence] = []
        pool, index = self.pool, 0
        while index < len(self._running):
            sequence = self._running[index]
            missing = -(-sequence.num_tokens // pool.block_size) - len(sequence.block_table)
            if missing <= 0:
                index += 1
            elif missing <= pool.num_free:
                sequence.block_table += pool.allocate(missing)
                index += 1
            else:
                victim = self.preemption.victim_for_blocks(self._running)
                index -= self._running.index(victim) < index
                self.policy.on_evict(victim.view, now)
                preempted.append(self._preempt(victim, now))
        return preempted

    def _admit(self, now: float, preempted: list[Sequence]) -> None:
        """Moves sequences from the queue into the batch; adds those preempted for it to `preempted`.

        Those do not come back in the same plan, or under a policy that ranks a sequence worse when it is
        admitted two of them could take turns for ever.
        """
        while (sequence := self._waiting.peek(now)) is not None and sequence not in preempted:
            sequence.rank = self.policy.rank(sequence.view, now)
            candidates = self._take_blocks(sequence, now)
            if candidates is None:
                break
            preempted += candidates

    def _take_blocks(self, sequence: Sequence, now: float) -> list[Sequence] | None:
        """Admits the first of the queue, with cached blocks as far as there are any.

        Returns the sequences preempted for it; None, with nothing changed, if it does not fit. All
        its blocks are taken at once: two long prompts that fit only one after the other do not block each
        other half-way.
        """
        # Its last token is always computed, in a block of its own.
        if self.preemption.candidates(self._running, sequence, 1) is None:
            return None
        cached = self.tables.match_prefix(sequence)
        missing = self.pool.blocks_for(sequence.num_tokens) - len(cached)
        candidates = self.preemption.candidates(self._running, sequence, missing)
        if candidates is None:
            self.pool.free(cached)
            return None
        self.forget(sequence.request.uid, sequence.index)
        self._waiting.pop(now)  # before those that it preempts wait: one of them could be first
        for candidate in candidates:
            self._preempt(candidate, now)
        num_copies = len(self.pool.host.copies_in)
        self.tables.fill(sequence, cached)
        view = sequence.view
        if view.num_served_tokens:
            num_copies = len(self.pool.host.copies_in) - num_copies
            if num_copies:
                swapped = view.preemptions.num_swapped_tokens + num_copies * self.pool.block_size
                view.preemptions = replace(view.preemptions, num_swapped_tokens=swapped)
            self.num_resumed[preemption_kind(sequence, num_copies)] += 1
        else:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_cache_hit_tokens += sequence.num_cached_tokens
        view.num_served_tokens = max(view.num_served_tokens, sequence.num_computed_tokens)
        view.waiting_since = None
        sequence.rank = self.policy.rank(view, now)  # admission may have changed it
        self._running.append(sequence)
        self._running.sort(key=order_of)
        return candidates

    def _preempt(self, sequence: Sequence, now: float) -> Sequence:
        self.tables.retain(sequence)
        self.preemption.leave(sequence)
        self._leave_batch(sequence, retain=True)
        sequence.view.waiting_since = now
        sequence.view.num_tokens = sequence.num_tokens
        preemptions = sequence.view.preemptions
        sequence.view.preemptions = replace(preemptions, count=preemptions.count + 1)
        self._waiting.push(sequence, sequence.view, now)
        self.num_preemptions += 1
        return sequence

    def _leave_batch(self, sequence: Sequence, retain: bool = False) -> None:
        self._running.remove(sequence)
        self.in_flight.pop(sequence, None)
        self.pool.free(sequence.block_table, retain)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def _release_waiting_siblings(self, uid: str, now: float) -> None:
        for sequence in self._waiting_siblings.pop(uid, ()):
            self._waiting.push(sequence, sequence.view, now)
