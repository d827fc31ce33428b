"""The step `postprocess`: tokens -> text, and the only place that sees that a client is gone.

It tells `engine` so, and also which sequences have met a stop string, by requests to its input `stop`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.config import read_config
from fastserve.errors import RequestError
from fastserve.model_files import load_tokenizer, locate
from fastserve.text.postprocessor import Postprocessor, Response
from fastserve.triton_server.metrics import ResponseMetrics
from fastserve.triton_server.secret import is_forwarded_id
from fastserve.triton_server.tensors import (
    FINAL,
    call,
    error_response,
    failure_tensors,
    message_of,
    message_tensor,
    numbers,
    strings,
)
from fastserve.types import Cancel, Outcome, OutputOptions, Request, RequestOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Conversation:
    """One request between its first and its last output."""

    request: Request
    postprocessor: Postprocessor
    first_token: float
    """When it came, `time.monotonic()`."""
    num_tokens: int = 0
    is_gone: bool = False


class PostprocessStep:
    """Triton server's Python model `postprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        self._tokenizer = load_tokenizer(locate(read_config().model))
        self._conversations: dict[str, _Conversation] = {}
        self._metrics = ResponseMetrics()
        self._stops: queue.SimpleQueue[Cancel | None] = queue.SimpleQueue()
        self._teller = threading.Thread(target=self._tell_engine, name="stops", daemon=True)
        self._teller.start()

    def execute(self, requests: list[Any]) -> None:
        for triton_request in requests:
            sender = triton_request.get_response_sender()
            try:
                output = message_of(triton_request, "output", RequestOutput)
                if output is None:
                    raise RequestError("`output`: absent")
                response = self._push(output, triton_request.is_cancelled())
            except RequestError as error:
                sender.send(error_response(error), flags=FINAL)
                continue
            if response is None:
                sender.send(flags=FINAL)
            else:
                sender.send(pb_utils.InferenceResponse(output_tensors=response), flags=FINAL)

    def _push(self, output: RequestOutput, is_cancelled: bool) -> list[pb_utils.Tensor] | None:
        """The tensors of the response to this output, if any. Raises RequestError for one that failed."""
        if not output.outputs:
            return [strings("text_output", [""])]  # the request has been accepted; nothing has come of it yet
        now = time.monotonic()
        conversation = self._conversation(output, now)
        if is_cancelled and not conversation.is_gone and not output.final:
            conversation.is_gone = True
            self._stops.put(Cancel(output.uid, Outcome.CANCELLED))
        self._count(conversation, output)
        if output.final:
            del self._conversations[output.uid]
            self._observe_end(conversation, output, now)
        try:
            response = conversation.postprocessor.push(output)
        except RequestError as error:
            if not is_forwarded_id(conversation.request.request_id):
                raise
            return failure_tensors(error)
        for index in conversation.postprocessor.newly_stopped:
            self._stops.put(Cancel(output.uid, Outcome.STOP, index))
        return None if response is None else _tensors(response, conversation.request.output)

    def _conversation(self, output: RequestOutput, now: float) -> _Conversation:
        request = output.request
        if request is None:
            if output.uid not in self._conversations:
                raise RequestError("`output`: got tokens of a request that has ended")
            return self._conversations[output.uid]
        conversation = _Conversation(request, Postprocessor(self._tokenizer), now)
        self._conversations[output.uid] = conversation
        if any(each.token_ids for each in output.outputs):
            self._metrics.first_token.observe(now - request.arrival, request.priority_label)
        return conversation

    def _count(self, conversation: _Conversation, output: RequestOutput) -> None:
        num_tokens = sum(len(each.token_ids) for each in output.outputs)
        conversation.num_tokens += num_tokens
        self._metrics.generation_tokens.add(num_tokens)

    def _observe_end(self, conversation: _Conversation, output: RequestOutput, now: float) -> None:
        request, metrics = conversation.request, self._metrics
        outcome = output.outputs[-1].outcome if output.outputs else None
        metrics.requests.add(1, (outcome or Outcome.ERROR).value)
        metrics.prompt_tokens.add(len(request.prompt_token_ids))
        if outcome in (Outcome.STOP, Outcome.LENGTH):
            metrics.end_to_end.observe(now - request.arrival, request.priority_label)
            if conversation.num_tokens > 1:
                metrics.output_token.observe((now - conversation.first_token) / (conversation.num_tokens - 1))

    def _tell_engine(self) -> None:
        """From a thread of its own: `execute` must not wait for another model."""
        while (stop := self._stops.get()) is not None:
            try:
                call("engine", [message_tensor("stop", stop)])
            except RequestError as error:
                logger.error("the engine was not told to stop %s: %s", stop.uid, error)

    def finalize(self) -> None:
        self._stops.put(None)
        self._teller.join()


def _tensors(response: Response, asked: OutputOptions) -> list[pb_utils.Tensor]:
    """The text, and what else the client has asked for."""
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
