"""The model `fastserve_infer`: the contract of `fastserve` with exactly one response.

Triton server refuses `infer()` over HTTP on a decoupled model. This one is not decoupled; it forwards a
request to `fastserve` at once, so that all wait in one queue, and answers when that has answered. It notices
that a gRPC client has cancelled, and it takes the input `cancel`: the id of requests that shall stop,
whichever way they came in.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.access.request_log import open_request_log, refused
from fastserve.ensemble.control_messages import CancelById
from fastserve.ensemble.door import Door
from fastserve.ensemble.forwarding import FAILED, forwarded_id
from fastserve.ensemble.messaging import (
    call,
    error_response,
    read_parameters,
    send_response_or_error,
    strings,
)
from fastserve.ensemble.metrics import requests_total
from fastserve.ensemble.model_start import start_model
from fastserve.ensemble.readiness import report_health
from fastserve.errors import ErrorCode, RequestError, invalid, read_error
from fastserve.service_thread import ServiceThread
from fastserve.text.validation import coerce
from fastserve.types import Outcome

logger = logging.getLogger(__name__)

MODEL = "fastserve"
MAX_IN_FLIGHT = 2048
"""Requests in flight: each has a thread."""
STACK_BYTES = 512 << 10
"""Stack of a thread. The default, 8 MB each, exhausts the address space that some containers allow."""
LOST_AFTER_SECONDS = 30.0
"""Beyond the time that a request may take: what has not been answered by then never will be."""
POLL_SECONDS = 0.4
"""Between two polls for clients that have cancelled."""
POLL_SECONDS_EACH = 0.001
"""With many requests in flight polls are rarer: each asks the server's process."""


class _ForwardedRequest:
    """A request on its way through `fastserve`, under an id of our own, by which it alone is cancelled."""

    def __init__(self, request: Any, sender: Any, tenant: str | None) -> None:
        """`tenant`: by its client's key; None: there are no keys."""
        self.request = request
        self.tenant = tenant
        # With the client's key, by which `preprocess` lets it in.
        self.parameters = read_parameters(request)
        # HTTP `generate` gives the id as a parameter.
        self.client_id = request.request_id() or coerce("id", self.parameters.pop("id", ""), str)
        self.inner_id = forwarded_id()
        self.arrival = time.monotonic()
        self._sender = sender
        self._lock = threading.Lock()
        self._is_answered = False
        self._is_cancelled = False

    def is_newly_cancelled(self) -> bool:
        """Whether its client has cancelled; true once."""
        with self._lock:  # the server is not asked about a request that has been answered
            if self._is_answered or self._is_cancelled:
                return False
            self._is_cancelled = self.request.is_cancelled()
            return self._is_cancelled

    def answer(self, response: pb_utils.InferenceResponse) -> None:
        """Sends the response, unless there has been one."""
        with self._lock:
            if not self._is_answered:
                self._is_answered = True
                send_response_or_error(self._sender, response)


class InferModel:
    """Triton server's Python model `fastserve_infer`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the threads that send cancellations and look for clients that have cancelled."""
        config = start_model()
        self._door = Door(config, MODEL)
        self._request_log = open_request_log(config)
        threading.stack_size(STACK_BYTES)
        self._max_in_flight = min(config.max_queue_size + config.max_num_seqs, MAX_IN_FLIGHT)
        self._lost_after = config.max_request_seconds + LOST_AFTER_SECONDS
        self._in_flight: dict[str, _ForwardedRequest] = {}
        self._lock = threading.Lock()
        self._requests_total = requests_total()
        self._stopping = threading.Event()
        self._cancels: queue.SimpleQueue[tuple[list[str], str | None, Any] | None] = queue.SimpleQueue()
        """Ids, whose requests (None: anybody's), and who is to be answered."""
        on_health = partial(report_health, "fastserve_infer")
        self._canceller = ServiceThread("cancels", self._send_cancel, on_health=on_health)
        self._poller = ServiceThread("cancelled-clients", self._poll_clients, on_health=on_health)
        self._canceller.start()
        self._poller.start()

    def execute(self, requests: list[Any]) -> None:
        """Starts a thread for each request, which answers it; a cancellation is answered when it is sent."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("a request could not be read")
                outcome = Outcome.REJECTED if isinstance(error, RequestError) else Outcome.ERROR
                self._requests_total.add(1, outcome.value)
                self._request_log.write(
                    refused(error, outcome.value, time.monotonic(), request_id=request.request_id())
                )
                send_response_or_error(sender, error_response(error))

    def _take(self, request: Any, sender: Any) -> None:
        grant, _ = self._door.read(request)
        tenant = None if grant is None else grant.tenant
        cancel = pb_utils.get_input_tensor_by_name(request, "cancel")
        if cancel is not None:
            self._take_cancel(cancel.as_numpy()[0].decode(errors="replace"), tenant, request, sender)
            return
        forwarded = _ForwardedRequest(request, sender, tenant)
        _check_stream(forwarded)
        with self._lock:
            if len(self._in_flight) >= self._max_in_flight:
                raise RequestError(
                    f"the queue is full: {self._max_in_flight} requests are in flight through"
                    " `fastserve_infer` (`max_queue_size` and `max_num_seqs`)",
                    ErrorCode.UNAVAILABLE,
                )
            self._in_flight[forwarded.inner_id] = forwarded
        try:
            threading.Thread(target=self._serve, args=(forwarded,), name="infer", daemon=True).start()
        except RuntimeError as error:  # the machine gives no more threads
            self._answer(forwarded, error_response(RequestError(str(error), ErrorCode.UNAVAILABLE)))

    def _serve(self, forwarded: _ForwardedRequest) -> None:
        try:
            response = _forward(forwarded)
        except Exception as error:  # whatever it is, the client must not wait for ever
            if not isinstance(error, RequestError):
                logger.exception("a request could not be served")
            response = error_response(error)
        self._answer(forwarded, response)

    def _answer(self, forwarded: _ForwardedRequest, response: pb_utils.InferenceResponse) -> None:
        with self._lock:
            self._in_flight.pop(forwarded.inner_id, None)
        forwarded.answer(response)

    def _take_cancel(self, request_id: str, tenant: str | None, request: Any, sender: Any) -> None:
        others = sorted(tensor.name() for tensor in request.inputs() if tensor.name() != "cancel")
        if others:
            raise RequestError(f"`cancel`: got `{others[0]}` beside it; allowed: alone")
        if not request_id:
            raise invalid("cancel", request_id, "a request's id, which is not empty")
        with self._lock:
            inner_ids = [
                each.inner_id
                for each in self._in_flight.values()
                if (each.client_id, each.tenant) == (request_id, tenant)
            ]
        self._cancels.put(([request_id, *inner_ids], tenant, sender))

    def _send_cancel(self) -> bool:
        """Sends the next cancellation to `engine`, and answers whoever asked for it."""
        cancel = self._cancels.get()
        if cancel is None:
            return False
        request_ids, tenant, sender = cancel
        response = pb_utils.InferenceResponse(output_tensors=[strings("text_output", [""])])
        try:
            for request_id in request_ids:
                call("engine", "cancel", CancelById(request_id, time.monotonic(), tenant))
        except RequestError as error:
            if sender is None:
                self._cancels.put(cancel)  # nobody else asks for it again; this thread pauses after the error
                raise
            response = error_response(error)
        if sender is not None:
            send_response_or_error(sender, response)
        return True

    def _poll_clients(self) -> bool:
        with self._lock:
            in_flight = list(self._in_flight.values())
        if self._stopping.wait(max(POLL_SECONDS, len(in_flight) * POLL_SECONDS_EACH)):
            return False
        for forwarded in in_flight:
            if forwarded.is_newly_cancelled():
                self._cancels.put(([forwarded.inner_id], forwarded.tenant, None))
            if time.monotonic() - forwarded.arrival > self._lost_after:
                lost = RequestError(f"the answer of `{MODEL}` has been lost", ErrorCode.INTERNAL)
                self._answer(forwarded, error_response(lost))
        return True

    def finalize(self) -> None:
        """Ends the two threads; requests in flight have been drained before."""
        self._stopping.set()
        self._cancels.put(None)
        for thread in (self._poller, self._canceller):
            thread.join()
        self._request_log.close()


def _check_stream(forwarded: _ForwardedRequest) -> None:
    """Raises RequestError for a request that wants a stream: there is one response."""
    tensor = pb_utils.get_input_tensor_by_name(forwarded.request, "stream")
    if tensor is None:
        stream = coerce("stream", forwarded.parameters.get("stream", False), bool)
    else:
        stream = bool(np.any(tensor.as_numpy()))
    if stream:
        raise invalid("stream", True, "false: `fastserve_infer` answers once; stream from `fastserve`")


def _forward(forwarded: _ForwardedRequest) -> pb_utils.InferenceResponse:
    """The answer of `fastserve`. Raises RequestError where that is an error, with its code."""
    request = forwarded.request
    names = request.requested_output_names()
    inner = pb_utils.InferenceRequest(
        model_name=MODEL,
        requested_output_names=list({*names, "text_output", "finish_reason"} if names else ()),
        inputs=list(request.inputs()),
        request_id=forwarded.inner_id,
        timeout=request.timeout(),
        parameters={name: _forwardable(value) for name, value in forwarded.parameters.items()},
    )
    answer = None
    try:
        for response in inner.exec(decoupled=True):
            if response.has_error():
                raise _inner_error(response.error().message())
            if response.output_tensors():
                answer = response  # the first one only says that the request waits in the queue
    except pb_utils.TritonModelException as error:
        raise _inner_error(str(error)) from error
    if answer is None:
        raise RequestError(f"`{MODEL}` ended without an answer", ErrorCode.INTERNAL)
    tensors = {tensor.name(): tensor for tensor in answer.output_tensors()}
    reason = tensors.get("finish_reason")
    if reason is not None and _text(reason) == FAILED:
        raise _inner_error(_text(tensors["text_output"]))
    return pb_utils.InferenceResponse(output_tensors=list(tensors.values()))


def _text(tensor: pb_utils.Tensor) -> str:
    return bytes(tensor.as_numpy()[0]).decode()


def _forwardable(value: Any) -> bool | int | str:
    """A request parameter as one model can send it to another: no floats, which `coerce` reads from text."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else repr(value)


def _inner_error(message: str) -> RequestError:
    """The error in an answer of `fastserve`; one without a code is of Triton server itself."""
    error = read_error(message)
    if error is not None:
        return error
    if not pb_utils.is_model_ready(MODEL):
        return RequestError(f"the model `{MODEL}` is not ready; try again: {message}", ErrorCode.UNAVAILABLE)
    return RequestError(message, ErrorCode.INTERNAL)
