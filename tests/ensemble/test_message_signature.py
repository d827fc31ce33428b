"""Messages between the models of a server are signed: an imitation is refused, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.ensemble.control_messages import BlockUnload, CancelById, Queued
from fastserve.errors import ErrorCode, RequestError
from fastserve.scheduling.capacity import EngineCapacity, Released, ReplicaCapacity
from fastserve.types import Cancel, Outcome, RequestOutput, encode

CAPACITY = EngineCapacity(10**9, 0.0, [ReplicaCapacity("x", 0, 0, 10**6, 10**6, 10**6, 0)])
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
    from fastserve.ensemble.message_signature import sign
    from fastserve.ensemble.messaging import message_of, strings

    for data in (encode(UNSIGNED[name]), b"", sign("other", encode(UNSIGNED[name]))):
        request = pb_utils.InferenceRequest(inputs=[strings(name, [data])])
        with pytest.raises(
            RequestError, match=f"`{name}`: got a message that is not of this server"
        ) as caught:
            message_of(request, name, type(UNSIGNED[name]))
        assert caught.value.code is ErrorCode.INVALID_ARG


def test_a_signed_message_that_was_changed_is_refused(pb_utils: Any) -> None:
    from fastserve.ensemble.message_signature import sign, verify

    signed = bytearray(sign("capacity", encode(CAPACITY)))
    assert verify("capacity", bytes(signed)) == encode(CAPACITY)
    signed[-1] ^= 1
    with pytest.raises(RequestError):
        verify("capacity", bytes(signed))


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
    assert read_message("released", released[0], Released) == Released(real, 0)
    model.finalize()
