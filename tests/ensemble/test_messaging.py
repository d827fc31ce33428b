from __future__ import annotations

from typing import Any

import pytest

from fastserve.errors import ErrorCode, RequestError, read_error
from fastserve.types import Cancel, Outcome


def test_a_message_comes_out_as_it_went_in(pb_utils: Any) -> None:
    from fastserve.ensemble.messaging import message_of, message_tensor

    cancel = Cancel("uid", Outcome.STOP, 3)
    request = pb_utils.InferenceRequest(inputs=[message_tensor("stop", cancel)])
    assert message_of(request, "stop", Cancel) == cancel
    assert message_of(request, "request", Cancel) is None


def test_a_call_that_fails_says_which_model(pb_utils: Any) -> None:
    from fastserve.ensemble.messaging import call, error_response

    refusal = error_response(RequestError("full", ErrorCode.UNAVAILABLE))
    pb_utils.server.answer = lambda request: [pb_utils.InferenceResponse(), refusal]
    with pytest.raises(RequestError, match="scheduler: UNAVAILABLE: full"):
        call("scheduler", "stop", Cancel("uid", Outcome.STOP))

    def broken(request: Any) -> Any:
        raise pb_utils.TritonModelException("shared memory is full")

    pb_utils.server.answer = broken
    with pytest.raises(RequestError, match="scheduler: shared memory is full"):
        call("scheduler", "stop", Cancel("uid", Outcome.STOP))


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_says_its_code_and_comes_back_with_it(pb_utils: Any, code: ErrorCode) -> None:
    from fastserve.ensemble.messaging import error_response

    error = error_response(RequestError("`x`: got 1; allowed: 2", code)).error()
    assert error.message() == f"{code.value}: `x`: got 1; allowed: 2"
    assert error.code() == getattr(pb_utils.TritonError, code.triton_code)
    for message in (error.message(), f"in ensemble 'fastserve', {error.message()}"):
        came_back = read_error(message)
        assert came_back is not None
        assert (came_back.code, str(came_back)) == (code, "`x`: got 1; allowed: 2")


def test_what_another_has_written_has_no_code() -> None:
    assert read_error("in ensemble 'fastserve', the model is not ready: UNAVAILABLE: x") is None
