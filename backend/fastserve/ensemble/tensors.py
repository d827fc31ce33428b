"""Between Triton server's tensors and our types."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.ensemble.secret import seal, unseal
from fastserve.errors import ErrorCode, RequestError, with_code
from fastserve.types import decode, encode

T = TypeVar("T")

_CODES = {
    ErrorCode.INVALID_ARG: pb_utils.TritonError.INVALID_ARG,
    ErrorCode.UNAVAILABLE: pb_utils.TritonError.UNAVAILABLE,
    ErrorCode.CANCELLED: pb_utils.TritonError.CANCELLED,
    ErrorCode.INTERNAL: pb_utils.TritonError.INTERNAL,
}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def message_tensor(name: str, message: Any) -> pb_utils.Tensor:
    """A STRING [1] tensor that carries a message of `types.py`, sealed for an input of that name."""
    return strings(name, [seal(name, encode(message))])


def strings(name: str, values: list[Any]) -> pb_utils.Tensor:
    """A STRING [len(values)] tensor of str or bytes."""
    return pb_utils.Tensor(name, np.array([_bytes(value) for value in values], dtype=np.object_))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def numbers(name: str, values: list[Any], dtype: Any) -> pb_utils.Tensor:
    """A tensor of rank 1."""
    return pb_utils.Tensor(name, np.array(values, dtype=dtype))


def message_of(request: Any, name: str, as_type: type[T]) -> T | None:
    """The message in an optional input of a request, or None where the input is absent.

    Raises RequestError for a message that is not of this server's own steps.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else read_message(name, tensor.as_numpy()[0], as_type)


def read_message(name: str, sealed: bytes, as_type: type[T]) -> T:
    """The message in the element of a `message_tensor` of that name. Raises RequestError as `message_of`."""
    return decode(unseal(name, sealed), as_type)


def text_of(request: Any, name: str) -> str | None:
    """The text in an optional STRING [1] input of a request."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()[0].decode(errors="replace")


def error_response(error: Exception) -> pb_utils.InferenceResponse:
    """A response that says `error`; one that is no RequestError is INTERNAL.

    The code is written before the sentence too: Triton server's gRPC streams, its HTTP `generate` and a
    request that one model sends to another tell nobody which code it was.
    """
    if not isinstance(error, RequestError):
        error = RequestError(f"{type(error).__name__}: {error}", ErrorCode.INTERNAL)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(with_code(error), _CODES[error.code]))


FAILED = "error"
"""As `finish_reason`, to `fastserve_infer` only: the text is the error, with its code."""


def failure_tensors(error: RequestError) -> list[pb_utils.Tensor]:
    """An error as data, for a request that was forwarded: there, 2.51 loses an error after a response."""
    return [strings("text_output", [with_code(error)]), strings("finish_reason", [FAILED])]


def call(model: str, inputs: list[pb_utils.Tensor], request_id: str = "") -> list[pb_utils.InferenceResponse]:
    """Sends a request to another model of this server and waits for all its responses.

    Raises RequestError (UNAVAILABLE) when it cannot be sent, or with the first error among them.
    """
    request = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=[], inputs=inputs, request_id=request_id
    )
    try:
        responses = list(request.exec(decoupled=True))
    except pb_utils.TritonModelException as error:
        raise RequestError(f"{model}: {error}", ErrorCode.UNAVAILABLE) from error
    for response in responses:
        if response.has_error():
            raise RequestError(f"{model}: {response.error().message()}", ErrorCode.UNAVAILABLE)
    return responses
