"""The model `postprocess`: tokens -> text, and the only place that sees that a client has cancelled.

It sends that to `engine`, and also which sequences have met a stop string (`StopSender`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.checkpoints.model_files import locate
from fastserve.ensemble.forwarding import is_forwarded, send_failure
from fastserve.ensemble.messaging import message_of, numbers, send_end, send_error, send_final, strings
from fastserve.ensemble.model_start import start_model
from fastserve.ensemble.request_accounts import RequestAccount, RequestAccounts, outcome_of
from fastserve.ensemble.stop_sender import StopSender
from fastserve.errors import ErrorCode, RequestError, invalid
from fastserve.text.output_processor import OutputProcessor, Response
from fastserve.text.tokenizer import load_tokenizer
from fastserve.types import Cancel, Outcome, OutputOptions, Request, RequestOutput

logger = logging.getLogger(__name__)

QUESTION_SECONDS = 0.1
"""Between two questions whether the client of a request has cancelled."""
FORGET_SECONDS = 60.0
"""From a request's deadline until its state is dropped, if no last output came; and between two sweeps."""


@dataclass(slots=True)
class RequestState:
    """A request between its first and its last output."""

    request: Request
    output_processor: OutputProcessor
    account: RequestAccount
    next_question: float
    """When to ask whether its client has cancelled: not before the first token, which would wait for it."""
    is_cancelled: bool = False
    """Its client has cancelled, and the stop is on its way to `engine`."""
    failure: RequestError | None = None
    """Why no more is sent of it; its client is told with its last output."""

    def is_newly_cancelled(self, triton_request: Any, now: float) -> bool:
        """Whether its client is now known to have cancelled; `triton_request`: its latest.

        The server's process is asked, which costs as much as half a response: not for each one.
        """
        if self.is_cancelled or now < self.next_question:
            return False
        self.next_question = now + QUESTION_SECONDS
        self.is_cancelled = triton_request.is_cancelled()
        return self.is_cancelled


class PostprocessModel:
    """Triton server's Python model `postprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer, and starts the thread that sends stops."""
        config = start_model()
        self._tokenizer = load_tokenizer(locate(config.model))
        self._states: dict[str, RequestState] = {}
        self._accounts = RequestAccounts(config)
        self._stops = StopSender()
        self._next_sweep = 0.0

    def execute(self, requests: list[Any]) -> None:
        """Answers each output of the engine once: with text, an error, or only the final flag."""
        for triton_request in requests:
            sender = triton_request.get_response_sender()
            output = state = None
            try:
                output = message_of(triton_request, "output", RequestOutput)
                if output is None:
                    raise invalid("output", None, "a message of `engine`")
                state = self._state(output)
                self._answer(output, state, sender, triton_request)
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("an output of request %s could not be answered", output and output.uid)
                self._fail(output, state, sender, _as_request_error(error))

    def _state(self, output: RequestOutput) -> RequestState | None:
        """The request's state, made with its first output; None where it only waits, or has failed here."""
        request = output.request
        if request is None:
            return self._states.get(output.uid)
        now = time.monotonic()
        if now >= self._next_sweep:
            self._sweep(now)
        processor = OutputProcessor(self._tokenizer, request)
        account = RequestAccount(request, now, output.released, output.overtaken_by)
        state = self._states[output.uid] = RequestState(request, processor, account, now + QUESTION_SECONDS)
        return state

    def _answer(
        self, output: RequestOutput, state: RequestState | None, sender: Any, triton_request: Any
    ) -> None:
        """Sends the response to this output, if any. Raises RequestError for one that failed."""
        if not output.outputs:  # the request waits in the queue
            queued = strings("text_output", [""])
            send_final(sender, pb_utils.InferenceResponse(output_tensors=[queued]))
        elif state is None:  # it has failed here, and its client has the error
            send_final(sender)
        elif state.failure is None:
            now = time.monotonic()
            if not output.final and state.is_newly_cancelled(triton_request, now):
                self._stops.send(Cancel(output.uid, Outcome.CANCELLED))
            if output.final:  # whoever has the whole answer finds it counted
                del self._states[output.uid]
                self._accounts.count(state.account, output, now)
                send_final(sender, self._push(state, output))
                self._accounts.log(state.account, outcome_of(output), now)
            else:
                send_final(sender, self._push(state, output))
                self._accounts.count(state.account, output, now)
        elif output.final:
            raise state.failure
        else:
            send_final(sender)

    def _push(self, state: RequestState, output: RequestOutput) -> pb_utils.InferenceResponse | None:
        response = state.output_processor.push(output)
        for index in state.output_processor.newly_stopped:
            self._stops.send(Cancel(output.uid, Outcome.STOP, index))
        if response is None:
            return None
        self._accounts.keep_text(state.account, response.text)
        tensors = _tensors(response, state.request.output)
        if output.final and state.request.output.timing:
            tensors.append(strings("timing", [state.account.timing(time.monotonic()).json()]))
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _fail(
        self, output: RequestOutput | None, state: RequestState | None, sender: Any, error: RequestError
    ) -> None:
        """Ends a request with an error, which to `fastserve_infer` travels as data: else it would be lost.

        In the middle of a request the error waits for the last output, which comes when the engine is told
        to stop; those before it are dropped. An ensemble that is given an error while another step of the
        request is in flight never lets go of the request (2.51).
        """
        if output is not None and state is not None and not output.final:
            state.failure = error
            self._stops.send(Cancel(output.uid, Outcome.CANCELLED))
            send_end(sender)
            return
        if output is None:
            send_error(sender, error)
            return
        self._end(output.uid)
        if state is not None:
            self._accounts.log(state.account, outcome_of(output), time.monotonic(), error.code.value)
        if is_forwarded(state.request if state is not None else output.request):
            send_failure(sender, error)
        else:
            send_error(sender, error)

    def _end(self, uid: str) -> None:
        """Ends a request that has failed here: the engine stops it, and its further outputs are dropped."""
        if self._states.pop(uid, None) is not None:
            self._accounts.count_failed()
            self._stops.send(Cancel(uid, Outcome.CANCELLED))

    def _sweep(self, now: float) -> None:
        """Drops requests past their deadline whose last output never came, because it could not be sent."""
        self._next_sweep = now + FORGET_SECONDS
        for uid, state in list(self._states.items()):
            deadline = state.request.deadline
            if deadline is not None and deadline + FORGET_SECONDS <= now:
                self._end(uid)

    def finalize(self) -> None:
        """Ends the threads."""
        self._stops.close()
        self._accounts.close()


def _as_request_error(error: Exception) -> RequestError:
    """The client's error; that for an answer that could not be made, or not be sent, says so."""
    if isinstance(error, RequestError):
        return error
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
