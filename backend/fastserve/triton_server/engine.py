"""The step `engine`: relays requests to the worker process, and its steps to `postprocess`.

    request in -> worker ... StepOutput -> RequestOutput out, at most one per `stream_interval_ms` and request

More inputs come from elsewhere: `stop` and `cancel`, a uid or client's id whose request shall end, and
`hold` (see `Readiness`). The room there is goes to `scheduler`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.config import read_config
from fastserve.engine.worker import FromWorker, Worker
from fastserve.errors import ErrorCode, RequestError
from fastserve.model_files import locate
from fastserve.triton_server.metrics import EngineMetrics
from fastserve.triton_server.readiness import Readiness
from fastserve.triton_server.relay import Relay
from fastserve.triton_server.room import RoomTeller
from fastserve.triton_server.tensors import FINAL, error_response, message_of, message_tensor
from fastserve.types import (
    Add,
    Cancel,
    CancelById,
    EngineStats,
    Failure,
    Outcome,
    Ready,
    Refused,
    Released,
    Request,
    RequestOutput,
)

logger = logging.getLogger(__name__)

REMEMBERED_CANCELS = 10_000
"""Client ids cancelled before their request came here: it may still wait in the scheduler's queue."""
_CANCELLED = Failure(ErrorCode.CANCELLED.value, "the request was cancelled")
RESPONSES_PER_CORE = 40
"""On two cores, 80 responses a second in place of 320 gave 9 % more tokens: see docs/log.md."""
REPORT_SECONDS = 0.1
"""Between two reports of the gauges while there is work: each is a message to the server's process."""
RESTART_SECONDS = 1.0
"""Between a worker that died while it started and the next one."""


class EngineStep:
    """Triton server's Python model `engine`."""

    def initialize(self, args: dict[str, str]) -> None:
        self._config = read_config()
        self._files = locate(self._config.model)
        self._responses_per_second = self._config.max_responses_per_second or RESPONSES_PER_CORE * len(
            os.sched_getaffinity(0)
        )
        self._lock = threading.RLock()
        self._relays: dict[str, Relay] = {}
        self._backlog: list[Request] = []
        """Requests that came while there was no worker."""
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._metrics = EngineMetrics()
        self._room = RoomTeller()
        self._readiness = Readiness()
        self._received = 0
        self._sent = 0
        """Of the requests received, those sent to the worker there is now."""
        self._incarnation = ""
        self._stats: EngineStats | None = None
        """The worker's last word; None while there is no worker that could serve."""
        self._reported: EngineStats
        """What the metrics were last told, by this worker."""
        self._reported_at = 0.0
        self._started = threading.Event()
        self._worker = self._start_worker()
        self._started.wait()
        if self._stats is None:
            raise pb_utils.TritonModelException(
                "the engine's worker ended before it was ready: see its error above"
            )

    def _start_worker(self) -> Worker:
        return Worker(self._config, self._files, self._on_message, self._on_death)

    # From the server's thread: requests.

    def execute(self, requests: list[Any]) -> None:
        with self._lock:
            for triton_request in requests:
                sender = triton_request.get_response_sender()
                try:
                    self._dispatch(triton_request, sender)
                except RequestError as error:
                    sender.send(error_response(error), flags=FINAL)
            self._room.open()
            self._tell_room()

    def _dispatch(self, triton_request: Any, sender: Any) -> None:
        released = message_of(triton_request, "released", Released)
        if isinstance(released, Request):
            self._take(released, sender, triton_request.is_cancelled())
            return
        if isinstance(released, Refused):
            Relay(released.request, sender, 1).fail(released.outcome, released.failure)
            return
        if released is not None:
            accepted = message_tensor("output", RequestOutput(released.uid, []))
            sender.send(pb_utils.InferenceResponse(output_tensors=[accepted]), flags=FINAL)
            return
        if message_of(triton_request, "hold", str) is not None:
            self._readiness.hold(sender)
            return
        stop = message_of(triton_request, "stop", Cancel)
        if stop is not None:
            self._worker.send(stop)
        cancel = message_of(triton_request, "cancel", CancelById)
        if cancel is not None:
            self._cancel(cancel.request_id)
        sender.send(flags=FINAL)

    def _take(self, request: Request, sender: Any, is_cancelled: bool) -> None:
        if request.uid in self._relays:
            raise RequestError("`released`: got a request that is served already; allowed: a new one")
        self._received += 1
        relay = Relay(request, sender, request.sampling.n)
        if is_cancelled or self._cancelled.pop(request.request_id, self) is None:
            relay.fail(Outcome.CANCELLED, _CANCELLED)
            return
        self._relays[request.uid] = relay
        if self._stats is None:
            self._backlog.append(request)
        else:
            self._send(request)

    def _send(self, request: Request) -> None:
        self._sent += 1
        self._worker.send(Add(request))

    def _cancel(self, request_id: str) -> None:
        uids = [uid for uid, relay in self._relays.items() if relay.request.request_id == request_id]
        for uid in uids:
            self._worker.send(Cancel(uid, Outcome.CANCELLED))
        if not uids:
            self._cancelled[request_id] = None
            while len(self._cancelled) > REMEMBERED_CANCELS:
                self._cancelled.popitem(last=False)

    # From the thread that reads the worker's pipe: steps, and its death.

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self._on_ready(message)
            return
        with self._lock:
            for output in message.outputs:
                relay = self._relays.get(output.uid)
                if relay is not None:
                    relay.add(output)
            self._send_what_is_due(time.monotonic())
            if message.stats.step_tokens:
                self._metrics.step_tokens.observe(message.stats.step_tokens)
            self._stats = message.stats
            self._tell_room()
            if message.stats.running == 0 or time.monotonic() - self._reported_at >= REPORT_SECONDS:
                self._report(message.stats)

    def _send_what_is_due(self, now: float) -> None:
        interval = max(self._config.stream_interval_ms / 1000, len(self._relays) / self._responses_per_second)
        for uid, relay in list(self._relays.items()):
            if relay.is_due(now, interval):
                relay.send(now)
                if relay.is_final:
                    del self._relays[uid]

    def _on_ready(self, ready: Ready) -> None:
        with self._lock:
            self._incarnation = ready.incarnation
            self._sent = 0
            self._reported = ready.stats
            self._report(ready.stats)
            self._stats = ready.stats
            for request in self._backlog:
                self._send(request)
            self._backlog = []
            self._tell_room()
        self._readiness.regain()
        self._started.set()

    def _on_death(self, exit_code: int | None) -> None:
        """Fails what the worker had, says not ready, and starts another."""
        with self._lock:
            had_been_ready, self._stats = self._stats is not None, None
            self._fail_what_it_had(exit_code)
            self._tell_room()
        if not self._started.is_set():
            self._started.set()
            return
        logger.error("the engine's worker ended with code %s; starting another", exit_code)
        self._metrics.restarts.add(1)
        if had_been_ready:
            self._readiness.lose()
        else:
            time.sleep(RESTART_SECONDS)
        self._worker = self._start_worker()

    def _fail_what_it_had(self, exit_code: int | None) -> None:
        waiting = {request.uid for request in self._backlog}
        message = f"the engine's worker ended (code {exit_code}) while it served the request; try again"
        for uid in [uid for uid in self._relays if uid not in waiting]:
            self._relays.pop(uid).fail(Outcome.ERROR, Failure(ErrorCode.UNAVAILABLE.value, message))

    def _tell_room(self) -> None:
        stats = self._stats
        if stats is None:
            self._room.tell(self._incarnation, self._received - len(self._backlog), 0, None)
        else:
            received = self._received - (self._sent - stats.received)
            self._room.tell(self._incarnation, received, stats.free_slots, stats.lowest_key)

    def _report(self, stats: EngineStats) -> None:
        before, self._reported, self._reported_at = self._reported, stats, time.monotonic()
        metrics = self._metrics
        metrics.running.set(stats.running)
        metrics.preempted.set(stats.waiting)
        metrics.kv_total.set(stats.kv_blocks_total)
        metrics.kv_used.set(stats.kv_blocks_used)
        metrics.cache_hits.add(stats.prefix_cache_hit_tokens_total - before.prefix_cache_hit_tokens_total)
        metrics.preemptions.add(stats.preemptions_total - before.preemptions_total, "recompute")

    def finalize(self) -> None:
        self._readiness.release()
        self._room.stop()
        self._worker.stop()
