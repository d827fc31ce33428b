"""The common queue and its replicas, with a step of delay on every message, and no model: who runs when."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.scheduling.conftest import sequences_of

from fastserve.scheduling.admission import AdmissionQueue
from fastserve.scheduling.batch_report import report_batch
from fastserve.scheduling.block_pool import BlockPool
from fastserve.scheduling.capacity import (
    EngineCapacity,
    Event,
    Preempted,
    ReplicaCapacity,
    TenantTokens,
)
from fastserve.scheduling.iteration_scheduler import IterationScheduler
from fastserve.scheduling.outbox import Outbox
from fastserve.scheduling.policies.fair import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.sequence import ScheduledSequence, Sequence
from fastserve.types import Request, RequestView

Key = tuple[str, int]
"""A sequence: uid and index."""


@dataclass(frozen=True)
class Admission:
    """A sequence gets a place in a batch."""

    time: float
    replica: int
    view: RequestView
    overtaken: list[RequestView]
    """Those in the common queue then that were there already when it was released."""


@dataclass
class Worker:
    """One replica: what it was sent waits until its next step begins."""

    scheduler: IterationScheduler
    inbox: list[Sequence] = field(default_factory=list)
    arrived: int = 0
    received: int = 0


class Watched(Policy):
    """A policy of the common queue that looks, at each release, whether one of lower rank waits there."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.waiting: dict[Key, RequestView] = {}
        self.rank = policy.rank  # type: ignore[method-assign]
        self.preempts = policy.preempts  # type: ignore[method-assign]
        self.group = policy.group  # type: ignore[method-assign]
        self.order = policy.order  # type: ignore[method-assign]
        self.next_change = policy.next_change  # type: ignore[method-assign]
        self.on_tenant_service = policy.on_tenant_service  # type: ignore[method-assign]

    def on_enqueue(self, view: RequestView, now: float) -> None:
        self.waiting[(view.uid, view.index)] = view
        self.policy.on_enqueue(view, now)

    def on_admit(self, view: RequestView, now: float) -> None:
        rank = self.policy.rank(view, now)
        del self.waiting[(view.uid, view.index)]
        overtaken = [each for each in self.waiting.values() if self.policy.rank(each, now) < rank]
        assert not overtaken, f"{view} is released before {overtaken[0]}"
        self.policy.on_admit(view, now)

    def on_abandon(self, view: RequestView) -> None:
        del self.waiting[(view.uid, view.index)]
        self.policy.on_abandon(view)


class Cluster:
    """All replicas step together, every `step_seconds`. What the queue releases is there a step later."""

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        num_replicas: int = 1,
        *,
        num_blocks: int = 200,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 32,
        num_host_blocks: int = 0,
        prefix_caching: bool = True,
        step_seconds: float = 0.1,
    ) -> None:
        self.policy = Watched(make_policy())
        self.queue = AdmissionQueue(self.policy, max_queue_size=10**9, max_queue_seconds=0.0)
        self.workers = [
            Worker(
                IterationScheduler(
                    BlockPool(num_blocks, block_size, prefix_caching, num_host_blocks),
                    make_policy(),
                    max_num_seqs,
                    max_num_batched_tokens,
                )
            )
            for _ in range(num_replicas)
        ]
        self.step_seconds = step_seconds
        self.now = 0.0
        self.num_steps = 0
        self.events: Outbox[Event] = Outbox()
        self.resumes_seen = 0
        self.released: dict[Key, set[Key]] = {}
        """Who waited in the queue when each was last released."""
        self.away: dict[Key, Sequence] = {}
        """Sequences that were handed back."""
        self.admissions: list[Admission] = []
        self.num_bounced = 0
        """Releases that found no place and came straight back."""
        self.num_computed = 0
        self.requests: dict[str, Request] = {}
        self.num_unended: Counter[str] = Counter()
        self.ended: dict[str, float] = {}
        """When the last sequence of each request ended."""
        self.service: dict[str, float] = defaultdict(float)
        """What each tenant was served, weighted by the cost of tokens."""
        self.update()

    def submit(self, request: Request) -> None:
        """It joins the queue now."""
        self.requests[request.uid] = request
        self.num_unended[request.uid] = request.sampling.n
        self.queue.submit(request, self.now)
        self.release()

    def step(self) -> None:
        """One step of every replica, then what the queue makes of their reports."""
        self.num_steps += 1
        for number, worker in enumerate(self.workers):
            self.run(number, worker)
        self.now += self.step_seconds
        self.update()

    def run(self, number: int, worker: Worker) -> None:
        scheduler = worker.scheduler
        arrived, worker.inbox = worker.inbox, []
        worker.received = worker.arrived
        for sequence in arrived:
            scheduler.add(sequence, self.now)
        plan = scheduler.plan(self.now)
        waiting = scheduler.take_waiting()
        for sequence in waiting:
            self.hand_back(number, sequence, arrived)
        for sequence in arrived:
            if sequence.view.waiting_since is None:
                self.note_admission(number, sequence.view)
        self.num_computed += plan.num_tokens
        ended = [item.sequence for item in plan.scheduled if item.is_last_chunk]
        self.count_service(plan.scheduled)
        scheduler.mark_computed(plan, self.now + self.step_seconds)
        for sequence in ended:
            sequence.token_ids.append(sequence.num_tokens % 7)
            if sequence.num_generated_tokens == sequence.request.sampling.max_tokens:
                self.end(scheduler, sequence)

    def note_admission(self, replica: int, view: RequestView) -> None:
        waiting = self.policy.waiting
        overtaken = [waiting[key] for key in self.released[(view.uid, view.index)] if key in waiting]
        self.admissions.append(Admission(self.now, replica, view, overtaken))

    def count_service(self, scheduled: list[ScheduledSequence]) -> None:
        """As the engine tells the queue: what was computed for the first time."""
        for item in scheduled:
            view = item.sequence.view
            end = item.sequence.num_computed_tokens + item.num_tokens
            new = max(0, end - view.num_served_tokens)
            prompt = min(new, max(0, view.num_prompt_tokens - view.num_served_tokens))
            self.service[view.tenant] += PROMPT_TOKEN_COST * prompt + OUTPUT_TOKEN_COST * (new - prompt)
            self.events.add(TenantTokens(view.tenant, prompt, new - prompt))

    def hand_back(self, number: int, sequence: Sequence, arrived: list[Sequence]) -> None:
        key = (sequence.request.uid, sequence.index)
        assert key not in self.away
        self.away[key] = sequence
        self.num_bounced += sequence in arrived
        self.events.add(Preempted(number, sequence.view, can_move=sequence.request.sampling.n == 1))

    def end(self, scheduler: IterationScheduler, sequence: Sequence) -> None:
        uid = sequence.request.uid
        scheduler.remove(uid, sequence.index, now=self.now)
        self.num_unended[uid] -= 1
        if not self.num_unended[uid]:
            self.ended[uid] = self.now + self.step_seconds

    def update(self) -> None:
        """A report, and the answer to it."""
        capacity = EngineCapacity(
            serial=self.num_steps + 1,
            time=max(self.now, 1e-9),
            replicas=[self.capacity_of(worker) for worker in self.workers],
            events=self.events.batch(),
            events_number=self.events.number,
            resumes_seen=self.resumes_seen,
            block_size=self.workers[0].scheduler.pool.block_size,
        )
        self.queue.update(capacity, self.now)
        self.events.acknowledge(capacity.events_number)
        self.release()

    def capacity_of(self, worker: Worker) -> ReplicaCapacity:
        scheduler = worker.scheduler
        return ReplicaCapacity(
            incarnation="a",
            received=worker.received,
            arrived=worker.arrived,
            num_running=scheduler.num_running,
            num_blocks=scheduler.pool.num_blocks,
            **report_batch(scheduler, 16)._asdict(),
        )

    def release(self) -> None:
        for release in self.queue.release(self.now):
            worker = self.workers[release.replica]
            worker.arrived += 1
            for sequence in sequences_of(release.request):
                self.released[(release.request.uid, sequence.index)] = set(self.policy.waiting)
                worker.inbox.append(sequence)
        answer = self.queue.take_resumes()
        if answer.number > self.resumes_seen:
            self.resumes_seen = answer.number
            for resume in answer.resumes:
                key = (resume.uid, resume.index)
                self.released[key] = set(self.policy.waiting)
                self.workers[resume.replica].arrived += 1
                self.workers[resume.replica].inbox.append(self.away.pop(key))

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return len(self.ended) == len(self.requests)
