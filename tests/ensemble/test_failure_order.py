"""What was computed before a failure reaches the client before it does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastserve.types import (
    Failure,
    Outcome,
    OutputOptions,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceOutput,
)


def test_tokens_before_a_failure_travel_in_a_message_of_their_own(pb_utils: Any) -> None:
    relay = import_module("fastserve.triton_server.relay")
    tensors = import_module("fastserve.triton_server.tensors")
    request = Request("uid", "", "", [1], SamplingParams(), OutputOptions(stream=True), 0, "", 0.0, None)
    sender = pb_utils.ResponseSender()
    stream = relay.Relay(request, sender, 1)
    tokens = SequenceOutput("uid", token_ids=[7])
    failure = SequenceOutput("uid", outcome=Outcome.CANCELLED, failure=Failure("CANCELLED", "cancelled"))
    stream.add(tokens)
    stream.add(failure)
    stream.send(0.0)
    sent = [tensors.read_message("output", each[0], RequestOutput) for each in sender.outputs("output")]
    assert sent == [RequestOutput("uid", [tokens], request), RequestOutput("uid", [failure], final=True)]
