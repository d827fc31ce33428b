"""An engine replica whose steps take the time that a model says, and compute nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import cast

from fastserve.scheduling.batch_report import free_blocks, report_batch
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.capacity import ReplicaCapacity
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.sequence import StepPlan
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulated_sequence import SimulatedSequence
from fastserve.simulation.step_run import StepRun
from fastserve.simulation.step_time import StepWork, prompt_pairs
from fastserve.simulation.steps_ahead import steps_ahead


class SimulatedReplica:
    """The server's iteration scheduler and block pool, driven as the worker drives them.

    `start` takes in what has come and plans a step, `finish` says that it has been computed. While nothing
    but decodes is planned a run of many steps is started at once; `finish` may end it after any of them.
    """

    def __init__(
        self, number: int, settings: SimulationSettings, policy: Policy, max_request_tokens: int
    ) -> None:
        """`max_request_tokens`: no request of the workload has more, prompt and answer together."""
        self.number = number
        self.run: StepRun | None = None
        """What is being computed."""
        self.left: list[SimulatedSequence] = []
        """What has no place in it, which is said when it ends."""
        self.preempted: list[SimulatedSequence] = []
        """What lost its place when it began."""
        self.version = 0
        """Of the run's end: earlier ones are void."""
        self.scheduler = IterationScheduler(
            BlockPool(
                settings.num_blocks,
                settings.block_size,
                settings.enable_prefix_caching,
                settings.num_host_blocks,
            ),
            policy,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.target_itl_seconds,
        )
        self.scheduler.pool.host.copy_seconds = settings.block_copy_seconds
        self.num_computed_tokens = 0
        self.busy_seconds = 0.0
        self.block_seconds = 0.0
        """KV blocks in use, over time."""
        self.tenant_tokens: Counter[str] = Counter()
        """Tokens of answers that were computed for each since the queue was told; none for a second time."""
        self._settings = settings
        self._policy = policy
        self._changes_rank = policy.overrides(Policy.on_service)
        self._counts_tenants = policy.overrides(Policy.on_tenant_service)
        self._max_request_blocks = -(-max_request_tokens // settings.block_size)
        self._inbox: deque[tuple[float, SimulatedSequence]] = deque()
        self._num_arrived = 0
        self._num_received = 0
        self._reported_slots = 0

    @property
    def is_idle(self) -> bool:
        """Whether no step is being computed."""
        return self.run is None

    def receive(self, sequence: SimulatedSequence, now: float) -> None:
        """A release has come; the next step takes it in."""
        self._inbox.append((now, sequence))
        self._num_arrived += 1

    def capacity(self) -> ReplicaCapacity:
        """What it could take, between two steps."""
        scheduler = self.scheduler
        report = report_batch(scheduler, self._settings.max_num_seqs)
        self._reported_slots = report.free_slots
        return ReplicaCapacity(
            incarnation="simulated",
            received=self._num_received,
            arrived=self._num_arrived,
            num_running=scheduler.num_running,
            num_blocks=self._settings.num_blocks,
            **report._asdict(),
        )

    def start(self, now: float, somebody_waits: bool, has_free_slot: bool) -> list[SimulatedSequence]:
        """Plans a step, or a run of them, if there is something to compute. Returns what has no place in the
        batch: preempted, or come too late. `somebody_waits`: in the common queue. `has_free_slot`: as the
        queue knows, some replica has."""
        num_new = self._take_in(now)
        plan = self.scheduler.plan(now)
        self.preempted = cast("list[SimulatedSequence]", plan.preempted)
        left = cast("list[SimulatedSequence]", self.scheduler.take_waiting())
        if plan.scheduled:
            # A step goes alone if there is news for the queue after it, or if somebody comes.
            has_news = num_new or left or self.scheduler.free_slots != self._reported_slots
            self.run = self._run(plan, now, somebody_waits, has_free_slot, not (has_news or self._inbox))
        return left

    def _take_in(self, now: float) -> int:
        """Adds what had come by then; returns how many. After a run cut short, `now` is past."""
        num_new = 0
        while self._inbox and self._inbox[0][0] <= now:
            self.scheduler.add(self._inbox.popleft()[1], now)
            num_new += 1
        self._num_received += num_new
        return num_new

    def finish(self, num_steps: int) -> list[SimulatedSequence]:
        """So many steps of the run have been computed; the sequences that have a new token.

        Those whose answer is complete have left the scheduler.
        """
        run = self.run
        assert run is not None
        now = run.end(num_steps)
        self.run = None
        self.version += 1
        self.busy_seconds += now - run.start
        self.scheduler.observe(run.plan, (now - run.start) / num_steps, num_steps)
        sampled = [
            cast("SimulatedSequence", item.sequence) for item in run.plan.scheduled if item.is_last_chunk
        ]
        self.num_computed_tokens += run.plan.num_tokens * num_steps
        served = [(each, each.view.num_served_tokens) for each in sampled] if self._counts_tenants else []
        if num_steps > 1:
            for sequence in sampled:
                sequence.append(num_steps - 1)
        pool, num_used = self.scheduler.pool, self.scheduler.pool.num_used
        self.scheduler.mark_computed(run.plan, now, num_steps)
        self.block_seconds += (num_used + pool.num_used) / 2 * (now - run.start)
        for sequence, before in served:
            view = sequence.view
            self.tenant_tokens[view.tenant] += view.num_served_tokens - max(before, view.num_prompt_tokens)
        for sequence in sampled:
            sequence.append(1)
            if sequence.num_generated_tokens == sequence.num_output_tokens:
                self.scheduler.remove(sequence.request.uid, now=now)
        return sampled

    def _run(
        self, plan: StepPlan, now: float, somebody_waits: bool, has_free_slot: bool, may_jump: bool
    ) -> StepRun:
        work = self._work(plan)
        seconds = self._settings.step_time.seconds(*work)
        num_copies = len(plan.copies_out) + len(plan.copies_in)
        seconds += self._settings.block_copy_seconds * num_copies
        scheduler = self.scheduler
        is_full = scheduler.num_running == self._settings.max_num_seqs
        num_steps, until_rank_changes = 1, None
        if may_jump and not num_copies and work.num_decode_tokens == scheduler.num_running:
            sequences = cast("list[SimulatedSequence]", [item.sequence for item in plan.scheduled])
            num_steps = self._steps_to_event(sequences)
            if self._changes_rank:
                until_rank_changes = _least(self._policy.tokens_at_once(each.view) for each in sequences)
            if somebody_waits:
                if has_free_slot or not is_full:
                    num_steps = 1
                elif until_rank_changes is not None:
                    num_steps = min(num_steps, until_rank_changes)
            if num_steps > 1:
                num_steps = steps_ahead(scheduler, plan, num_steps)
        ignores_ranks = until_rank_changes is None or num_steps <= until_rank_changes
        return StepRun(
            plan,
            now,
            seconds,
            self._settings.step_time.seconds_per_context_token * work.num_decode_tokens,
            num_steps,
            ignores_arrivals=num_steps == 1 or (is_full and ignores_ranks),
            is_quiet=num_steps == 1
            or (not self._changes_rank and (is_full or self._has_ample_blocks(num_steps))),
        )

    @staticmethod
    def _steps_to_event(sequences: Iterable[SimulatedSequence]) -> int:
        """Until a first or a last token comes."""
        return min(
            each.num_output_tokens - each.num_generated_tokens if each.num_generated_tokens else 1
            for each in sequences
        )

    def _has_ample_blocks(self, num_steps: int) -> bool:
        """Whether the longest request finds room even after so many steps."""
        scheduler, size = self.scheduler, self._settings.block_size
        growth = scheduler.num_running * (num_steps // size + 2)
        return free_blocks(scheduler) - growth >= self._max_request_blocks

    @staticmethod
    def _work(plan: StepPlan) -> StepWork:
        num_decodes = num_prompt_tokens = num_context_tokens = num_pairs = 0
        for item in plan.scheduled:
            sequence = item.sequence
            if item.num_tokens == 1 and sequence.num_computed_tokens + 1 == sequence.num_tokens:
                num_decodes += 1
                num_context_tokens += sequence.num_tokens
            else:
                num_prompt_tokens += item.num_tokens
                num_pairs += prompt_pairs(sequence.num_computed_tokens, item.num_tokens)
        return StepWork(len(plan.scheduled), num_prompt_tokens, num_decodes, num_context_tokens, num_pairs)


def _least(numbers: Iterable[int | None]) -> int | None:
    """The least of those that are not None."""
    return min((number for number in numbers if number is not None), default=None)
