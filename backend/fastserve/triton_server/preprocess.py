"""The step `preprocess`: client's tensors -> validated, tokenised `Request`."""

from __future__ import annotations

import logging
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.config import read_config
from fastserve.errors import RequestError
from fastserve.model_files import load_tokenizer, locate
from fastserve.models.model_directory import context_length
from fastserve.text.preprocessor import Preprocessor
from fastserve.triton_server.inputs import read_inputs, read_parameters
from fastserve.triton_server.metrics import requests_total
from fastserve.triton_server.stopping import refuse_if_stopping
from fastserve.triton_server.tensors import error_response, message_tensor
from fastserve.types import Outcome, Request

logger = logging.getLogger(__name__)


class PreprocessStep:
    """Triton server's Python model `preprocess`."""

    def initialize(self, args: dict[str, str]) -> None:
        config = read_config()
        files = locate(config.model)
        self._preprocessor = Preprocessor(
            config, load_tokenizer(files), config.max_model_len or context_length(files.checkpoint)
        )
        self._requests_total = requests_total()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, triton_request: Any) -> pb_utils.InferenceResponse:
        try:
            request = self._build(triton_request)
        except RequestError as error:
            self._requests_total.add(1, Outcome.REJECTED.value)
            return error_response(error)
        except Exception as error:
            logger.exception("a request could not be read")
            self._requests_total.add(1, Outcome.ERROR.value)
            return error_response(error)
        return pb_utils.InferenceResponse(output_tensors=[message_tensor("request", request)])

    def _build(self, triton_request: Any) -> Request:
        refuse_if_stopping()
        return self._preprocessor.build(
            read_inputs(triton_request),
            read_parameters(triton_request),
            now=time.monotonic(),
            request_id=triton_request.request_id(),
            timeout_us=triton_request.timeout(),
        )
