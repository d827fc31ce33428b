"""The model `postprocess`: tokens -> text, and the only place that sees that a client has cancelled.

It sends that to `engine`, and also which sequences have met a stop string, by requests to its input `stop`.
"""

from __future__ import annotations

import logging
import queue
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.checkpoints.model_files import locate
from fastserve.config import read_config
from fastserve.ensemble.messaging import (
    call,
    failure_tensors,
    is_forwarded_id,
    message_of,
    message_tensor,
    numbers,
    report_health,
    send_error,
    send_final,
    strings,
)
from fastserve.ensemble.metrics import ResponseMetrics
from fastserve.ensemble.server_death import leave_with_server
from fastserve.ensemble.shared_secret import server_secret
from fastserve.errors import ErrorCode, RequestError, invalid
from fastserve.service_thread import ServiceThread
from fastserve.text.output_processor import OutputProcessor, Response
from fastserve.text.tokenizer import load_tokenizer
from fastserve.types import Cancel, Outcome, OutputOptions, Request, RequestOutput

logger = logging.getLogger(__name__)

FORGET_SECONDS = 60.0
"""From a request's deadline until its state is dropped, if no last output came; and between two sweeps."""


@dataclass(slots=True)
class RequestState:
    """A request between its first and its last output."""

    request: Request
    output_processor: OutputProcessor
    first_token: float
    """Its time, `time.monotonic()`."""
    num_tokens: int = 0
    is_cancelled: bool = False
    """Its client has cancelled, and the stop is on its way to `engine`."""
    failure: RequestError | None = None
    """Why no more is sent of it; its client is told with its last output."""


class PostprocessModel:
    """Triton server's Python model `postprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer, and starts the thread that sends stops."""
        leave_with_server()
        server_secret()  # made while there is shared memory for it
        self._tokenizer = load_tokenizer(locate(read_config().model))
        self._states: dict[str, RequestState] = {}
        self._metrics = ResponseMetrics()
        self._stops: queue.SimpleQueue[Cancel | None] = queue.SimpleQueue()
        self._unsent_stop: Cancel | None = None
        """The stop that could not be sent to the engine yet."""
        self._stopping = False
        self._next_sweep = 0.0
        self._stop_sender = ServiceThread(
            "stops", self._send_stop, on_health=partial(report_health, "postprocess")
        )
        self._stop_sender.start()

    def execute(self, requests: list[Any]) -> None:
        """Answers each output of the engine once: with text, an error, or only the final flag."""
        for triton_request in requests:
            sender = triton_request.get_response_sender()
            output, is_forwarded = None, False
            try:
                output = message_of(triton_request, "output", RequestOutput)
                if output is None:
                    raise invalid("output", None, "a message of `engine`")
                is_forwarded = self._is_forwarded(output)
                self._answer(output, sender, triton_request.is_cancelled())
            except RequestError as error:
                self._fail(output, sender, error, is_forwarded)
            except Exception as error:
                logger.exception("an output of request %s could not be answered", output and output.uid)
                self._fail(output, sender, _as_request_error(error), is_forwarded)

    def _is_forwarded(self, output: RequestOutput) -> bool:
        state = self._states.get(output.uid)
        request = state.request if state is not None else output.request
        return request is not None and is_forwarded_id(request.request_id)

    def _fail(
        self, output: RequestOutput | None, sender: Any, error: RequestError, is_forwarded: bool
    ) -> None:
        """Ends a request with an error, which to `fastserve_infer` travels as data: else it would be lost.

        In the middle of a request the error waits for the last output: an ensemble that is given one while
        another step of the request is in flight never lets go of the request (2.51).
        """
        state = None if output is None else self._states.get(output.uid)
        if output is not None and state is not None and not output.final:
            self._stop_failed(state, error)
            _end_output(sender)
            return
        if output is not None:
            self._end(output.uid)
        if is_forwarded:
            try:
                send_final(sender, pb_utils.InferenceResponse(output_tensors=failure_tensors(error)))
                return
            except Exception:
                logger.exception("the failure of a request could not be sent: %s", error)
        send_error(sender, error)

    def _answer(self, output: RequestOutput, sender: Any, is_cancelled: bool) -> None:
        """Sends the response to this output, if any. Raises RequestError for one that failed."""
        if not output.outputs:  # the request waits in the queue
            queued = strings("text_output", [""])
            send_final(sender, pb_utils.InferenceResponse(output_tensors=[queued]))
            return
        now = time.monotonic()
        state = self._state(output, now)
        if state is None:  # it has failed here, and its client has the error
            send_final(sender)
            return
        if state.failure is not None:
            self._answer_failed(state.failure, output, sender)
            return
        if is_cancelled and not state.is_cancelled and not output.final:
            state.is_cancelled = True
            self._stops.put(Cancel(output.uid, Outcome.CANCELLED))
        self._count(state, output)
        if output.final:
            self._observe_end(state, output, now)
            del self._states[output.uid]
        send_final(sender, self._push(state, output))

    def _push(self, state: RequestState, output: RequestOutput) -> pb_utils.InferenceResponse | None:
        response = state.output_processor.push(output)
        for index in state.output_processor.newly_stopped:
            self._stops.put(Cancel(output.uid, Outcome.STOP, index))
        if response is None:
            return None
        return pb_utils.InferenceResponse(output_tensors=_tensors(response, state.request.output))

    def _stop_failed(self, state: RequestState, error: RequestError) -> None:
        """From now on the outputs of this request are dropped; the last one comes when the engine is told."""
        state.failure = error
        self._stops.put(Cancel(state.request.uid, Outcome.CANCELLED))

    @staticmethod
    def _answer_failed(failure: RequestError, output: RequestOutput, sender: Any) -> None:
        """Answers an output of a request that has failed here. Raises the failure with the last one."""
        if output.final:
            raise failure
        send_final(sender)

    def _end(self, uid: str) -> None:
        """Ends a request that has failed here: the engine stops it, and its further outputs are dropped."""
        if self._states.pop(uid, None) is not None:
            self._metrics.requests.add(1, Outcome.ERROR.value)
            self._stops.put(Cancel(uid, Outcome.CANCELLED))

    def _state(self, output: RequestOutput, now: float) -> RequestState | None:
        """The request's state; None where it has failed here."""
        request = output.request
        if request is None:
            return self._states.get(output.uid)
        if now >= self._next_sweep:
            self._sweep(now)
        state = RequestState(request, OutputProcessor(self._tokenizer, request), now)
        self._states[output.uid] = state
        if any(each.token_ids for each in output.outputs):
            self._metrics.first_token.observe(now - request.arrival, request.priority_label)
        return state

    def _count(self, state: RequestState, output: RequestOutput) -> None:
        num_tokens = sum(len(each.token_ids) for each in output.outputs)
        state.num_tokens += num_tokens
        tenant = self._metrics.tenants.label(state.request.tenant)
        self._metrics.generation_tokens.add(num_tokens, tenant)

    def _observe_end(self, state: RequestState, output: RequestOutput, now: float) -> None:
        request, metrics = state.request, self._metrics
        outcome = output.outputs[-1].outcome if output.outputs else None
        metrics.requests.add(1, (outcome or Outcome.ERROR).value)
        metrics.prompt_tokens.add(len(request.prompt_token_ids), metrics.tenants.label(request.tenant))
        if outcome in (Outcome.STOP, Outcome.LENGTH):
            metrics.end_to_end.observe(now - request.arrival, request.priority_label)
            if state.num_tokens > 1:
                metrics.output_token.observe((now - state.first_token) / (state.num_tokens - 1))

    def _sweep(self, now: float) -> None:
        """Drops requests past their deadline whose last output never came, because it could not be sent."""
        self._next_sweep = now + FORGET_SECONDS
        for uid, state in list(self._states.items()):
            deadline = state.request.deadline
            if deadline is not None and deadline + FORGET_SECONDS <= now:
                self._end(uid)

    def _send_stop(self) -> bool:
        """Sends the next stop; `execute` must not wait for another model. One that fails is sent again."""
        stop = self._unsent_stop or self._stops.get()
        if stop is None or self._stopping:
            return False
        self._unsent_stop = stop
        call("engine", [message_tensor("stop", stop)])
        self._unsent_stop = None
        return True

    def finalize(self) -> None:
        """Ends the thread."""
        self._stopping = True
        self._stops.put(None)
        self._stop_sender.join()


def _end_output(sender: Any) -> None:
    """Answers an output with nothing. Never raises: the request is answered with its last output."""
    try:
        send_final(sender)
    except Exception as error:
        logger.error("an output could not be ended: %s", error)


def _as_request_error(error: Exception) -> RequestError:
    """The client's error for an answer that could not be made, or not be sent."""
    if isinstance(error, pb_utils.TritonModelException):
        return RequestError(f"the answer could not be sent: {error}", ErrorCode.UNAVAILABLE)
    return RequestError(f"the answer could not be made: {type(error).__name__}: {error}", ErrorCode.INTERNAL)


def _tensors(response: Response, asked: OutputOptions) -> list[pb_utils.Tensor]:
    """The output tensors: the text, and what else the client has asked for."""
    tensors = [strings("text_output", response.text)]
    if asked.finish_reason:
        tensors.append(strings("finish_reason", response.finish_reason))
    if asked.cumulative_logprob:
        tensors.append(numbers("cumulative_logprob", response.cumulative_logprob, np.float32))
    if asked.logprobs:
        tensors.append(strings("logprobs", response.logprobs))
    if response.prompt_logprobs is not None:
        tensors.append(strings("prompt_logprobs", [response.prompt_logprobs]))
    if asked.token_ids:
        flat = [token_id for token_ids in response.token_ids for token_id in token_ids]
        tensors.append(numbers("token_ids", flat, np.int64))
    if asked.num_input_tokens:
        tensors.append(numbers("num_input_tokens", [response.num_input_tokens], np.uint32))
    if asked.num_output_tokens:
        tensors.append(numbers("num_output_tokens", response.num_output_tokens, np.uint32))
    return tensors
