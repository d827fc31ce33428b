"""The step `scheduler`: the common queue of all engine replicas.

    request in -> Admission -> request out, the best-scoring one whenever the engine has room

`engine` says by a request of its own (input `room`) what room it has.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.config import read_config
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.admission import Admission
from fastserve.scheduling.policies import make_policy
from fastserve.triton_server.metrics import QueueMetrics
from fastserve.triton_server.secret import is_forwarded_id
from fastserve.triton_server.tensors import FINAL, error_response, message_of, message_tensor
from fastserve.types import Accepted, Failure, Outcome, Refused, Request, Room

logger = logging.getLogger(__name__)


class SchedulerStep:
    """Triton server's Python model `scheduler`."""

    def initialize(self, args: dict[str, str]) -> None:
        config = read_config()
        self._admission = Admission(make_policy(config), config.max_queue_size, config.max_queue_seconds)
        # The engine tells its room when a first request has reached it: until then there is room for one.
        self._admission.update(Room(incarnation="", serial=0, received=0, free_slots=1, lowest_key=None))
        self._senders: dict[str, Any] = {}
        self._metrics = QueueMetrics()
        self._changed = threading.Condition()
        self._stopping = False
        self._clock = threading.Thread(target=self._expire_in_time, name="queue-deadlines", daemon=True)
        self._clock.start()

    def execute(self, requests: list[Any]) -> None:
        with self._changed:
            for triton_request in requests:
                sender = triton_request.get_response_sender()
                try:
                    self._take(triton_request, sender)
                except RequestError as error:
                    sender.send(error_response(error), flags=FINAL)
            self._release(time.monotonic())
            self._changed.notify()

    def _take(self, triton_request: Any, sender: Any) -> None:
        room = message_of(triton_request, "room", Room)
        request = message_of(triton_request, "request", Request)
        if room is not None:
            self._admission.update(room)
            sender.send(flags=FINAL)
        elif request is None or request.uid in self._senders:
            raise RequestError("`request`: got none, or one that waits already; allowed: a new one")
        else:
            self._enqueue(request, sender)

    def _enqueue(self, request: Request, sender: Any) -> None:
        try:
            self._admission.submit(request, time.monotonic())
        except RequestError as error:
            self._metrics.requests.add(1, Outcome.REJECTED.value)
            sender.send(error_response(error), flags=FINAL)
            return
        self._senders[request.uid] = sender
        if is_forwarded_id(request.request_id):
            # A model that forwards a request holds one of a few threads of the server until a first response.
            accepted = message_tensor("released", Accepted(request.uid))
            sender.send(pb_utils.InferenceResponse(output_tensors=[accepted]))

    def _release(self, now: float) -> None:
        for request in self._admission.release(now):
            self._metrics.wait.observe(now - request.arrival, request.priority_label)
            response = pb_utils.InferenceResponse(output_tensors=[message_tensor("released", request)])
            self._senders.pop(request.uid).send(response, flags=FINAL)
        for priority, count in self._admission.waiting_by_priority().items():
            self._metrics.waiting.set(count, priority)

    def _expire_in_time(self) -> None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                self._expire(now)
                self._release(now)  # a release that was lost on its way is given up after a while
                expiry = self._admission.next_expiry
                self._changed.wait(None if expiry is None else max(0.0, expiry - now))

    def _expire(self, now: float) -> None:
        for request in self._admission.expire(now):
            message = f"no room within {now - request.arrival:.1f} s, the request's limit in the queue"
            if is_forwarded_id(request.request_id):
                failure = Failure(ErrorCode.UNAVAILABLE.value, message)
                refused = message_tensor("released", Refused(request, Outcome.TIMEOUT, failure))
                response = pb_utils.InferenceResponse(output_tensors=[refused])
            else:
                self._metrics.requests.add(1, Outcome.TIMEOUT.value)
                response = error_response(RequestError(message, ErrorCode.UNAVAILABLE))
            self._senders.pop(request.uid).send(response, flags=FINAL)

    def finalize(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._clock.join()
