"""Requests that `fastserve_infer` forwards to `fastserve`: how the models know them, and how they answer.

A request that one model sends to another holds one of 32 threads of the server until its first response: so
it has one as soon as it waits in the queue. An error that follows a response is lost between models: so each
later failure travels as data (2.51).
"""

from __future__ import annotations

import hmac
import logging
import uuid
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.ensemble.control_messages import Queued, Rejected
from fastserve.ensemble.message_signature import authentication_code
from fastserve.ensemble.messaging import message_response, send, send_error, send_final, strings
from fastserve.ensemble.response_stream import ResponseStream
from fastserve.errors import RequestError, with_code
from fastserve.types import Failure, Outcome, Request, RequestOutput

logger = logging.getLogger(__name__)

FAILED = "error"
"""The `finish_reason` of a failure sent as data, to `fastserve_infer` only; the text is the error."""


def forwarded_id() -> str:
    """A new request id, for a request that `fastserve_infer` forwards; no client can make one."""
    name = uuid.uuid4().hex
    return f"{name}-{_code(name)}"


def is_forwarded(request: Request | None) -> bool:
    """Whether its id is one that `forwarded_id` of this server has made."""
    if request is None:
        return False
    name, _, code = request.request_id.partition("-")
    return hmac.compare_digest(code.encode(), _code(name).encode())


def _code(name: str) -> str:
    return authentication_code("forwarded_id", name.encode()).hex()


def answer_queued(request: Request, sender: Any) -> None:
    """From `scheduler`: says that a forwarded request waits; its release will follow. Never raises."""
    try:
        send(sender, message_response("released", Queued(request.uid)))
    except Exception as error:
        logger.error("request %s: the response that it waits could not be sent: %s", request.uid, error)


def send_rejected(request: Request, sender: Any, error: RequestError, outcome: Outcome) -> bool:
    """From `scheduler`: ends a forwarded request that fails in the queue; False where that cannot be sent."""
    try:
        failure = Failure.of(error)
        send_final(sender, message_response("released", Rejected(request, outcome, failure)))
    except Exception:
        logger.exception("the failure of request %s could not be sent", request.uid)
        return False
    return True


def relay_queue_message(released: Queued | Rejected, sender: Any) -> None:
    """From `engine`: hands on to `postprocess` what `scheduler` says of a forwarded request."""
    if isinstance(released, Rejected):
        ResponseStream(released.request, sender, 1).fail(released.outcome, released.failure)
    else:
        send_final(sender, message_response("output", RequestOutput(released.uid, [])))


def send_failure(sender: Any, error: RequestError) -> None:
    """From `postprocess`: ends a forwarded request with an error as data. Never raises."""
    try:
        send_final(sender, pb_utils.InferenceResponse(output_tensors=failure_tensors(error)))
    except Exception:
        logger.exception("the failure of a request could not be sent: %s", error)
        send_error(sender, error)


def failure_tensors(error: RequestError) -> list[pb_utils.Tensor]:
    """An error as data, in the outputs of the API."""
    return [strings("text_output", [with_code(error)]), strings("finish_reason", [FAILED])]
