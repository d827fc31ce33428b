"""FastServe's own metrics, on Triton server's metrics port.

Names follow Prometheus' conventions, and vLLM's where one exists (`vllm:time_to_first_token_seconds` ->
`fastserve_time_to_first_token_seconds`). Each process makes the families it reports; families of one name
made by several processes are one in the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_TOKEN_SECONDS = [
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.5,
    1.0,
    2.5,
]
_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
_MODEL = "fastserve"


class _Family:
    """A metric family; its members by label values are made when they are first used."""

    kind: Any

    def __init__(self, name: str, description: str, labels: Sequence[str] = (), **options: Any) -> None:
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=self.kind)
        self._labels = labels
        self._options = options
        self._members: dict[tuple[str, ...], Any] = {}

    def _member(self, *values: object) -> Any:
        key = tuple(str(value) for value in values)
        member = self._members.get(key)
        if member is None:
            labels = {"model": _MODEL, **dict(zip(self._labels, key, strict=True))}
            member = self._members[key] = self._family.Metric(labels=labels, **self._options)
        return member


class Counter(_Family):
    """A number that only grows."""

    kind = pb_utils.MetricFamily.COUNTER

    def add(self, amount: float, *labels: object) -> None:
        if amount > 0:
            self._member(*labels).increment(amount)


class Gauge(_Family):
    """A number as it is now."""

    kind = pb_utils.MetricFamily.GAUGE

    def set(self, value: float, *labels: object) -> None:
        self._member(*labels).set(value)


class Histogram(_Family):
    """How often which size."""

    kind = pb_utils.MetricFamily.HISTOGRAM

    def observe(self, value: float, *labels: object) -> None:
        self._member(*labels).observe(value)


def requests_total() -> Counter:
    """Reported by each step at which a request can end."""
    return Counter("fastserve_requests_total", "Requests by how they ended", ["outcome"])


class QueueMetrics:
    """What `scheduler` reports."""

    def __init__(self) -> None:
        self.waiting = Gauge("fastserve_requests_waiting", "Requests in the queue", ["priority"])
        self.wait = Histogram(
            "fastserve_queue_wait_seconds",
            "From arrival to release to the engine",
            ["priority"],
            buckets=_SECONDS,
        )
        self.requests = requests_total()


class EngineMetrics:
    """What `engine` reports."""

    def __init__(self) -> None:
        self.running = Gauge("fastserve_requests_running", "Sequences in the batch")
        self.preempted = Gauge(
            "fastserve_requests_preempted", "Sequences that wait inside the worker for a place"
        )
        self.kv_total = Gauge("fastserve_kv_blocks_total", "KV blocks there are")
        self.kv_used = Gauge("fastserve_kv_blocks_used", "KV blocks held by a request")
        self.step_tokens = Histogram(
            "fastserve_step_batch_tokens", "Tokens computed in a step", buckets=_TOKENS
        )
        self.cache_hits = Counter(
            "fastserve_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache"
        )
        self.preemptions = Counter("fastserve_preemptions_total", "Sequences put back to wait", ["kind"])
        self.restarts = Counter("fastserve_worker_restarts_total", "Workers started after one that died")


class ResponseMetrics:
    """What `postprocess` reports: the times that a client sees."""

    def __init__(self) -> None:
        self.first_token = Histogram(
            "fastserve_time_to_first_token_seconds",
            "From arrival to the first token",
            ["priority"],
            buckets=_SECONDS,
        )
        self.output_token = Histogram(
            "fastserve_time_per_output_token_seconds",
            "Mean time between the tokens of a request after its first",
            buckets=_TOKEN_SECONDS,
        )
        self.end_to_end = Histogram(
            "fastserve_e2e_request_latency_seconds",
            "From arrival to the last token",
            ["priority"],
            buckets=_SECONDS,
        )
        self.prompt_tokens = Counter("fastserve_prompt_tokens_total", "Prompt tokens of finished requests")
        self.generation_tokens = Counter("fastserve_generation_tokens_total", "Tokens generated for requests")
        self.requests = requests_total()
