"""The model `fastserve_infer`: the contract of `fastserve` with exactly one response.

Triton server refuses `infer()` over HTTP on a decoupled model. This one is not decoupled; it asks `fastserve`
and answers when that has answered, and takes other requests meanwhile.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.errors import RequestError, invalid
from fastserve.triton_server.inputs import read_parameters
from fastserve.triton_server.tensors import FINAL, error_response

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 256
"""Requests that wait for their answer at once; each has a thread. More wait for one of these to end."""


class InferStep:
    """Triton server's Python model `fastserve_infer`."""

    def initialize(self, args: dict[str, str]) -> None:
        self._threads = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="infer")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._threads.submit(_serve, request, request.get_response_sender())

    def finalize(self) -> None:
        self._threads.shutdown()


def _serve(request: Any, sender: Any) -> None:
    try:
        response = _ask(request)
    except Exception as error:  # whatever it is, the client must not wait for ever
        if not isinstance(error, RequestError):
            logger.exception("a request could not be served")
        response = error_response(error)
    sender.send(response, flags=FINAL)


def _ask(request: Any) -> pb_utils.InferenceResponse:
    stream = pb_utils.get_input_tensor_by_name(request, "stream")
    if stream is not None and bool(np.any(stream.as_numpy())):
        raise invalid("stream", True, "false: `fastserve_infer` answers once; stream from `fastserve`")
    inner = pb_utils.InferenceRequest(
        model_name="fastserve",
        requested_output_names=list(request.requested_output_names()),
        inputs=list(request.inputs()),
        request_id=request.request_id(),
        timeout=request.timeout(),
        parameters=read_parameters(request),
    )
    for response in inner.exec(decoupled=True):
        if response.has_error():
            return pb_utils.InferenceResponse(error=response.error())
        if response.output_tensors():
            return pb_utils.InferenceResponse(output_tensors=response.output_tensors())
    raise RequestError("`fastserve` ended without an answer")
