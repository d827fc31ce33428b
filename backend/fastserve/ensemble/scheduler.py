"""The step `scheduler`: the common queue of all engine replicas.

    request in -> Admission -> request out, the best-scoring one whenever the engine has room

`engine` says by a request of its own (input `capacity`) what room it has.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.config import read_config
from fastserve.ensemble.final_response import send_error, send_final
from fastserve.ensemble.metrics import REPORT_SECONDS, QueueMetrics
from fastserve.ensemble.secret import is_forwarded_id, share_secret
from fastserve.ensemble.server_death import leave_with_server
from fastserve.ensemble.tensors import call, message_of, message_tensor
from fastserve.errors import ErrorCode, RequestError, invalid
from fastserve.scheduling.admission import Admission
from fastserve.scheduling.policies import make_policy
from fastserve.service_thread import ServiceThread
from fastserve.types import Accepted, EngineCapacity, Failure, Health, Outcome, Refused, Request

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Between two attempts to tell the gauges, where the server cannot be told."""


class SchedulerModel:
    """Triton server's Python model `scheduler`."""

    def initialize(self, args: dict[str, str]) -> None:
        leave_with_server()
        share_secret()
        config = read_config()
        self._admission = Admission(make_policy(config), config.max_queue_size, config.max_queue_seconds)
        # The engine tells its room when a first request has reached it: until then there is room for one.
        self._admission.update(
            EngineCapacity(
                incarnation="", serial=0, received=0, arrived=0, free_slots=1, lowest_key=None, time=0.0
            )
        )
        self._senders: dict[str, Any] = {}
        self._metrics = QueueMetrics()
        self._reported: dict[int, int] = {}
        """What the gauges were last told."""
        self._reported_at = 0.0
        self._report_at: float | None = None
        """When they are to be told next; None: they show what is."""
        self._changed = threading.Condition()
        self._stopping = False
        self._is_undone = False
        """The clock has failed at what it was to do."""
        self._clock = ServiceThread("queue-deadlines", self._expire_in_time, on_health=_tell_engine)
        self._clock.start()

    def execute(self, requests: list[Any]) -> None:
        with self._changed:
            for triton_request in requests:
                sender = triton_request.get_response_sender()
                try:
                    self._dispatch(triton_request, sender)
                except RequestError as error:
                    send_error(sender, error)
                except Exception as error:
                    logger.exception("a request could not be taken in")
                    self._refuse(
                        sender, RequestError(f"scheduler: {error}", ErrorCode.INTERNAL), Outcome.ERROR
                    )
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
            self._admission.update(capacity)
            self._refuse_too_long()
            send_final(sender)
        elif request is None:
            raise invalid("inputs", "none", "`request` or `capacity`")
        elif request.uid in self._senders:
            raise invalid("request", request.uid, "one that does not wait already")
        else:
            self._enqueue(request, sender)

    def _enqueue(self, request: Request, sender: Any) -> None:
        try:
            self._admission.submit(request, time.monotonic())
        except RequestError as error:
            self._refuse(sender, error, Outcome.REJECTED)
            return
        self._senders[request.uid] = sender
        if is_forwarded_id(request.request_id):
            self._accept(request, sender)

    def _accept(self, request: Request, sender: Any) -> None:
        """Says at once that a forwarded request waits: till then it holds one of 32 threads of the server."""
        accepted = message_tensor("released", Accepted(request.uid))
        try:
            sender.send(pb_utils.InferenceResponse(output_tensors=[accepted]))
        except Exception as error:
            logger.error("request %s could not be told that it waits: %s", request.uid, error)

    def _refuse(self, sender: Any, error: RequestError, outcome: Outcome) -> None:
        self._metrics.requests.add(1, outcome.value)
        send_error(sender, error)

    def _refuse_waiting(self, request: Request, sender: Any, error: RequestError, outcome: Outcome) -> None:
        """Refuses one that was in the queue. A forwarded one knows that: its failure travels as data."""
        if is_forwarded_id(request.request_id):
            failure = Failure(error.code.value, str(error))
            refused = message_tensor("released", Refused(request, outcome, failure))
            try:
                send_final(sender, pb_utils.InferenceResponse(output_tensors=[refused]))
                return
            except Exception:
                logger.exception("request %s could not be told that it failed", request.uid)
        self._refuse(sender, error, outcome)

    def _refuse_too_long(self) -> None:
        for request, error in self._admission.refuse_too_long():
            self._refuse_waiting(request, self._senders.pop(request.uid), error, Outcome.REJECTED)

    def _release(self, now: float) -> None:
        for request in self._admission.release(now):
            self._send(request, self._senders.pop(request.uid))
            self._metrics.wait.observe(now - request.arrival, request.priority_label)
        self._report(now)

    def _send(self, request: Request, sender: Any) -> None:
        """One that cannot be sent is refused; the engine's numbers will tell that it has not come."""
        try:
            send_final(
                sender, pb_utils.InferenceResponse(output_tensors=[message_tensor("released", request)])
            )
        except Exception as failure:
            logger.exception("request %s could not be sent to the engine", request.uid)
            message = f"the request could not be sent to the engine: {failure}"
            error = RequestError(message, ErrorCode.UNAVAILABLE)
            self._refuse_waiting(request, sender, error, Outcome.ERROR)

    def _report(self, now: float) -> None:
        """Tells the gauges how many wait: at once when nobody does, else every REPORT_SECONDS."""
        counts = self._admission.waiting_by_priority()
        if counts == self._reported:
            self._report_at = None
        elif self._admission.num_waiting and now < self._reported_at + REPORT_SECONDS:
            self._report_at = self._reported_at + REPORT_SECONDS
        else:
            shown = [self._metrics.waiting.set(count, priority) for priority, count in counts.items()]
            self._reported_at = now
            if all(shown):
                self._reported, self._report_at = counts, None
            else:
                self._report_at = now + RETRY_SECONDS

    def _expire_in_time(self) -> bool:
        """Waits for what time alone gives to do, and does it; what has failed is done again at once."""
        with self._changed:
            if not self._stopping and not self._is_undone:
                self._changed.wait(self._seconds_left())
            if not self._stopping:
                self._is_undone = True
                now = time.monotonic()
                self._expire(now)
                self._release(
                    now
                )  # a release that was lost before the engine spoke is given up after a while
                self._is_undone = False
            return not self._stopping

    def _seconds_left(self) -> float | None:
        times = [each for each in (self._admission.next_expiry, self._report_at) if each is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self, now: float) -> None:
        for request in self._admission.expire(now):
            error = RequestError(
                f"no room within {now - request.arrival:.1f} s, the request's limit in the queue",
                ErrorCode.UNAVAILABLE,
            )
            self._refuse_waiting(request, self._senders.pop(request.uid), error, Outcome.TIMEOUT)

    def finalize(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._clock.hurry()
        self._clock.join()


def _tell_engine(problem: str | None) -> None:
    call("engine", [message_tensor("hold", Health("scheduler", problem))])
