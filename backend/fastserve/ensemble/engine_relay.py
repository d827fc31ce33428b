"""The model `engine`: relays requests to the workers, and what their steps bring to `postprocess`.

    request in -> worker ... StepOutput -> RequestOutput out, at most one per `stream_interval_ms` and request

Other models send it more: `resumes` says which preempted sequences run again; `stop` and `cancel` end a
request, by its uid or the client's id; `health` says whether the server is ready (`Readiness`). The engine's
capacity goes to `scheduler`.

Two kinds of threads meet here: the server's (`execute`), and those that read a worker's pipe. Their lock is
held for the bookkeeping only: nothing is sent under it, to the server or into a worker's pipe.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any

from fastserve.checkpoints.model_files import locate
from fastserve.engine.worker_pipe import FromWorker
from fastserve.ensemble.cancellation import RecentCancellations
from fastserve.ensemble.capacity_publisher import CapacityPublisher
from fastserve.ensemble.control_messages import (
    BlockUnload,
    CancelById,
    HealthReport,
    SchedulerOutput,
)
from fastserve.ensemble.engine_replica import EngineReplica
from fastserve.ensemble.forwarding import relay_queue_message
from fastserve.ensemble.messaging import dispatch_each, message_of, send_error, send_final
from fastserve.ensemble.metrics import EngineMetrics
from fastserve.ensemble.model_start import start_model
from fastserve.ensemble.readiness import Readiness
from fastserve.ensemble.replica_health import ReplicaHealth
from fastserve.ensemble.response_interval import response_interval
from fastserve.ensemble.response_stream import ResponseStream
from fastserve.ensemble.response_streams import ResponseStreams
from fastserve.ensemble.spent_requests import SpentRequests
from fastserve.ensemble.tenant_tokens import TenantTokenCounter
from fastserve.errors import ErrorCode, invalid
from fastserve.scheduling.capacity import Ended, EngineCapacity, Finished, Preempted, Released, ResumeList
from fastserve.scheduling.policies.policy import Policy
from fastserve.scheduling.policies.registry import make_policy
from fastserve.text.stop_conditions import external_stop, has_expired
from fastserve.types import Add, Cancel, Failure, Outcome, Ready, RequestView, Resume, StepOutput, view_of

logger = logging.getLogger(__name__)


class EngineModel:
    """Triton server's Python model `engine`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the workers, and waits until all are ready. Raises TritonModelException if one ends."""
        config = start_model()
        self._lock = threading.RLock()
        self._streams = ResponseStreams(
            self._lock, response_interval(config), self._give_up, self._tell_finished
        )
        self._cancelled = RecentCancellations(config.max_request_seconds)
        self._spent = SpentRequests(config.max_request_seconds)
        self._counts_tenants = make_policy(config).overrides(Policy.on_tenant_service)
        """Whether the queue goes by what was computed for each tenant."""
        self._tenant_tokens = TenantTokenCounter()
        self._metrics = EngineMetrics()
        self._max_model_len: int | None = None
        self._block_size = 0
        self._readiness = Readiness()
        files = locate(config.model)
        health = ReplicaHealth(config.replicas, self._readiness)
        restarts = self._metrics.restarts
        self._replicas = [
            EngineReplica(number, config, files, self._on_message, self._on_death, health.set, restarts)
            for number in range(config.replicas)
        ]
        self._capacity = CapacityPublisher(partial(self._readiness.set, "capacity"), after=self._look_after)
        for replica in self._replicas:
            replica.worker.start()
        for replica in self._replicas:
            replica.worker.wait_until_ready()

    # Called by the server's thread: requests.

    def execute(self, requests: list[Any]) -> None:
        """Takes requests in; their responses come from the thread that reads the worker's pipe."""
        dispatch_each("engine", requests, self._dispatch, send_error)
        self._capacity.open()
        with self._lock:
            self._publish_capacity()

    def _dispatch(self, triton_request: Any, sender: Any) -> None:
        """Raises whatever is wrong with the request."""
        released = message_of(triton_request, "released", SchedulerOutput)
        if isinstance(released, Released):
            self._add(released, sender, triton_request.is_cancelled())
            return
        if released is not None:
            relay_queue_message(released, sender)
            return
        health: Any = message_of(triton_request, "health", BlockUnload | HealthReport)  # type: ignore[arg-type]
        if isinstance(health, BlockUnload):
            self._readiness.block_unload(sender)
            return
        stop = message_of(triton_request, "stop", Cancel)
        cancel = message_of(triton_request, "cancel", CancelById)
        resumes = message_of(triton_request, "resumes", ResumeList)
        if health is not None:
            self._readiness.set(health.source, health.problem)
        elif stop is not None:
            self._stop(stop)
        elif cancel is not None:
            self._cancel(cancel)
        elif resumes is not None:
            with self._lock:
                for resume in self._capacity.take(resumes):
                    self._resume(resume)
        else:
            raise invalid("inputs", "none", "`released`, `resumes`, `stop`, `cancel` or `health`")
        send_final(sender)

    def _add(self, released: Released, sender: Any, is_cancelled: bool) -> None:
        request, replica = released.request, self._replicas[released.replica]
        stream = ResponseStream(
            request,
            sender,
            request.sampling.n,
            released.replica,
            released=time.monotonic(),
            overtaken_by=released.overtaken_by,
        )
        with self._lock:
            if request.uid in self._streams:
                raise invalid("released", request.uid, "a request that is not served already")
            if not self._spent.spend(request, time.monotonic()):
                raise invalid("released", request.uid, "a request that has not been served before")
            is_cancelled = is_cancelled or self._cancelled.applies_to(request)
            if is_cancelled:
                replica.count_dropped()
                self._tell_finished(stream)
            else:
                self._streams.add(stream)
                self._start(stream, released.replica, view_of(request))
        if is_cancelled:
            self._streams.end(stream, Outcome.CANCELLED, external_stop(Outcome.CANCELLED))

    def _cancel(self, cancel: CancelById) -> None:
        """Ends the client's requests of that id; remembers it for those still to come."""
        with self._lock:
            self._cancelled.add(cancel)
            streams = [stream for stream in self._streams if cancel.applies_to(stream.request)]
        for stream in streams:
            self._stop(Cancel(stream.request.uid, Outcome.CANCELLED))

    def _stop(self, cancel: Cancel) -> None:
        """Ends a request, or one sequence of it; its worker says so, or without one, this does."""
        with self._lock:
            stream = self._streams.get(cancel.uid)
            if stream is None:
                return
            if stream.replica is not None:
                self._replicas[stream.replica].cancel(cancel)
                return
            self._streams.remove(stream)
            self._capacity.tell(Ended(cancel.uid, 0))
        self._streams.end(stream, cancel.outcome, external_stop(cancel.outcome))

    def _resume(self, resume: Resume) -> None:
        """Lets a preempted sequence run, on the replica that has it or, with its tokens, on another."""
        replica = self._replicas[resume.replica]
        stream = self._streams.get(resume.uid)
        if stream is None:
            replica.count_dropped()
            return
        view, stream.preempted = stream.preempted, None
        if stream.replica == resume.replica:
            replica.send(resume)
            return
        if stream.replica is not None:
            self._replicas[stream.replica].forget(resume.uid)
        self._start(stream, resume.replica, view or view_of(stream.request))

    def _start(self, stream: ResponseStream, number: int, view: RequestView) -> None:
        """Has a request run on a replica; back in the queue with it if there is no worker now."""
        replica = self._replicas[number]
        if replica.has_worker:
            stream.replica = number
            replica.send(Add(stream.request, stream.token_ids, view))
        else:
            stream.replica, stream.preempted = None, view
            replica.count_dropped()
            self._capacity.tell(Preempted(number, view))

    # Called by the threads that read a worker's pipe: steps, and its death.

    def _on_message(self, replica: int, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self._on_ready(replica, message)
        else:
            self._on_step(replica, message)

    def _on_step(self, replica: int, step: StepOutput) -> None:
        now = time.monotonic()
        with self._lock:
            for output in step.outputs:
                if (stream := self._stream_on(replica, output.uid)) is not None:
                    if self._counts_tenants:
                        self._tenant_tokens.count(stream, output)
                    stream.add(output)
            for view in step.preempted:
                if (stream := self._stream_on(replica, view.uid)) is not None:
                    stream.preempted = view if stream.can_move else None
                    self._capacity.tell(Preempted(replica, view, stream.can_move))
            for uid, index in step.ended:
                if uid not in self._streams or self._stream_on(replica, uid) is not None:
                    self._capacity.tell(Ended(uid, index))
            for tokens in self._tenant_tokens.take():
                self._capacity.tell(tokens)
            self._replicas[replica].stats = step.stats
        self._streams.send_due(now)
        with self._lock:
            self._publish_capacity()  # behind the tokens: its message would take their core
        self._metrics.observe_step(replica, step.stats, now)

    def _give_up(self, stream: ResponseStream) -> None:
        """A response of it could not be sent: nobody waits for what comes of it."""
        if stream.replica is not None:
            self._replicas[stream.replica].cancel(Cancel(stream.request.uid, Outcome.CANCELLED))

    def _tell_finished(self, stream: ResponseStream) -> None:
        self._capacity.tell(Finished(stream.request.uid, stream.num_tokens))

    def _stream_on(self, replica: int, uid: str) -> ResponseStream | None:
        """The stream of a request that this replica has: what it says of others is out of date."""
        stream = self._streams.get(uid)
        return stream if stream is not None and stream.replica == replica else None

    def _on_ready(self, replica: int, ready: Ready) -> None:
        self._metrics.start(replica, ready.stats)
        with self._lock:
            self._max_model_len, self._block_size = ready.max_model_len, ready.block_size
            self._replicas[replica].start_worker(ready)
            self._publish_capacity()

    def _on_death(self, replica: int, cause: str, had_been_ready: bool) -> None:
        """Fails the worker's requests but for those that wait, preempted, and can run on another; those too
        if none comes up."""
        self._metrics.stop(replica)
        with self._lock:
            self._replicas[replica].stats = None
            hopeless = not had_been_ready and not any(each.has_worker for each in self._replicas)
            lost = []
            for stream in self._streams:
                if stream.replica == replica and stream.preempted is not None:
                    stream.replica = None
                if stream.replica == replica or (hopeless and stream.replica is None):
                    lost.append(stream)
                    self._streams.remove(stream)
                    for index in range(stream.request.sampling.n):
                        self._capacity.tell(Ended(stream.request.uid, index))
            self._publish_capacity()
        message = f"the engine's worker {cause} while it served the request; try again"
        for stream in lost:
            self._streams.end(stream, Outcome.ERROR, Failure(ErrorCode.UNAVAILABLE.value, message))

    def _publish_capacity(self) -> None:
        self._capacity.publish(
            EngineCapacity(
                serial=0,
                time=0.0,
                replicas=[replica.capacity for replica in self._replicas],
                block_size=self._block_size,
                max_model_len=self._max_model_len,
            )
        )

    def _look_after(self) -> None:
        """Every two seconds or so: what nothing else would bring about."""
        with self._lock:
            busy = {stream.replica for stream in self._streams}
            waiting = [stream.request for stream in self._streams if stream.replica is None]
        for request in waiting:
            if has_expired(request, time.monotonic()):
                self._stop(Cancel(request.uid, Outcome.TIMEOUT))
        for number, replica in enumerate(self._replicas):
            replica.worker.look(has_requests=number in busy)
        self._metrics.repeat()

    def finalize(self) -> None:
        """Ends the threads and the worker."""
        self._readiness.stop()
        self._capacity.stop()
        for replica in self._replicas:
            replica.worker.stop()
