"""A forwarded request on its way: it has a response at once, and its failure as data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoints.model_files import ModelFiles
from fastserve.ensemble.control_messages import Queued, Rejected, SchedulerOutput
from fastserve.scheduling.capacity import Released
from fastserve.types import (
    Failure,
    Outcome,
    OutputOptions,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
)

FAILURE = SequenceOutput("uid", outcome=Outcome.TIMEOUT, failure=Failure("UNAVAILABLE", "no room"))


def a_request(request_id: str) -> Request:
    return Request("uid", request_id, "", [1], SamplingParams(), OutputOptions(), 0, "", 0.0, None)


def test_only_this_server_makes_the_ids_of_forwarded_requests(pb_utils: Any) -> None:
    from fastserve.ensemble.forwarding import forwarded_id, is_forwarded

    assert is_forwarded(a_request(forwarded_id()))
    others = ("", "-", "é-é", "a-b", forwarded_id()[:-1])
    assert not any(is_forwarded(a_request(each)) for each in others)


def test_a_forwarded_request_is_queued_at_once_and_fails_in_the_queue_as_data(
    pb_utils: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble.forwarding import forwarded_id
    from fastserve.ensemble.messaging import message_tensor, read_message
    from fastserve.ensemble.scheduler import SchedulerModel

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
    assert isinstance(released[0][1], Released)
    assert released[1][0] == Queued("second")
    assert isinstance(released[1][1], Rejected)
    assert (released[1][1].outcome, released[1][1].failure.code) == (Outcome.TIMEOUT, "UNAVAILABLE")
    assert pb_utils.server.metric("fastserve_requests_total", outcome="timeout") == 0  # `postprocess` counts


@pytest.fixture
def postprocess(pb_utils: Any, monkeypatch: pytest.MonkeyPatch, default_model: ModelFiles) -> Iterator[Any]:
    from fastserve.ensemble import postprocess as module

    monkeypatch.setattr(module, "locate", lambda model: default_model)
    model = module.PostprocessModel()
    model.initialize({})
    yield model
    model.finalize()


def answer_to(pb_utils: Any, model: Any, output: RequestOutput) -> Any:
    from fastserve.ensemble.messaging import message_tensor

    request = pb_utils.InferenceRequest(inputs=[message_tensor("output", output)])
    model.execute([request])
    assert request.sender.is_final
    return request.sender


def test_postprocess_answers_that_it_waits_with_no_text(pb_utils: Any, postprocess: Any) -> None:
    sender = answer_to(pb_utils, postprocess, RequestOutput("uid", []))
    assert [array.tolist() for array in sender.outputs("text_output")] == [[b""]]


def test_a_failure_is_data_to_the_model_that_forwards_and_an_error_to_others(
    pb_utils: Any, postprocess: Any
) -> None:
    from fastserve.ensemble.forwarding import forwarded_id

    own = RequestOutput("uid", [FAILURE], a_request("mine"), final=True)
    assert answer_to(pb_utils, postprocess, own).error.message() == "UNAVAILABLE: no room"
    forwarded = RequestOutput("uid", [FAILURE], a_request(forwarded_id()), final=True)
    sender = answer_to(pb_utils, postprocess, forwarded)
    assert sender.error is None
    assert sender.outputs("text_output")[0].tolist() == [b"UNAVAILABLE: no room"]
    assert sender.outputs("finish_reason")[0].tolist() == [b"error"]
    assert pb_utils.server.metric("fastserve_requests_total", outcome="timeout") == 2


def test_a_fault_of_ours_is_data_too(
    pb_utils: Any, postprocess: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastserve.ensemble.forwarding import forwarded_id

    def broken(*arguments: Any) -> Any:
        raise ValueError("unforeseen")

    monkeypatch.setattr(postprocess, "_push", broken)
    outputs = [SequenceOutput("uid", token_ids=[1])]
    output = RequestOutput("uid", outputs, a_request(forwarded_id()), final=True)
    sender = answer_to(pb_utils, postprocess, output)
    assert sender.error is None
    assert sender.outputs("text_output")[0][0].startswith(b"INTERNAL: ")
