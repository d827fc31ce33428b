from __future__ import annotations

from typing import Any

import pytest

from fastserve.errors import ErrorCode, RequestError
from fastserve.types import Cancel, Outcome


def test_a_message_comes_out_as_it_went_in(pb_utils: Any) -> None:
    from fastserve.triton_server.tensors import message_of, message_tensor

    cancel = Cancel("uid", Outcome.STOP, 3)
    request = pb_utils.InferenceRequest(inputs=[message_tensor("stop", cancel)])
    assert message_of(request, "stop", Cancel) == cancel
    assert message_of(request, "request", Cancel) is None


def test_a_call_that_fails_says_which_model(pb_utils: Any) -> None:
    from fastserve.triton_server.tensors import call, error_response

    refusal = error_response(RequestError("full", ErrorCode.UNAVAILABLE))
    pb_utils.server.answer = lambda request: [pb_utils.InferenceResponse(), refusal]
    with pytest.raises(RequestError, match="scheduler: UNAVAILABLE: full"):
        call("scheduler", [])

    def broken(request: Any) -> Any:
        raise pb_utils.TritonModelException("shared memory is full")

    pb_utils.server.answer = broken
    with pytest.raises(RequestError, match="scheduler: shared memory is full"):
        call("scheduler", [])
