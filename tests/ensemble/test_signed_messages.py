"""Messages between the models of a server are signed: an imitation is refused, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastserve.errors import ErrorCode, RequestError
from fastserve.types import (
    BlockUnload,
    Cancel,
    CancelById,
    EngineCapacity,
    Outcome,
    Queued,
    RequestOutput,
    encode,
)

CAPACITY = EngineCapacity(
    incarnation="x", serial=10**9, received=0, arrived=0, free_slots=10**6, lowest_key=None, time=0.0
)
UNSIGNED: dict[str, Any] = {
    "capacity": CAPACITY,
    "stop": Cancel("uid", Outcome.CANCELLED),
    "cancel": CancelById("id", 0.0),
    "health": BlockUnload(),
    "released": Queued("uid"),
    "output": RequestOutput("uid", [], final=True),
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_an_unsigned_message_is_refused_by_name(pb_utils: Any, name: str) -> None:
    from fastserve.ensemble.messaging import message_of, sign, strings

    for data in (encode(UNSIGNED[name]), b"", sign("other", encode(UNSIGNED[name]))):
        request = pb_utils.InferenceRequest(inputs=[strings(name, [data])])
        with pytest.raises(
            RequestError, match=f"`{name}`: got a message that is not of this server"
        ) as caught:
            message_of(request, name, type(UNSIGNED[name]))
        assert caught.value.code is ErrorCode.INVALID_ARG


def test_a_signed_message_that_was_changed_is_refused(pb_utils: Any) -> None:
    from fastserve.ensemble.messaging import sign, verify

    signed = bytearray(sign("capacity", encode(CAPACITY)))
    assert verify("capacity", bytes(signed)) == encode(CAPACITY)
    signed[-1] ^= 1
    with pytest.raises(RequestError):
        verify("capacity", bytes(signed))


def test_only_this_server_makes_the_ids_of_forwarded_requests(pb_utils: Any) -> None:
    from fastserve.ensemble.messaging import forwarded_id, is_forwarded_id

    assert is_forwarded_id(forwarded_id())
    assert not any(is_forwarded_id(each) for each in ("", "-", "é-é", "a-b", forwarded_id()[:-1]))


def test_the_scheduler_refuses_an_imitation_and_serves_what_came_with_it(pb_utils: Any) -> None:
    from fastserve.ensemble.messaging import message_tensor, read_message, strings
    from fastserve.ensemble.scheduler import SchedulerModel
    from fastserve.types import OutputOptions, Request, SamplingParams

    real = Request("uid", "id", "", [1], SamplingParams(), OutputOptions(), 0, "", 0.0, None)
    model = SchedulerModel()
    model.initialize({})
    forged = [
        pb_utils.InferenceRequest(inputs=[strings("capacity", [encode(CAPACITY)])]),
        pb_utils.InferenceRequest(inputs=[strings("request", [encode(real)])]),
        pb_utils.InferenceRequest(),
    ]
    good = pb_utils.InferenceRequest(inputs=[message_tensor("request", real)])
    model.execute([*forged, good])
    for request in forged:
        assert request.sender.is_final
        assert request.sender.error.message().startswith("INVALID_ARG: `")
    (released,) = good.sender.outputs("released")
    assert read_message("released", released[0], Request) == real
    model.finalize()


def test_a_forwarded_request_is_queued_at_once_and_fails_in_the_queue_as_data(
    pb_utils: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble.messaging import forwarded_id, message_tensor, read_message
    from fastserve.ensemble.scheduler import SchedulerModel
    from fastserve.types import OutputOptions, Rejected, Request, SamplingParams, SchedulerOutput

    (tmp_path / "config.json").write_text('{"max_queue_seconds": 0.01}')
    monkeypatch.setenv("FASTSERVE_CONFIG", str(tmp_path / "config.json"))
    model = SchedulerModel()
    model.initialize({})
    requests = []
    for uid in ("first", "second"):  # there is room for one
        request = Request(uid, forwarded_id(), "", [1], SamplingParams(), OutputOptions(), 0, "", 0.0, None)
        requests.append(pb_utils.InferenceRequest(inputs=[message_tensor("request", request)]))
    model.execute(requests)
    released = []
    for request in requests:
        request.sender.wait()
        assert request.sender.error is None
        released.append(
            [
                read_message("released", each[0], SchedulerOutput)
                for each in request.sender.outputs("released")
            ]
        )
    model.finalize()
    assert released[0][0] == Queued("first")
    assert isinstance(released[0][1], Request)
    assert released[1][0] == Queued("second")
    assert isinstance(released[1][1], Rejected)
    assert (released[1][1].outcome, released[1][1].failure.code) == (Outcome.TIMEOUT, "UNAVAILABLE")
    assert pb_utils.server.metric("fastserve_requests_total", outcome="timeout") == 0  # `postprocess` counts
