"""Discrete events: requests arrive, steps end, messages come, and between them nothing happens.

    arrival -> queue -> (message_delay) -> replica: [step -> step -> ...] -> (message_delay) -> queue

Everything that decides is the server's own code. A replica that only decodes takes many steps at once, as
long as neither its scheduler nor the queue would do anything in them; times are those of step after step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from fastserve.scheduling.capacity import EngineCapacity, Event, Preempted, ReplicaCapacity, TenantTokens
from fastserve.scheduling.policies.policy import Policy
from fastserve.simulation.result import Records, SimulationResult, Totals
from fastserve.simulation.settings import SimulationSettings
from fastserve.simulation.simulated_queue import RoundRobinQueue, SimulatedQueue
from fastserve.simulation.simulated_replica import SimulatedReplica
from fastserve.simulation.simulated_sequence import SimulatedSequence, prompt_block_names
from fastserve.types import OutputOptions, Request, SamplingParams
from fastserve.workload.arrival import Arrival

START = 1e-9
"""When the replicas say for the first time what they could take: time 0 stands for `never`."""
NUM_QUEUE_SAMPLES = 1000


class SimulationError(Exception):
    """Requests wait and nothing will happen any more: there is a bug in the scheduling code."""


class Report(NamedTuple):
    """What a replica tells the queue between two steps."""

    time: float
    replica: int
    capacity: ReplicaCapacity
    events: list[Event]


class Simulation:
    """One run of a workload under a policy."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        make_policy: Callable[[], Policy],
        settings: SimulationSettings,
        *,
        is_clairvoyant: bool = False,
        max_tokens: int | None = None,
        length_hints: Sequence[int] | None = None,
        jumps: bool = True,
        on_end: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`make_policy`: called for the queue and for each replica.

        `is_clairvoyant`: the policy is told the true lengths of answers; else `max_tokens` (None: the longest
        answer of the workload), as a client would ask for. `length_hints`: what each request says of its
        answer's length; None: nothing. `jumps`: take many steps at once where nothing
        changes. `on_end`: called with the number of requests that have ended, every now and then.

        Raises ValueError for a request that a replica's cache cannot hold, or an empty workload.
        """
        if not arrivals:
            raise ValueError("a workload without requests")
        self._arrivals = arrivals
        self._settings = settings
        self._is_clairvoyant = is_clairvoyant
        self._max_tokens = max_tokens or max(each.num_output_tokens for each in arrivals)
        self._length_hints = length_hints
        self._jumps = jumps
        self._on_end = on_end
        max_request_tokens = max(each.num_prompt_tokens + each.num_output_tokens for each in arrivals)
        if max_request_tokens > settings.num_blocks * settings.block_size:
            raise ValueError(
                f"a request of {max_request_tokens} tokens; the KV cache of a replica holds "
                f"{settings.num_blocks * settings.block_size}"
            )
        self._delay = settings.message_delay
        self._names: dict[str, list[bytes]] = {}
        policy = make_policy()
        self._ranks_by_time = policy.overrides(Policy.next_change)
        self._counts_tenants = policy.overrides(Policy.on_tenant_service)
        queue_type = RoundRobinQueue if settings.routing == "round_robin" else SimulatedQueue
        self._queue: SimulatedQueue = queue_type(policy, self._names)
        self.replicas = [
            SimulatedReplica(number, settings, make_policy(), max_request_tokens)
            for number in range(settings.num_replicas)
        ]
        self._ahead: set[SimulatedReplica] = set()
        """Those that take several steps at once."""
        self._events: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self.num_events = 0
        self._num_arrived = 0
        self._serial = 0
        self._num_batches = 0
        """Of events, told to the queue."""
        self._resumes_seen = 0
        self._parked: dict[str, SimulatedSequence] = {}
        """Preempted sequences, by uid."""
        self._timer: float | None = None
        self._sampling: dict[int, SamplingParams] = {}
        self._records = Records(len(arrivals))
        self._num_ended = 0
        self._sample_seconds = max(arrivals[-1].time, 1e-3) / NUM_QUEUE_SAMPLES
        self._next_sample = 0.0
        self._capacities: list[ReplicaCapacity] = [each.capacity() for each in self.replicas]
        self._with_free_slots = set(range(settings.num_replicas))

    def run(self) -> SimulationResult:
        """Runs until the last request has ended. Raises SimulationError."""
        self._tell_queue([], START, START)
        arrivals, events = self._arrivals, self._events
        while self._num_ended < len(arrivals):
            time = arrivals[self._num_arrived].time if self._num_arrived < len(arrivals) else None
            if events and (time is None or events[0][0] <= time):
                now, _, handle, argument = heapq.heappop(events)
                handle(argument, now)
            elif time is not None:
                self._arrive(time)
            else:
                raise SimulationError(f"{len(arrivals) - self._num_ended} requests wait, and none runs")
        return SimulationResult(self._arrivals, self._records, self._totals())

    def _totals(self) -> Totals:
        schedulers = [replica.scheduler for replica in self.replicas]
        return Totals(
            num_computed_tokens=sum(replica.num_computed_tokens for replica in self.replicas),
            num_recomputed_tokens=sum(each.num_recomputed_tokens for each in schedulers),
            num_cached_tokens=sum(each.num_prefix_cache_hit_tokens for each in schedulers),
            num_preemptions=sum(each.num_preemptions for each in schedulers),
            busy_seconds=sum(replica.busy_seconds for replica in self.replicas),
            block_seconds=sum(replica.block_seconds for replica in self.replicas),
        )

    # --- what happens

    def _arrive(self, now: float) -> None:
        number = self._num_arrived
        self._num_arrived += 1
        request = self._request(number)
        if self._settings.enable_prefix_caching and self._arrivals[number].block_hashes:
            self._names[request.uid] = prompt_block_names(self._arrivals[number], self._settings.block_size)
        if self._counts_tenants:  # their counters are read when the request joins the queue
            self._catch_up(now)
        self._queue.submit(request, now)
        self._sample(now)
        first = self._queue.peek(now)
        if self._with_free_slots or (first is not None and first.request is request):
            self._release(now)
        self._arm_timer()

    def _end_steps(self, event: tuple[SimulatedReplica, int], now: float) -> None:
        replica, version = event
        if replica.version == version:
            assert replica.run is not None
            num_steps = replica.run.num_steps
            if self._delay and not replica.run.is_quiet:
                # What is still on its way from before the end is sent.
                num_steps = min(num_steps, replica.run.num_ended(now - self._delay) + 1)
            report = self._advance(replica, num_steps)
            if self._delay:
                self._push(report.time + self._delay, self._hear, report)
            else:
                self._hear(report, now)

    def _receive(self, released: list[tuple[int, SimulatedSequence]], now: float) -> None:
        """Releases come to replicas: each takes them in after the step under way."""
        for number in dict.fromkeys(number for number, _ in released):
            replica = self.replicas[number]
            for other, sequence in released:
                if other == number:
                    replica.receive(sequence, now)
            if replica.is_idle:
                left = self._start(replica, now)
                assert not left, "a replica that did nothing has room"
            else:
                self._end_after(replica, now)

    def _hear(self, report: Report, now: float) -> None:
        """The queue gets what a replica has said."""
        if self._counts_tenants:
            self._catch_up(now)
        self._update_queue(report, now)
        self._release(now)
        self._arm_timer()

    def _wake(self, _: None, now: float) -> None:
        """Time alone may have changed who is first."""
        self._timer = None
        self._release(now)
        self._arm_timer()

    # --- the replicas' side

    def _advance(self, replica: SimulatedReplica, num_steps: int) -> Report:
        """Ends steps and starts the next; what is to be told to the queue."""
        assert replica.run is not None
        now = replica.run.end(num_steps)
        self._ahead.discard(replica)
        self._record(replica.finish(num_steps), now)
        report = Report(now, replica.number, replica.capacity(), self._events_of(replica))
        self._start(replica, now)
        return report

    def _start(self, replica: SimulatedReplica, now: float) -> list[SimulatedSequence]:
        somebody_waits = self._queue.num_waiting > 0
        left = replica.start(now, somebody_waits, somebody_waits and self._queue.has_free_slot)
        for sequence in left:
            self._parked[sequence.request.uid] = sequence
            sequence.replica = replica.number
        for sequence in replica.preempted:
            self._records.num_preemptions[sequence.number] += 1
        replica.left = left
        run = replica.run
        if run is not None:
            if not self._jumps:
                run.num_steps, run.ignores_arrivals, run.is_quiet = 1, True, True
            if run.num_steps > 1:
                self._ahead.add(replica)
            self._push(run.end(run.num_steps), self._end_steps, (replica, replica.version))
        return left

    @staticmethod
    def _events_of(replica: SimulatedReplica) -> list[Event]:
        """What the queue must learn of the steps that have ended."""
        events: list[Event] = [Preempted(replica.number, replace(each.view)) for each in replica.left]
        events += [TenantTokens(tenant, 0, count) for tenant, count in replica.tenant_tokens.items()]
        replica.left = []
        replica.tenant_tokens.clear()
        return events

    def _end_after(self, replica: SimulatedReplica, now: float) -> None:
        """Ends a run with the step that is under way."""
        run = replica.run
        assert run is not None
        num_steps = run.num_ended(now) + 1
        if num_steps < run.num_steps:
            run.num_steps = num_steps
            replica.version += 1
            self._push(run.end(num_steps), self._end_steps, (replica, replica.version))

    def _record(self, sampled: list[SimulatedSequence], now: float) -> None:
        records = self._records
        for sequence in sampled:
            if sequence.num_generated_tokens == 1:
                records.first_token[sequence.number] = now
            if sequence.num_generated_tokens == sequence.num_output_tokens:
                records.completion[sequence.number] = now
                self._num_ended += 1
                if self._num_ended % 1000 == 0:
                    self._on_end(self._num_ended)

    # --- the queue's side

    def _catch_up(self, now: float) -> None:
        """The queue learns what replicas have said while they took many steps at once."""
        for replica in [each for each in self._ahead if each.run and not each.run.is_quiet]:
            assert replica.run is not None
            num_ended = replica.run.num_ended(now - self._delay)
            if num_ended:
                self._update_queue(self._advance(replica, num_ended), now)

    def _update_queue(self, report: Report, now: float) -> None:
        self._capacities[report.replica] = report.capacity
        if report.capacity.free_slots > 0:
            self._with_free_slots.add(report.replica)
        else:
            self._with_free_slots.discard(report.replica)
        self._tell_queue(report.events, report.time, now)
        self._sample(now)

    def _tell_queue(self, events: list[Event], sent: float, now: float) -> None:
        self._serial += 1
        self._num_batches += bool(events)
        self._queue.update(
            EngineCapacity(
                serial=self._serial,
                time=sent,
                replicas=self._capacities,
                events_number=self._num_batches,
                events=events,
                resumes_seen=self._resumes_seen,
                block_size=self._settings.block_size,
            ),
            now,
        )

    def _release(self, now: float) -> None:
        if not self._queue.num_waiting:
            return
        self._catch_up(now)
        released = [(each.replica, self._sequence(each.request)) for each in self._queue.release(now)]
        released += self._take_resumes(now)
        if released:
            if self._delay:
                self._push(now + self._delay, self._receive, released)
            else:
                self._receive(released, now)
        if self._queue.num_waiting and self._ahead:
            # If it is not for a slot that somebody waits, another may be first and fit after any step.
            cuts_all = self._queue.has_free_slot
            for replica in self._ahead:
                if cuts_all or not (replica.run and replica.run.ignores_arrivals):
                    self._end_after(replica, now - self._delay)

    def _take_resumes(self, now: float) -> list[tuple[int, SimulatedSequence]]:
        """The preempted sequences that run again. The engine acknowledges them at once."""
        answer = self._queue.take_resumes()
        if not answer.resumes:
            return []
        self._resumes_seen = answer.number
        self._tell_queue([], now, now)
        resumed = [(each.replica, self._parked.pop(each.uid)) for each in answer.resumes]
        for number, sequence in resumed:
            if sequence.replica != number:  # what it left behind elsewhere is of no use
                self.replicas[sequence.replica].scheduler.forget(sequence.request.uid, sequence.index)
        return resumed

    def _sequence(self, request: Request) -> SimulatedSequence:
        number = int(request.uid)
        names = self._names.pop(request.uid, [])
        return SimulatedSequence(request, number, self._arrivals[number].num_output_tokens, names)

    def _request(self, number: int) -> Request:
        arrival = self._arrivals[number]
        max_tokens = arrival.num_output_tokens if self._is_clairvoyant else self._max_tokens
        if max_tokens not in self._sampling:
            self._sampling[max_tokens] = SamplingParams(max_tokens=max_tokens)
        return Request(
            uid=str(number),
            request_id="",
            prompt="",
            prompt_token_ids=range(arrival.num_prompt_tokens),  # type: ignore[arg-type]  # only its length counts
            sampling=self._sampling[max_tokens],
            output=OutputOptions(),
            priority=arrival.priority,
            tenant=arrival.tenant,
            arrival=arrival.time,
            deadline=None,
            expected_output_tokens=self._length_hints[number] if self._length_hints else None,
        )

    def _arm_timer(self) -> None:
        if self._ranks_by_time:
            time = self._queue.next_expiry
            if time is not None and (self._timer is None or time < self._timer):
                self._timer = time
                self._push(time, self._wake, None)

    def _push(self, time: float, handle: Callable[[Any, float], None], argument: Any) -> None:
        self.num_events += 1
        heapq.heappush(self._events, (time, self.num_events, handle, argument))

    def _sample(self, now: float) -> None:
        if now >= self._next_sample:
            running = sum(each.scheduler.num_running for each in self.replicas)
            self._records.queue.append((now, self._queue.num_waiting, running))
            self._next_sample = now + self._sample_seconds
