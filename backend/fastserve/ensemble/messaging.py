"""What the ensemble's models receive and send: tensors, signed messages, responses, requests to one another.

Triton server 2.51 closes no model to clients, so each message is signed: a client's imitation is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from fastserve.ensemble.api_tensors import API_INPUTS
from fastserve.ensemble.message_signature import sign, verify
from fastserve.ensemble.server_lock import SERVER_LOCK
from fastserve.ensemble.shared_memory import is_shared_memory_short
from fastserve.errors import ErrorCode, RequestError, invalid, with_code
from fastserve.types import decode, encode

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CODES = {code: getattr(pb_utils.TritonError, code.triton_code) for code in ErrorCode}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


# Tensors


def strings(name: str, values: list[Any]) -> pb_utils.Tensor:
    """A STRING [len(values)] tensor of str or bytes."""
    data = [value if isinstance(value, bytes) else value.encode() for value in values]
    return pb_utils.Tensor(name, np.array(data, dtype=np.object_))


def numbers(name: str, values: list[Any], dtype: Any) -> pb_utils.Tensor:
    """A tensor of shape [len(values)]."""
    return pb_utils.Tensor(name, np.array(values, dtype=dtype))


# What a client sent


def read_inputs(request: Any) -> dict[str, Any]:
    """The API's inputs that came, as Python values or arrays. Raises RequestError for a wrong shape."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in API_INPUTS}
    return {name: _value(name, tensor.as_numpy()) for name, tensor in tensors.items() if tensor is not None}


def _value(name: str, array: Any) -> Any:
    if API_INPUTS[name].length == -1:
        return array
    if array.size != 1:
        raise invalid(name, list(array.shape), "a tensor of shape [1]")
    return array.reshape(-1)[0] if array.dtype == object else array.reshape(-1)[0].item()


def read_parameters(request: Any) -> dict[str, Any]:
    """The request parameters, without those that Triton server adds of its own."""
    return own_parameters(json.loads(request.parameters() or "{}"))


def own_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that Triton server has not added."""
    return {name: value for name, value in parameters.items() if not name.startswith("triton_")}


# Messages between models


def message_tensor(name: str, message: Any) -> pb_utils.Tensor:
    """A STRING [1] tensor that carries a message, signed for an input of that name."""
    return strings(name, [sign(name, encode(message))])


def message_response(name: str, message: Any) -> pb_utils.InferenceResponse:
    """A response whose only output, of that name, carries a message."""
    return pb_utils.InferenceResponse(output_tensors=[message_tensor(name, message)])


def message_of(request: Any, name: str, as_type: type[T]) -> T | None:
    """The message in an optional input of a request, or None where the input is absent.

    Raises RequestError for a message that this server has not signed.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else read_message(name, tensor.as_numpy()[0], as_type)


def read_message(name: str, signed: bytes, as_type: type[T]) -> T:
    """The message in the element of a `message_tensor` of that name. Raises RequestError as `message_of`."""
    return decode(verify(name, signed), as_type)


def call(model: str, name: str, message: Any) -> None:
    """Sends a message to the input `name` of another model of this server, and waits until it has answered.

    It asks for no outputs: `resume_sender` says why. Raises RequestError (UNAVAILABLE) when it cannot be
    sent, or with the first error among the responses.
    """
    inputs = [message_tensor(name, message)]
    request = pb_utils.InferenceRequest(model_name=model, requested_output_names=[], inputs=inputs)
    try:
        responses = list(request.exec(decoupled=True))
    except pb_utils.TritonModelException as error:
        raise RequestError(f"{model}: {error}", ErrorCode.UNAVAILABLE) from error
    for response in responses:
        if response.has_error():
            raise RequestError(f"{model}: {response.error().message()}", ErrorCode.UNAVAILABLE)


# Responses


def error_response(error: Exception) -> pb_utils.InferenceResponse:
    """A response that says `error`; one that is no RequestError is INTERNAL.

    The code is written before the sentence too: Triton server's gRPC streams, its HTTP `generate` and a
    request that one model sends to another tell nobody which code it was.
    """
    if not isinstance(error, RequestError):
        error = RequestError(f"{type(error).__name__}: {error}", ErrorCode.INTERNAL)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(with_code(error), _CODES[error.code]))


def send_final(sender: Any, response: Any = None) -> None:
    """Sends the last response, or only the final flag: until it has come, the client waits.

    Raises as the sender does where there is no memory for it. While that is short the flag travels alone,
    after the response (`shared_memory` says why). An error, which is small, always carries it: without it
    gRPC answers with no error and no output, and the server waited, at its exit, for a request (2.51).
    """
    with SERVER_LOCK:
        if response is not None and not response.has_error() and is_shared_memory_short():
            sender.send(response)
            response = None
        if response is None:
            sender.send(flags=FINAL)
        else:
            sender.send(response, flags=FINAL)


def send(sender: Any, response: Any) -> None:
    """Sends a response that others follow. Raises as the sender does where there is no memory for it."""
    with SERVER_LOCK:
        sender.send(response)


def send_error(sender: Any, error: Exception) -> None:
    """Ends a request with an error, or at least ends it. Never raises: there is nobody else to tell."""
    try:
        send_final(sender, error_response(error))
    except Exception as failure:
        logger.error("an error could not be sent (%s): %s", error, failure)
        send_end(sender)


def send_end(sender: Any) -> None:
    """Sends the final flag alone. Never raises."""
    try:
        send_final(sender)
    except Exception as failure:
        logger.error("a request could not be ended: %s", failure)


def send_response_or_error(sender: Any, response: pb_utils.InferenceResponse) -> None:
    """Ends a request with its only response, or with the error that this could not be sent. Never raises."""
    try:
        send_final(sender, response)
    except Exception as failure:
        logger.exception("a response could not be sent")
        send_error(sender, RequestError(f"the answer could not be sent: {failure}", ErrorCode.UNAVAILABLE))


def dispatch_each(
    model: str,
    requests: list[Any],
    dispatch: Callable[[Any, Any], None],
    answer_fault: Callable[[Any, RequestError], None],
) -> None:
    """Calls `dispatch(request, response_sender)` for each request of a batch to `model`.

    A RequestError ends its request only. So does any other exception, a fault of ours, by `answer_fault`.
    """
    for request in requests:
        sender = request.get_response_sender()
        try:
            dispatch(request, sender)
        except RequestError as error:
            send_error(sender, error)
        except Exception as error:
            logger.exception("a request could not be taken in")
            answer_fault(sender, RequestError(f"{model}: {error}", ErrorCode.INTERNAL))
