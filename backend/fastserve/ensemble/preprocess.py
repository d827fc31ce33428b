"""The model `preprocess`: client's tensors -> validated, tokenized `Request`.

Requests are answered in the order they came, but for guided ones (`GuideChecks`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.access.request_log import open_request_log, refused
from fastserve.checkpoints.model_files import locate
from fastserve.checkpoints.model_metadata import context_length, model_vocab_size
from fastserve.config import Config, is_stopping
from fastserve.ensemble.door import Door
from fastserve.ensemble.guide_checks import GuideChecks
from fastserve.ensemble.messaging import error_response, message_response, read_inputs
from fastserve.ensemble.metrics import requests_total
from fastserve.ensemble.model_start import start_model
from fastserve.errors import ErrorCode, RequestError
from fastserve.text.input_processor import InputProcessor, ParsedRequest
from fastserve.text.tokenizer import load_tokenizer
from fastserve.types import Outcome, Request

logger = logging.getLogger(__name__)


class PreprocessModel:
    """Triton server's Python model `preprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the tokenizer."""
        config = start_model()
        self._door = Door(config, "fastserve")
        self._request_log = open_request_log(config)
        self._input_processor = _load_input_processor(config)
        self._requests_total = requests_total()
        self._guide_checks = GuideChecks(self._answer)

    def execute(self, requests: list[Any]) -> list[Any]:
        """The responses; None for a request that a thread answers later."""
        return [self._respond(request) for request in requests]

    def _respond(self, triton_request: Any) -> pb_utils.InferenceResponse | None:
        try:
            parsed = self._parse(triton_request)
            if parsed.guide_field:
                self._guide_checks.submit(parsed, triton_request.get_response_sender())
                return None
        except Exception as error:
            return self._refusal(error, triton_request.request_id())
        return self._answer(parsed)

    def _answer(self, parsed: ParsedRequest) -> pb_utils.InferenceResponse:
        try:
            request = self._input_processor.check_guide(parsed)
            return message_response("request", request)
        except Exception as error:
            return self._refusal(error, parsed.request.request_id, parsed.request)

    def _refusal(
        self, error: Exception, request_id: str, request: Request | None = None
    ) -> pb_utils.InferenceResponse:
        is_refused = isinstance(error, RequestError)
        if not is_refused:
            logger.error("a request could not be read", exc_info=error)
        outcome = (Outcome.REJECTED if is_refused else Outcome.ERROR).value
        self._requests_total.add(1, outcome)
        self._request_log.write(refused(error, outcome, time.monotonic(), request, request_id))
        return error_response(error)

    def _parse(self, triton_request: Any) -> ParsedRequest:
        if is_stopping():
            raise RequestError("the server is stopping and takes no more requests", ErrorCode.UNAVAILABLE)
        grant, parameters = self._door.read(triton_request)
        parsed = self._input_processor.parse(
            read_inputs(triton_request),
            parameters,
            now=time.monotonic(),
            request_id=triton_request.request_id(),
            timeout_us=triton_request.timeout(),
        )
        return parsed if grant is None else parsed._replace(request=grant.apply(parsed.request))

    def finalize(self) -> None:
        """Ends the threads and the process that compile guides."""
        self._guide_checks.close()
        self._input_processor.close()
        self._request_log.close()


def _load_input_processor(config: Config) -> InputProcessor:
    files = locate(config.model)
    return InputProcessor(
        config,
        load_tokenizer(files),
        config.max_model_len or context_length(files.checkpoint),
        model_vocab_size(files.checkpoint),
    )
