"""The model `preprocess`: client's tensors -> validated, tokenized `Request`.

Compiling a guide takes up to seconds, so threads wait for that and answer later, while `execute` goes on:
a heavy grammar delays nobody else. All other requests are answered by `execute`, in the order they came.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.checkpoints.model_files import locate
from fastserve.checkpoints.model_metadata import context_length, model_vocab_size
from fastserve.config import is_stopping, read_config
from fastserve.ensemble.messaging import (
    error_response,
    message_tensor,
    read_inputs,
    read_parameters,
    send_response_or_error,
)
from fastserve.ensemble.metrics import requests_total
from fastserve.ensemble.server_death import leave_with_server
from fastserve.ensemble.shared_secret import server_secret
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import InputProcessor, ParsedRequest
from fastserve.text.tokenizer import load_tokenizer
from fastserve.types import Outcome

logger = logging.getLogger(__name__)

MAX_GUIDES_AT_ONCE = 8
"""Guides that are compiled at once."""
MAX_GUIDED_REQUESTS = 256
"""Requests whose guides are compiled or wait for it; more are refused."""


class PreprocessModel:
    """Triton server's Python model `preprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer."""
        leave_with_server()
        server_secret()  # made while there is shared memory for it
        self._input_processor = _load_input_processor()
        self._requests_total = requests_total()
        self._threads = ThreadPoolExecutor(MAX_GUIDES_AT_ONCE, thread_name_prefix="guides")
        self._guide_slots = BoundedSemaphore(MAX_GUIDED_REQUESTS)

    def execute(self, requests: list[Any]) -> list[Any]:
        """The responses; None for a request that a thread answers later."""
        return [self._respond(request) for request in requests]

    def _respond(self, triton_request: Any) -> pb_utils.InferenceResponse | None:
        try:
            parsed = self._parse(triton_request)
            if parsed.guide_field:
                self._answer_later(parsed, triton_request.get_response_sender())
                return None
            return _answer(parsed)
        except Exception as error:
            return self._refusal(error)

    def _answer_later(self, parsed: ParsedRequest, sender: Any) -> None:
        if not self._guide_slots.acquire(blocking=False):
            raise RequestError(
                f"`{parsed.guide_field}`: {MAX_GUIDED_REQUESTS} requests wait for their turn already",
                ErrorCode.UNAVAILABLE,
            )
        self._threads.submit(self._check_guide, parsed, sender)

    def _check_guide(self, parsed: ParsedRequest, sender: Any) -> None:
        """Answers when it is known whether the guide compiles, in a thread of its own."""
        try:
            self._input_processor.check_guide(parsed)
            response = _answer(parsed)
        except Exception as error:
            response = self._refusal(error)
        finally:
            self._guide_slots.release()
        send_response_or_error(sender, response)

    def _refusal(self, error: Exception) -> pb_utils.InferenceResponse:
        is_refused = isinstance(error, RequestError)
        if not is_refused:
            logger.error("a request could not be read", exc_info=error)
        self._requests_total.add(1, (Outcome.REJECTED if is_refused else Outcome.ERROR).value)
        return error_response(error)

    def _parse(self, triton_request: Any) -> ParsedRequest:
        if is_stopping():
            raise RequestError("the server is stopping and takes no more requests", ErrorCode.UNAVAILABLE)
        return self._input_processor.parse(
            read_inputs(triton_request),
            read_parameters(triton_request),
            now=time.monotonic(),
            request_id=triton_request.request_id(),
            timeout_us=triton_request.timeout(),
        )

    def finalize(self) -> None:
        """Ends the threads and the process that compile guides."""
        self._threads.shutdown()
        self._input_processor.close()


def _load_input_processor() -> InputProcessor:
    config = read_config()
    files = locate(config.model)
    return InputProcessor(
        config,
        load_tokenizer(files),
        config.max_model_len or context_length(files.checkpoint),
        model_vocab_size(files.checkpoint),
    )


def _answer(parsed: ParsedRequest) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(output_tensors=[message_tensor("request", parsed.request)])
