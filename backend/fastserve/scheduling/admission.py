"""The common queue of all engines: which requests wait, and which may go to the engine now."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastserve.errors import ErrorCode, RequestError, prompt_too_long
from fastserve.scheduling.policies import Policy
from fastserve.scheduling.waiting_queue import QueueFullError, WaitingQueue
from fastserve.types import EngineCapacity, Request

LOST_AFTER_SECONDS = 10.0
"""A released request that, as the engine says, has not reached it so long after has been lost."""
MAX_PREEMPTING_IN_FLIGHT = 8
"""Requests that may be on their way to preempt another.

One message tells of one lowest key: how many slots can be preempted is not known before the requests arrive.
Each that finds none waits in the worker, where it cannot time out as it does here.
"""


@dataclass(frozen=True, slots=True)
class _Release:
    """A request on its way: the engine's numbers do not count it yet."""

    time: float
    num_slots: int
    preempts: bool


class AdmissionQueue:
    """Holds requests, and releases the one of the highest key whenever the engine has room for it.

    A request needs a slot for each of its `n` sequences, or all slots of an engine that has fewer. It goes
    when there are as many free that nobody on the way will take; or, beyond that, when its key is above the
    lowest one that holds a slot: the engine preempts that sequence at the next iteration.

    What has been released takes room until the engine's numbers account for it, however long a step takes. It
    is given up only when the engine says, long after the release, that it has not come.
    """

    def __init__(self, policy: Policy, max_queue_size: int, max_queue_seconds: float) -> None:
        """`max_queue_seconds`: how long a request may wait here; 0: for ever."""
        self._policy = policy
        self._max_queue_seconds = max_queue_seconds
        self._waiting: WaitingQueue[Request] = WaitingQueue(max_queue_size)
        self._capacity: EngineCapacity | None = None
        self._retired: set[str] = set()
        """Incarnations that another has followed: what still comes of them is out of date."""
        self._max_slots = 0
        """The most slots that this incarnation has had free: all of them, as its first message tells."""
        self._in_flight: deque[_Release] = deque()
        self._checked_max_model_len: int | None = None
        """The limit that all waiting requests are known to keep."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def waiting_by_priority(self) -> dict[int, int]:
        """How many wait of each priority that was ever seen: 0 where nobody does any more."""
        return self._waiting.count_by_priority()

    @property
    def next_expiry(self) -> float | None:
        """When time alone gives `expire` or `release` something to do; None: never."""
        times = [self._waiting.next_deadline]
        if self._waiting and self._in_flight and not self._has_engine_report:
            times.append(self._in_flight[0].time + LOST_AFTER_SECONDS)
        return min((time for time in times if time is not None), default=None)

    @property
    def _has_engine_report(self) -> bool:
        return self._capacity is not None and self._capacity.time > 0.0

    def submit(self, request: Request, now: float) -> None:
        """Takes a request into the queue.

        Raises RequestError: UNAVAILABLE when the queue is full, INVALID_ARG for a prompt that the engine's KV
        cache can never hold.
        """
        self._check_length(request)
        deadlines = [request.deadline] if request.deadline is not None else []
        if self._max_queue_seconds:
            deadlines.append(now + self._max_queue_seconds)
        try:
            self._waiting.push(
                request,
                uid=request.uid,
                key=self._policy.key(request.priority, request.arrival),
                arrival=request.arrival,
                priority=request.priority_label,
                deadline=min(deadlines, default=None),
            )
        except QueueFullError as error:
            raise RequestError(
                f"the queue is full: {error} (`max_queue_size`)", ErrorCode.UNAVAILABLE
            ) from error

    def update(self, capacity: EngineCapacity) -> None:
        """Learns what room the engine has. A message that is older than one seen before changes nothing."""
        if capacity.incarnation in self._retired:
            return
        last = self._capacity
        if last is not None and last.incarnation == capacity.incarnation and capacity.serial <= last.serial:
            return
        if last is not None and last.incarnation != capacity.incarnation:
            self._retired.add(last.incarnation)
            self._max_slots = 0
        # The engine counts across its workers, so these differences hold across them too.
        num_accounted = capacity.received - last.received if last is not None else 0
        for _ in range(min(num_accounted, len(self._in_flight))):
            self._in_flight.popleft()
        self._max_slots = max(self._max_slots, capacity.free_slots)
        self._capacity = capacity
        if self._has_engine_report:
            self._drop_lost(capacity.time, num_arrived=capacity.arrived - capacity.received)

    def _drop_lost(self, as_of: float, num_arrived: int) -> None:
        """Forgets requests released long before `as_of`, but for as many as had arrived by then."""
        num_old = sum(each.time + LOST_AFTER_SECONDS <= as_of for each in self._in_flight)
        for _ in range(num_old - num_arrived):
            self._in_flight.popleft()

    def refuse_too_long(self) -> list[tuple[Request, RequestError]]:
        """Waiting requests that the engine's KV cache can never hold, each with its error. They leave."""
        if self._capacity is None or self._capacity.max_model_len == self._checked_max_model_len:
            return []
        self._checked_max_model_len = self._capacity.max_model_len
        refused = []
        for request in list(self._waiting):
            try:
                self._check_length(request)
            except RequestError as error:
                self._waiting.remove(request.uid)
                refused.append((request, error))
        return refused

    def _check_length(self, request: Request) -> None:
        limit = None if self._capacity is None else self._capacity.max_model_len
        if limit is not None and len(request.prompt_token_ids) >= limit:
            raise prompt_too_long(len(request.prompt_token_ids), limit)

    def release(self, now: float) -> list[Request]:
        """The requests that go to the engine now, the highest key first. They wait no longer."""
        if not self._has_engine_report:
            self._drop_lost(now, num_arrived=0)
        released: list[Request] = []
        if self._capacity is None:
            return released
        while (request := self._waiting.peek()) is not None:
            num_slots = min(request.sampling.n, max(1, self._max_slots))
            fits = num_slots <= self._slots_left(self._capacity)
            if not fits and not self._may_preempt(request, self._capacity):
                break
            self._waiting.pop()
            self._in_flight.append(_Release(now, num_slots, preempts=not fits))
            released.append(request)
        return released

    def expire(self, now: float) -> list[Request]:
        """The requests that have waited too long: for this queue, or for their own deadline. They leave."""
        return self._waiting.expired(now)

    def _slots_left(self, capacity: EngineCapacity) -> int:
        return capacity.free_slots - sum(each.num_slots for each in self._in_flight)

    def _may_preempt(self, request: Request, capacity: EngineCapacity) -> bool:
        if (
            capacity.lowest_key is None
            or self._policy.key(request.priority, request.arrival) <= capacity.lowest_key
        ):
            return False
        return sum(each.preempts for each in self._in_flight) < MAX_PREEMPTING_IN_FLIGHT
