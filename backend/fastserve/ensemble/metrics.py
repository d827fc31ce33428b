"""FastServe's own metrics, on Triton server's metrics port.

Names follow Prometheus' conventions, and vLLM's where one exists (`vllm:time_to_first_token_seconds` ->
`fastserve_time_to_first_token_seconds`). Each process makes the families it reports; families of one name
made by several processes are one in the server.

Each report is a message to the server's process through shared memory. One that fails is logged and fails no
request; what a counter could not add then is added with its next report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.1
"""Between two reports of the gauges while there is work."""
COMPLAINT_SECONDS = 60.0
"""Between two lines in the log about reports that fail."""
MAX_TENANTS = 64
"""Tenants with a label of their own: the first that come; what others use is counted under `other`."""
MAX_TENANT_LENGTH = 64
"""Characters of a tenant in its label."""
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
    _complain_after = 0.0
    """Of all families."""

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

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= _Family._complain_after:
            _Family._complain_after = now + COMPLAINT_SECONDS
            logger.error("metrics could not be reported: %s", error)


class Counter(_Family):
    """A number that only grows."""

    kind = pb_utils.MetricFamily.COUNTER

    def __init__(self, name: str, description: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, description, labels)
        self._owed: dict[tuple[object, ...], float] = {}
        """What could not be reported yet."""

    def add(self, amount: float, *labels: object) -> None:
        if amount <= 0:
            return
        if self._owed:
            amount += self._owed.pop(labels, 0.0)
        try:
            self._member(*labels).increment(amount)
        except Exception as error:
            self._owed[labels] = amount
            self._complain(error)


class Gauge(_Family):
    """A number as it is now; one that has not changed is not reported again."""

    kind = pb_utils.MetricFamily.GAUGE

    def __init__(self, name: str, description: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, description, labels)
        self._reported: dict[tuple[object, ...], float] = {}

    def set(self, value: float, *labels: object) -> bool:
        """Whether the server shows it now; if not, the caller says it again: nothing else may come."""
        if self._reported.get(labels) == value:
            return True
        try:
            self._member(*labels).set(value)
        except Exception as error:
            self._reported.pop(labels, None)
            self._complain(error)
            return False
        self._reported[labels] = value
        return True


class Histogram(_Family):
    """How often which size."""

    kind = pb_utils.MetricFamily.HISTOGRAM

    def observe(self, value: float, *labels: object) -> None:
        try:
            self._member(*labels).observe(value)
        except Exception as error:
            self._complain(error)


class TenantLabels:
    """A bounded set of labels for what clients name freely."""

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}

    def label(self, tenant: str) -> str:
        known = self._labels.get(tenant)
        if known is not None:
            return known
        if len(self._labels) >= MAX_TENANTS:
            return "other"
        return self._labels.setdefault(tenant, tenant[:MAX_TENANT_LENGTH])


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
        self.tenants = TenantLabels()
        self.prompt_tokens = Counter(
            "fastserve_prompt_tokens_total", "Prompt tokens of finished requests", ["tenant"]
        )
        self.generation_tokens = Counter(
            "fastserve_generation_tokens_total", "Tokens generated for requests", ["tenant"]
        )
        self.requests = requests_total()
