"""The model `scheduler`: the common queue of all engine replicas.

    request in -> AdmissionQueue -> request out, the first by rank whenever a replica has capacity for it

`engine` publishes its capacity by requests of its own (input `capacity`), and is told by others which
preempted sequences run again (`ResumeSender`).
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any

from fastserve.access.request_log import open_request_log, refused
from fastserve.ensemble.door import TenantQuotas
from fastserve.ensemble.forwarding import answer_queued, is_forwarded, send_rejected
from fastserve.ensemble.messaging import dispatch_each, message_of, message_response, send_error, send_final
from fastserve.ensemble.metrics import QueueMetrics
from fastserve.ensemble.model_start import start_model
from fastserve.ensemble.readiness import report_health
from fastserve.ensemble.resume_sender import ResumeSender
from fastserve.errors import ErrorCode, RequestError, invalid
from fastserve.scheduling.admission import AdmissionQueue
from fastserve.scheduling.capacity import EngineCapacity, Released, ReplicaCapacity
from fastserve.scheduling.policies.registry import make_policy
from fastserve.scheduling.quotas import QuotaError
from fastserve.scheduling.request_labels import RequestLabels
from fastserve.service_thread import ServiceThread
from fastserve.types import Outcome, Request

logger = logging.getLogger(__name__)


class SchedulerModel:
    """Triton server's Python model `scheduler`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Makes the queue, and starts the threads that serve its deadlines and tell what runs again."""
        config = start_model()
        self._tenant_quotas, labels = TenantQuotas(config), RequestLabels(config)
        self._quotas = self._tenant_quotas.quotas
        self._request_log = open_request_log(config)
        self._admission = AdmissionQueue(
            make_policy(config), config.max_queue_size, config.max_queue_seconds, self._quotas, labels
        )
        # The engine publishes its capacity when a first request has reached it: until then that is one slot.
        one_slot = ReplicaCapacity(incarnation="", received=0, arrived=0, free_slots=1)
        self._admission.update(EngineCapacity(serial=0, time=0.0, replicas=[one_slot]), time.monotonic())
        self._senders: dict[str, Any] = {}
        self._metrics = QueueMetrics(labels, config.max_queue_size)
        self._changed = threading.Condition()
        self._stopping = False
        self._resumes = ResumeSender()
        self._deadlines = ServiceThread(
            "queue-deadlines", self._expire_in_time, on_health=partial(report_health, "scheduler")
        )
        self._deadlines_failed = False
        """The thread's last work raised, and is to be repeated without waiting."""
        self._deadlines.start()

    def execute(self, requests: list[Any]) -> None:
        """Takes in requests and the engine's capacity, and releases what there is capacity for."""
        with self._changed:
            answer_fault = partial(self._reject, outcome=Outcome.ERROR)
            dispatch_each("scheduler", requests, self._dispatch, answer_fault)
            try:
                self._release(time.monotonic())
            except Exception:  # the server would answer the whole batch with it, those too that now wait
                logger.exception("nothing could be released; it is tried again")
            self._changed.notify()

    def _dispatch(self, triton_request: Any, sender: Any) -> None:
        """Raises whatever is wrong with the request, unless it has been answered."""
        capacity = message_of(triton_request, "capacity", EngineCapacity)
        request = message_of(triton_request, "request", Request)
        if capacity is not None:
            now = time.monotonic()
            self._admission.update(capacity, now)
            for waiting, error in self._admission.refuse_too_long():
                self._fail_waiting(waiting, error, Outcome.REJECTED)
            send_final(sender)
        elif request is None:
            raise invalid("inputs", "none", "`request` or `capacity`")
        elif request.uid in self._senders:
            raise invalid("request", request.uid, "one that does not wait already")
        else:
            self._enqueue(request, sender)

    def _enqueue(self, request: Request, sender: Any) -> None:
        self._tenant_quotas.refresh()
        try:
            self._tenant_quotas.check_key(request)
            self._admission.submit(request, time.monotonic())
        except RequestError as error:
            if isinstance(error, QuotaError):
                self._metrics.count_rejected(request, error)
            self._reject(sender, error, Outcome.REJECTED, request)
            return
        self._senders[request.uid] = sender
        if is_forwarded(request):
            answer_queued(request, sender)

    def _reject(
        self, sender: Any, error: RequestError, outcome: Outcome, request: Request | None = None
    ) -> None:
        self._metrics.requests.add(1, outcome.value)
        if request is not None:
            self._request_log.write(refused(error, outcome.value, time.monotonic(), request))
        send_error(sender, error)

    def _fail_waiting(self, request: Request, error: RequestError, outcome: Outcome) -> None:
        """Fails a request that was in the queue; a forwarded one, which has had a response, by data."""
        sender = self._senders.pop(request.uid)
        if not (is_forwarded(request) and send_rejected(request, sender, error, outcome)):
            self._reject(sender, error, outcome, request)

    def _release(self, now: float) -> None:
        for released in self._admission.release(now):
            self._send(released)
            self._metrics.observe_wait(released.request, now)
        self._resumes.send(self._admission.take_resumes())
        self._metrics.report_waiting(self._admission.waiting_by_label(), now)

    def _send(self, released: Released) -> None:
        """Sends a request to the engine, or fails it; the engine's numbers will show that it has not come."""
        request = released.request
        try:
            send_final(self._senders[request.uid], message_response("released", released))
            del self._senders[request.uid]
        except Exception as failure:
            logger.exception("request %s could not be sent to the engine", request.uid)
            self._quotas.end(request.uid, 0)
            message = f"the request could not be sent to the engine: {failure}"
            self._fail_waiting(request, RequestError(message, ErrorCode.UNAVAILABLE), Outcome.ERROR)

    def _expire_in_time(self) -> bool:
        """Waits for the next deadline or report, and serves it; what has failed is repeated at once."""
        with self._changed:
            if not self._stopping and not self._deadlines_failed:
                self._changed.wait(self._seconds_left())
            if not self._stopping:
                self._deadlines_failed = True
                now = time.monotonic()
                self._expire(now)
                self._release(now)  # a release that never reached the engine is given up after a while
                self._deadlines_failed = False
            return not self._stopping

    def _seconds_left(self) -> float | None:
        times = [each for each in (self._admission.next_expiry, self._metrics.report_at) if each is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self, now: float) -> None:
        for request in self._admission.expire(now):
            error = RequestError(
                f"no room within {now - request.arrival:.1f} s, the request's limit in the queue",
                ErrorCode.UNAVAILABLE,
            )
            self._fail_waiting(request, error, Outcome.TIMEOUT)

    def finalize(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._deadlines.join()
        self._resumes.close()
        self._request_log.close()
