"""What a replay gave, by priority class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from fastserve.workload.request_record import RequestRecord

LATE_SECONDS = 0.01
"""A request that was sent later than this was late."""


class ClassFigures(Struct, frozen=True):
    """The figures of one priority class, or of all together. Latencies are in seconds, of served requests;
    None where there are none."""

    priority: int | None
    """None: all classes."""
    requests: int
    served: int
    first_token_mean: float | None
    """Of the time to first token (TTFT), as the next two."""
    first_token_p50: float | None
    first_token_p99: float | None
    completion_mean: float | None
    completion_p99: float | None
    normalized_latency_mean: float | None
    """Of completion time per output token."""
    tokens_per_second: float
    """Output tokens of the class over the seconds from the first due request to the last end of all."""


class LatenessFigures(Struct, frozen=True):
    """How late requests were sent, in seconds."""

    p50: float
    p99: float
    largest: float
    late: int
    """Requests that were sent more than LATE_SECONDS after they were due."""


class ReplayFigures(Struct, frozen=True):
    """The figures of a replay."""

    classes: list[ClassFigures]
    """The most urgent first; the last row is of all together."""
    errors: dict[str, int]
    """Requests that were refused or failed, by code."""
    lateness: LatenessFigures


def replay_figures(records: Sequence[RequestRecord]) -> ReplayFigures:
    """The figures of the records of a replay, of which there is at least one."""
    start = min(record.arrival for record in records)
    seconds = max(record.arrival + record.completion for record in records) - start
    priorities = sorted({record.priority for record in records}, reverse=True)
    classes = [
        _class_figures(priority, [record for record in records if record.priority == priority], seconds)
        for priority in priorities
    ]
    lateness = np.array([record.lateness for record in records])
    return ReplayFigures(
        [*classes, _class_figures(None, records, seconds)],
        dict(Counter(record.error for record in records if record.error is not None)),
        LatenessFigures(
            float(np.percentile(lateness, 50)),
            float(np.percentile(lateness, 99)),
            float(lateness.max()),
            int((lateness > LATE_SECONDS).sum()),
        ),
    )


def _class_figures(priority: int | None, records: Sequence[RequestRecord], seconds: float) -> ClassFigures:
    served = [record for record in records if record.error is None]
    first_token = [record.first_token for record in served if record.first_token is not None]
    completion = [record.completion for record in served]
    return ClassFigures(
        priority=priority,
        requests=len(records),
        served=len(served),
        first_token_mean=_mean(first_token),
        first_token_p50=_percentile(first_token, 50),
        first_token_p99=_percentile(first_token, 99),
        completion_mean=_mean(completion),
        completion_p99=_percentile(completion, 99),
        normalized_latency_mean=_mean(
            [record.completion / record.num_output_tokens for record in served if record.num_output_tokens]
        ),
        tokens_per_second=sum(record.num_output_tokens for record in records) / seconds,
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values else None
