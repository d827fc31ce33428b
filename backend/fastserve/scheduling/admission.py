"""The common queue of all engine replicas: what waits, and what may run now, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastserve.config import Config
from fastserve.errors import ErrorCode, RequestError, prompt_too_long
from fastserve.scheduling.block_pool import root_hash
from fastserve.scheduling.block_tables import tokens_to_reserve
from fastserve.scheduling.capacity import (
    EngineCapacity,
    Event,
    Finished,
    Preempted,
    Released,
    ResumeList,
    TenantTokens,
)
from fastserve.scheduling.outbox import Outbox
from fastserve.scheduling.overtaking import OvertakingCounter
from fastserve.scheduling.policies.policy import Policy, Rank
from fastserve.scheduling.prefix_index import block_hashes
from fastserve.scheduling.quotas import Quotas
from fastserve.scheduling.replica import LOST_AFTER_SECONDS, Demand, Replica
from fastserve.scheduling.request_labels import Labels, RequestLabels
from fastserve.scheduling.waiting_queue import WaitingQueue
from fastserve.types import Request, RequestView, Resume, view_of


@dataclass(slots=True)
class Waiting:
    """A request that waits to run, or one sequence of it that was preempted."""

    view: RequestView
    request: Request | None
    """None for a preempted sequence, which the engine has."""
    num_slots: int
    replica: int | None = None
    """Where it ran last."""
    can_move: bool = True
    """Whether it may run elsewhere."""
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of its prompt."""


@dataclass(frozen=True, slots=True)
class _Placement:
    replica: int
    demand: Demand
    num_preempted: int = 0


class AdmissionQueue:
    """Holds everything that waits, and releases the first by rank whenever a replica can take it.

    Everything: sequences that were preempted wait here too, so there is one queue and one order. Nothing is
    released out of turn, however well it would fit.

    A request goes to a replica that has room: a slot for each of its `n` sequences, KV blocks for its prompt,
    and tokens left in its next step. Among those, and others that lack such tokens but hold some of its
    prompt, it goes where the fewest tokens have to be computed before its first one (what waits there to be
    computed, and what the prefix cache there does not hold), then where the fewest run. If none has room, it
    takes the place of the sequence of the last rank that the policy allows it to preempt.
    """

    def __init__(
        self,
        policy: Policy,
        max_queue_size: int,
        max_queue_seconds: float,
        quotas: Quotas | None = None,
        labels: RequestLabels | None = None,
    ) -> None:
        """`max_queue_seconds`: how long a request may wait before it first runs; 0: for ever.

        `quotas`: None for none; `labels`: those of the default settings unless given.
        """
        self._policy = policy
        self._max_queue_size = max_queue_size
        self._max_queue_seconds = max_queue_seconds
        self._quotas = quotas or Quotas({})
        self._labels = labels or RequestLabels(Config())
        self._waiting: WaitingQueue[Waiting] = WaitingQueue(policy)
        self._num_new = 0
        """Of those that wait, the ones that have not run yet."""
        self._overtaking = OvertakingCounter()
        self._replicas: list[Replica] = []
        self._capacity: EngineCapacity | None = None
        self._events_seen = 0
        self._resumes: Outbox[Resume] = Outbox()
        self._checked_max_model_len: int | None = None
        """The limit that all waiting requests are known to keep."""

    @property
    def num_waiting(self) -> int:
        """Requests and preempted sequences in the queue."""
        return len(self._waiting)

    @property
    def has_free_slot(self) -> bool:
        """Whether some replica has a slot that nobody on the way will take."""
        return any(replica.free_slots > 0 for replica in self._replicas)

    def waiting_by_label(self) -> dict[Labels, int]:
        """How many wait under the labels that were ever seen: 0 where nobody does any more."""
        return self._waiting.count_by_label()

    @property
    def next_expiry(self) -> float | None:
        """When time alone gives `expire` or `release` something to do; None: never."""
        times = [self._waiting.next_deadline, self._waiting.next_change]
        if self._waiting and not self._has_engine_report:
            oldest = [each.oldest_release for each in self._replicas]
            times += [time + LOST_AFTER_SECONDS for time in oldest if time is not None]
        return min((time for time in times if time is not None), default=None)

    @property
    def _has_engine_report(self) -> bool:
        return self._capacity is not None and self._capacity.time > 0.0

    def submit(self, request: Request, now: float) -> None:
        """Takes a request into the queue.

        Raises RequestError: UNAVAILABLE when the queue is full, INVALID_ARG for a prompt that the engine's KV
        cache can never hold, what `Quotas.admit` says; ValueError for one that waits already.
        """
        self._check_length(request)
        if self._num_new >= self._max_queue_size:
            raise RequestError(
                f"the queue is full: {self._num_new} wait already; allowed: at most {self._max_queue_size} "
                "(`max_queue_size`)",
                ErrorCode.UNAVAILABLE,
            )
        self._quotas.admit(request, now)
        deadlines = [request.deadline] if request.deadline is not None else []
        if self._max_queue_seconds:
            deadlines.append(now + self._max_queue_seconds)
        view = view_of(request)
        self._waiting.push(
            Waiting(view, request, request.sampling.n),
            view,
            now,
            label=self._labels.of(view),
            deadline=min(deadlines, default=None),
        )
        self._num_new += 1

    def update(self, capacity: EngineCapacity, now: float) -> None:
        """Learns what the engine could take. A message older than one seen before changes nothing."""
        last = self._capacity
        if last is not None and last.time > 0.0 and capacity.serial <= last.serial:
            return
        self._capacity = capacity
        while len(self._replicas) < len(capacity.replicas):
            self._replicas.append(Replica())
        for replica, each in zip(self._replicas, capacity.replicas, strict=True):
            replica.update(each)
            if self._has_engine_report:
                replica.drop_lost(capacity.time)
        self._resumes.acknowledge(capacity.resumes_seen)
        if capacity.events_number > self._events_seen:
            self._events_seen = capacity.events_number
            for event in capacity.events:
                self._take_event(event, now)

    def _take_event(self, event: Event, now: float) -> None:
        if isinstance(event, Preempted):
            view = event.view
            waiting = Waiting(view, None, 1, event.replica, event.can_move)
            self._waiting.push(waiting, view, now, label=self._labels.of(view))
        elif isinstance(event, TenantTokens):
            self._policy.on_tenant_service(event.tenant, event.num_prompt_tokens, event.num_output_tokens)
        elif isinstance(event, Finished):
            self._quotas.end(event.uid, event.num_tokens)
        else:
            self._waiting.remove(event.uid, event.index)

    def take_resumes(self) -> ResumeList:
        """Which preempted sequences run again, as far as the engine has not said that it knows."""
        resumes = self._resumes.batch()
        return ResumeList(self._resumes.number, resumes, len(self._waiting))

    def refuse_too_long(self) -> list[tuple[Request, RequestError]]:
        """Waiting requests that the engine's KV cache can never hold, each with its error. They leave."""
        if self._capacity is None or self._capacity.max_model_len == self._checked_max_model_len:
            return []
        self._checked_max_model_len = self._capacity.max_model_len
        refused = []
        for waiting in list(self._waiting):
            if waiting.request is not None:
                try:
                    self._check_length(waiting.request)
                except RequestError as error:
                    self._waiting.remove(waiting.view.uid)
                    self._num_new -= 1
                    self._quotas.end(waiting.view.uid, 0)
                    refused.append((waiting.request, error))
        return refused

    def _check_length(self, request: Request) -> None:
        limit = None if self._capacity is None else self._capacity.max_model_len
        if limit is not None and len(request.prompt_token_ids) >= limit:
            raise prompt_too_long(len(request.prompt_token_ids), limit)

    def expire(self, now: float) -> list[Request]:
        """The requests that have waited too long: for this queue, or for their own deadline. They leave."""
        expired = [each.request for each in self._waiting.expired(now) if each.request is not None]
        self._num_new -= len(expired)
        for request in expired:
            self._quotas.end(request.uid, 0)
        return expired

    def peek(self, now: float) -> Waiting | None:
        """The first by rank; None if nobody waits."""
        return self._waiting.peek(now)

    def release(self, now: float) -> list[Released]:
        """The requests that run now, the first by rank first. They wait no longer.

        Preempted sequences whose turn it is are told by `take_resumes`.
        """
        if not self._has_engine_report:
            for replica in self._replicas:
                replica.drop_lost(now)
        released: list[Released] = []
        while (waiting := self._waiting.peek(now)) is not None:
            placement = self._place(waiting, now)
            if placement is None:
                break
            self._waiting.pop(now)
            self._num_new -= waiting.request is not None
            replica = self._replicas[placement.replica]
            replica.release(now, placement.demand, placement.num_preempted)
            replica.prefixes.insert(waiting.hashes)
            if waiting.request is None:
                self._resumes.add(Resume(waiting.view.uid, waiting.view.index, placement.replica))
            else:
                overtaken_by = self._overtaking.release(waiting.request.arrival)
                released.append(Released(waiting.request, placement.replica, overtaken_by))
        return released

    # --- where it runs

    def _place(self, waiting: Waiting, now: float) -> _Placement | None:
        """The replica that takes it, if one does."""
        self.hash_prompt(waiting)
        numbers = range(len(self._replicas))
        if waiting.replica is not None and not waiting.can_move:
            numbers = range(waiting.replica, waiting.replica + 1)
        demands = {number: self._demand(waiting, number) for number in numbers}
        with_room = {
            number: demand for number, demand in demands.items() if self._replicas[number].has_room(demand)
        }
        if with_room:
            best = self.choose(waiting, {**with_room, **self._with_prefix(demands)})
            return _Placement(best, demands[best])
        rank = self._policy.rank(waiting.view, now)
        worst: tuple[Rank, int, int] | None = None
        has_bounced = waiting.request is None and not waiting.view.num_served_tokens
        for number in numbers:
            demand = demands[number]
            if has_bounced:  # what it could share with those that run there is not known here
                demand = replace(demand, num_blocks=0)
            victim = self._replicas[number].victim(demand, rank, self._policy)
            if victim is not None and (worst is None or victim[0] > worst[0]):
                worst = (victim[0], number, victim[1])
        return None if worst is None else _Placement(worst[1], demands[worst[1]], worst[2])

    def _with_prefix(self, demands: Mapping[int, Demand]) -> dict[int, Demand]:
        """The replicas that have a place and some of the prompt: where others' prompts are computed first, it
        may be cheaper to wait for that than to compute everything elsewhere."""
        replicas = self._replicas
        return {
            number: demand
            for number, demand in demands.items()
            if demand.num_cached_tokens and replicas[number].has_place(demand)
        }

    def choose(self, waiting: Waiting, with_room: Mapping[int, Demand]) -> int:
        """Of the replicas that have room, by number, the one that it runs on: that of the least cost."""
        return min(with_room, key=lambda number: self._cost(waiting, number, with_room[number]))

    def _cost(self, waiting: Waiting, number: int, demand: Demand) -> tuple[int, int, int]:
        """Tokens to be computed before its first one, then the load; a preempted one goes where it was."""
        replica = self._replicas[number]
        tokens_ahead = max(0, -replica.free_tokens)
        return (demand.num_tokens + tokens_ahead, int(number != waiting.replica), replica.load)

    def _demand(self, waiting: Waiting, number: int) -> Demand:
        """What it takes of that replica."""
        block_size = self._capacity.block_size if self._capacity else 0
        num_tokens, num_blocks, num_reserved = waiting.view.num_tokens, 0, 0
        if block_size:
            num_blocks = -(-num_tokens // block_size)
            end = num_tokens + tokens_to_reserve(waiting.view, num_tokens)
            num_reserved = (-(-end // block_size) - num_blocks) * waiting.num_slots
        if waiting.replica is not None and waiting.replica == number:
            # Its blocks are there, as far as they have not been evicted: it lacks its last token.
            return Demand(1, num_blocks, 1, num_reserved_blocks=num_reserved)
        replica = self._replicas[number]
        num_cached = replica.prefixes.match(waiting.hashes)
        return replica.clip(
            Demand(
                waiting.num_slots,
                num_blocks - num_cached,
                max(1, num_tokens - num_cached * block_size),
                num_cached * block_size,
                num_reserved,
            )
        )

    def hash_prompt(self, waiting: Waiting) -> None:
        """Once, when a replica may be chosen for it: hashing costs some 100 us for 1,000 tokens."""
        block_size = self._capacity.block_size if self._capacity else 0
        if block_size and waiting.request is not None and not waiting.hashes:
            request = waiting.request
            waiting.hashes = block_hashes(request.prompt_token_ids, block_size, root_hash(request.cache_salt))
