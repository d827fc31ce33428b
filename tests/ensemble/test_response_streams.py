"""How often streams have a response."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastserve.types import OutputOptions, Request, SamplingParams, SequenceOutput

STEP_SECONDS, STEPS = 0.01, 200


class CountingSender:
    def __init__(self) -> None:
        self.num_responses = 0

    def send(self, *_: Any, **__: Any) -> None:
        self.num_responses += 1


def a_request(uid: str) -> Request:
    return Request(
        uid=uid,
        request_id="",
        prompt="",
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        output=OutputOptions(stream=True),
        priority=0,
        tenant="",
        arrival=0.0,
        deadline=None,
    )


def responses(num_streams: int, interval: float = 0.0) -> list[int]:
    """Of each stream in steps that bring it a token each; 100 a second are shared, by all streams but two."""
    from fastserve.ensemble.response_interval import ResponseInterval
    from fastserve.ensemble.response_stream import ResponseStream
    from fastserve.ensemble.response_streams import ResponseStreams

    shares = ResponseInterval(interval, 100, 2)
    streams = ResponseStreams(threading.RLock(), shares, lambda _: None, lambda _: None)
    senders = [CountingSender() for _ in range(num_streams)]
    for number, sender in enumerate(senders):
        streams.add(ResponseStream(a_request(str(number)), sender, 1))
    for step in range(STEPS):
        for stream in streams:
            stream.add(SequenceOutput(stream.request.uid, 0, token_ids=[7]))
        streams.send_due(step * STEP_SECONDS)
    return [sender.num_responses for sender in senders]


@pytest.mark.parametrize("num_streams", [1, 2])
def test_tokens_of_few_streams_are_sent_as_they_come(num_streams: int, pb_utils: Any) -> None:
    assert responses(num_streams) == [STEPS] * num_streams


def test_many_streams_share_so_many_responses_a_second(pb_utils: Any) -> None:
    num_streams = 22
    per_stream = STEPS * STEP_SECONDS * 100 / (num_streams - 2)
    assert all(abs(count - per_stream) <= 1 for count in responses(num_streams))


def test_an_interval_holds_for_few_streams_too(pb_utils: Any) -> None:
    assert responses(1, interval=4.5 * STEP_SECONDS) == [STEPS // 5]
