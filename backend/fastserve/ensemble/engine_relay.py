"""The model `engine`: relays requests to the worker process, and what its steps bring to `postprocess`.

    request in -> worker ... StepOutput -> RequestOutput out, at most one per `stream_interval_ms` and request

Other models send it more: `stop` and `cancel` end a request, by its uid or the client's id; `health` says
whether the server is ready (`Readiness`). The engine's capacity goes to `scheduler`.

Two threads meet here, the server's (`execute`) and the one that reads the worker's pipe. Their lock is held
for the bookkeeping only: nothing is sent under it, to the server or into the worker's pipe.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.checkpoints.model_files import locate
from fastserve.config import read_config
from fastserve.engine.worker import Worker
from fastserve.engine.worker_pipe import FromWorker
from fastserve.ensemble.cancellation import RecentCancellations
from fastserve.ensemble.capacity_publisher import CapacityPublisher
from fastserve.ensemble.messaging import dispatch_each, message_of, message_tensor, send_error, send_final
from fastserve.ensemble.metrics import REPORT_SECONDS, EngineMetrics
from fastserve.ensemble.readiness import Readiness
from fastserve.ensemble.response_stream import ResponseStream
from fastserve.ensemble.server_death import leave_with_server
from fastserve.ensemble.shared_secret import server_secret
from fastserve.ensemble.worker_watch import WorkerWatch
from fastserve.errors import ErrorCode, invalid
from fastserve.types import (
    Add,
    BlockUnload,
    Cancel,
    CancelById,
    EngineCapacity,
    EngineStats,
    Failure,
    HealthReport,
    Outcome,
    Ready,
    Rejected,
    Request,
    RequestOutput,
    SchedulerOutput,
    StepOutput,
)

logger = logging.getLogger(__name__)

_CANCELLED = Failure(ErrorCode.CANCELLED.value, "the request was cancelled")
RESPONSES_PER_CORE = 40
"""On two cores, 80 responses a second in place of 320 gave 9 % more tokens: see docs/log.md."""
RESTART_SECONDS = 1.0
"""Between a worker that died while it started and the next one."""


class EngineModel:
    """Triton server's Python model `engine`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the worker, and waits until it is ready. Raises TritonModelException where it ends first."""
        leave_with_server()
        server_secret()  # made while there is shared memory for it
        self._config = read_config()
        self._files = locate(self._config.model)
        self._responses_per_second = self._config.max_responses_per_second or RESPONSES_PER_CORE * len(
            os.sched_getaffinity(0)
        )
        self._lock = threading.RLock()
        self._streams: dict[str, ResponseStream] = {}
        self._backlog: dict[str, Request] = {}
        """Requests that came while there was no worker, by uid."""
        self._cancelled = RecentCancellations(self._config.max_request_seconds)
        self._metrics = EngineMetrics()
        self._capacity = CapacityPublisher(
            lambda problem: self._on_health("capacity", problem), after=self._look_after
        )
        self._readiness = Readiness()
        self._watch = WorkerWatch(lambda problem: self._on_health("stall", problem))
        self._num_messages = 0
        """From all workers."""
        self._arrived = 0
        self._sent = 0
        """Requests sent to the present worker."""
        self._incarnation = ""
        self._max_model_len: int | None = None
        self._stats: EngineStats | None = None
        """After the worker's last step; None while there is no worker that could serve."""
        self._reported: EngineStats
        """The worker's stats that the metrics show."""
        self._reported_at = 0.0
        self._is_shown = True
        """The gauges show what they were last told."""
        self._reporting = threading.Lock()
        self._stopping = False
        self._is_initialized = False
        """Then a worker that dies is replaced, and requests to other models may be sent."""
        self._started = threading.Event()
        self._worker = self._make_worker()
        self._worker.start()
        self._started.wait()
        if not self._is_initialized:
            raise pb_utils.TritonModelException(
                "the engine's worker ended before it was ready: see its error above"
            )

    def _make_worker(self) -> Worker:
        return Worker(
            self._config,
            self._files,
            self._on_message,
            self._on_death,
            lambda problem: self._on_health("pipe", problem),
        )

    def _on_health(self, source: str, problem: str | None) -> None:
        if self._is_initialized:
            self._readiness.set(source, problem)

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
        if released is not None:
            self._on_released(released, sender, triton_request)
            return
        health: Any = message_of(triton_request, "health", BlockUnload | HealthReport)  # type: ignore[arg-type]
        if isinstance(health, BlockUnload):
            self._readiness.block_unload(sender)
            return
        stop = message_of(triton_request, "stop", Cancel)
        cancel = message_of(triton_request, "cancel", CancelById)
        if health is not None:
            self._on_health(health.source, health.problem)
        elif stop is not None:
            with self._lock:
                self._worker.send(stop)
        elif cancel is not None:
            self._cancel(cancel)
        else:
            raise invalid("inputs", "none", "`released`, `stop`, `cancel` or `health`")
        send_final(sender)

    def _on_released(self, released: Any, sender: Any, triton_request: Any) -> None:
        if isinstance(released, Request):
            self._add(ResponseStream(released, sender, released.sampling.n), triton_request.is_cancelled())
        elif isinstance(released, Rejected):
            ResponseStream(released.request, sender, 1).fail(released.outcome, released.failure)
        else:
            queued = message_tensor("output", RequestOutput(released.uid, []))
            send_final(sender, pb_utils.InferenceResponse(output_tensors=[queued]))

    def _add(self, stream: ResponseStream, is_cancelled: bool) -> None:
        request = stream.request
        with self._lock:
            if request.uid in self._streams:
                raise invalid("released", request.uid, "a request that is not served already")
            self._arrived += 1
            is_cancelled = is_cancelled or self._cancelled.applies_to(request)
            if not is_cancelled:
                self._streams[request.uid] = stream
                if self._stats is None:
                    self._backlog[request.uid] = request
                else:
                    self._send(request)
        if is_cancelled:
            stream.fail(Outcome.CANCELLED, _CANCELLED)

    def _send(self, request: Request) -> None:
        self._sent += 1
        self._worker.send(Add(request))

    def _cancel(self, cancel: CancelById) -> None:
        """Ends requests that the worker has and that wait for it; remembers it for those still to come."""
        ended: list[ResponseStream] = []
        with self._lock:
            self._cancelled.add(cancel)
            for uid, stream in list(self._streams.items()):
                if stream.request.request_id != cancel.request_id or stream.request.arrival > cancel.time:
                    continue
                if self._backlog.pop(uid, None) is not None:
                    ended.append(self._streams.pop(uid))
                else:
                    self._worker.send(Cancel(uid, Outcome.CANCELLED))
        for stream in ended:
            stream.fail(Outcome.CANCELLED, _CANCELLED)

    # Called by the thread that reads the worker's pipe: steps, and its death.

    def _on_message(self, message: FromWorker) -> None:
        self._num_messages += 1
        if isinstance(message, Ready):
            self._on_ready(message)
        else:
            self._on_step(message)

    def _on_step(self, step: StepOutput) -> None:
        now = time.monotonic()
        with self._lock:
            for output in step.outputs:
                stream = self._streams.get(output.uid)
                if stream is not None:
                    stream.add(output)
            due = self._take_due(now)
            self._stats = step.stats
            self._publish_capacity()
        for stream in due:
            self._respond(stream, now)
        if step.stats.step_tokens:
            self._metrics.step_tokens.observe(step.stats.step_tokens)
        if step.stats.running == 0 or now - self._reported_at >= REPORT_SECONDS:
            self._report(step.stats)

    def _take_due(self, now: float) -> list[ResponseStream]:
        """Streams with a response to be sent now, by this thread alone. Final ones are forgotten."""
        interval = max(
            self._config.stream_interval_ms / 1000, len(self._streams) / self._responses_per_second
        )
        due = [stream for stream in self._streams.values() if stream.is_due(now, interval)]
        for stream in due:
            if stream.is_final:
                del self._streams[stream.request.uid]
        return due

    def _respond(self, stream: ResponseStream, now: float) -> None:
        """Sends a response; one that cannot be sent ends its own request only."""
        try:
            stream.send(now)
        except Exception as error:
            uid = stream.request.uid
            logger.exception("a response of request %s could not be sent", uid)
            with self._lock:
                if self._streams.pop(uid, None) is not None:
                    self._worker.send(Cancel(uid, Outcome.CANCELLED))
            message = f"the answer could not be sent: {error}"
            stream.fail(Outcome.ERROR, Failure(ErrorCode.UNAVAILABLE.value, message))

    def _on_ready(self, ready: Ready) -> None:
        self._report(ready.stats, ready.stats)
        with self._lock:
            self._incarnation = ready.incarnation
            self._max_model_len = ready.max_model_len
            self._sent = 0
            self._stats = ready.stats
            for request in self._backlog.values():
                self._send(request)
            self._backlog = {}
            self._publish_capacity()
        self._is_initialized = True
        self._readiness.set("worker", None)
        self._started.set()

    def _on_death(self, cause: str) -> None:
        """Fails the worker's requests, and starts another worker. May be called again if it raises."""
        with self._lock:
            had_been_ready, self._stats = self._stats is not None, None
            lost = self._take_lost(with_backlog=not had_been_ready)
            self._publish_capacity()
        message = f"the engine's worker {cause} while it served the request; try again"
        for stream in lost:
            stream.fail(Outcome.ERROR, Failure(ErrorCode.UNAVAILABLE.value, message))
        if not self._is_initialized:
            self._started.set()
            return
        logger.error("the engine's worker %s; starting another", cause)
        self._readiness.set("worker", f"the engine's worker {cause}")
        self._metrics.restarts.add(1)
        if not had_been_ready:
            time.sleep(RESTART_SECONDS)
        self._replace_worker()

    def _take_lost(self, with_backlog: bool) -> list[ResponseStream]:
        """The requests that a dead worker had, and with the backlog those that waited for it."""
        if with_backlog:
            self._backlog = {}
        return [self._streams.pop(uid) for uid in list(self._streams) if uid not in self._backlog]

    def _replace_worker(self) -> None:
        worker = self._make_worker()
        with self._lock:
            if self._stopping:
                return
            self._worker = worker
        worker.start()

    def _publish_capacity(self) -> None:
        stats = self._stats
        if stats is None:
            received, free_slots, lowest_key = self._arrived - len(self._backlog), 0, None
        else:
            received = self._arrived - (self._sent - stats.received)
            free_slots, lowest_key = stats.free_slots, stats.lowest_key
        self._capacity.publish(
            EngineCapacity(
                incarnation=self._incarnation,
                serial=0,
                received=received,
                arrived=self._arrived,
                free_slots=free_slots,
                lowest_key=lowest_key,
                time=0.0,
                max_model_len=self._max_model_len,
            )
        )

    def _report(self, stats: EngineStats, before: EngineStats | None = None) -> None:
        """Reports to the metrics what has changed since the last report, or since `before`."""
        with self._reporting:
            before = before or self._reported
            self._reported, self._reported_at = stats, time.monotonic()
            metrics = self._metrics
            shown = [
                metrics.running.set(stats.running),
                metrics.preempted.set(stats.waiting),
                metrics.kv_total.set(stats.kv_blocks_total),
                metrics.kv_used.set(stats.kv_blocks_used),
            ]
            self._is_shown = all(shown)
            metrics.cache_hits.add(stats.prefix_cache_hit_tokens_total - before.prefix_cache_hit_tokens_total)
            metrics.preemptions.add(stats.preemptions_total - before.preemptions_total, "recompute")

    def _look_after(self) -> None:
        """Every two seconds or so: watches the worker, and repeats what the gauges did not show."""
        self._watch.look(bool(self._streams), self._num_messages, self._worker.cpu_seconds())
        if not self._is_shown:
            self._report(self._reported)

    def finalize(self) -> None:
        """Ends the threads and the worker."""
        with self._lock:
            self._stopping = True
        self._readiness.stop()
        self._capacity.stop()
        self._worker.stop()
