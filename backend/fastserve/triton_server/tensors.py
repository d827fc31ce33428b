"""Between Triton server's tensors and our types."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.errors import ErrorCode, RequestError
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
    """A STRING [1] tensor that carries a message of `types.py`."""
    return strings(name, [encode(message)])


def strings(name: str, values: list[Any]) -> pb_utils.Tensor:
    """A STRING [len(values)] tensor of str or bytes."""
    return pb_utils.Tensor(name, np.array([_bytes(value) for value in values], dtype=np.object_))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def numbers(name: str, values: list[Any], dtype: Any) -> pb_utils.Tensor:
    """A tensor of rank 1."""
    return pb_utils.Tensor(name, np.array(values, dtype=dtype))


def message_of(request: Any, name: str, as_type: type[T]) -> T | None:
    """The message in an optional input of a request, or None where the input is absent."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else decode(tensor.as_numpy()[0], as_type)


def text_of(request: Any, name: str) -> str | None:
    """The text in an optional STRING [1] input of a request."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()[0].decode(errors="replace")


def error_response(error: Exception) -> pb_utils.InferenceResponse:
    """A response that says `error`; one that is no RequestError is INTERNAL.

    A code other than INVALID_ARG is written before the sentence too: Triton server's gRPC streams and its
    HTTP `generate` tell no client which code it was.
    """
    code = error.code if isinstance(error, RequestError) else ErrorCode.INTERNAL
    message = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
    if code is not ErrorCode.INVALID_ARG:
        message = f"{code.value}: {message}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, _CODES[code]))


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
