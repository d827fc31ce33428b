"""How long a stream waits between two responses, as streams share what the machine's cores can send."""

from __future__ import annotations

import os

from fastserve.config import Config

STREAMS_PER_CORE, RESPONSES_PER_CORE = 2, 160
"""Of few streams each token is sent as it comes. Those beyond share responses, each of which takes 0.6 ms of
a core from the model: of 32 streams on two cores, 600 a second in place of 320 cost a tenth of the tokens."""


class ResponseInterval:
    """Streams beyond a number share responses, by which all have to wait longer."""

    def __init__(self, least_seconds: float, responses_per_second: int, num_unlimited_streams: int) -> None:
        self._least_seconds = least_seconds
        self._responses_per_second = responses_per_second
        self._num_unlimited_streams = num_unlimited_streams

    def seconds(self, num_streams: int) -> float:
        """Between two responses of each of so many streams."""
        return max(
            self._least_seconds, (num_streams - self._num_unlimited_streams) / self._responses_per_second
        )


def response_interval(config: Config) -> ResponseInterval:
    """That of the settings; with `max_responses_per_second` all streams share so many."""
    cores, rate = len(os.sched_getaffinity(0)), config.max_responses_per_second
    return ResponseInterval(
        config.stream_interval_ms / 1000,
        rate or RESPONSES_PER_CORE * cores,
        0 if rate else STREAMS_PER_CORE * cores,
    )
