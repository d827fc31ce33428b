"""FastServe's own metrics, on Triton server's metrics port.

Names follow Prometheus' conventions, and vLLM's where one exists (`vllm:time_to_first_token_seconds` ->
`fastserve_time_to_first_token_seconds`). Each process makes the families it reports; families of one name
made by several processes are one in the server.

Each report is a message to the server's process through shared memory. One that fails is logged and fails no
request; what a counter could not add then is added with its next report.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.ensemble.server_lock import SERVER_LOCK
from fastserve.scheduling.preemption import PreemptionKind
from fastserve.scheduling.quotas import QuotaError
from fastserve.scheduling.request_labels import Labels, RequestLabels
from fastserve.types import EngineStats, Outcome, Request

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.1
"""Between two reports of the gauges while there is work."""
RETRY_SECONDS = 1.0
"""Between two reports of a gauge that does not show what it was given."""
ERROR_LOG_SECONDS = 60.0
"""Between two lines in the log about reports that fail."""
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
_TOKEN_SECONDS = [ms / 1000 for ms in (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 500, 1000, 2500)]
_TOKENS = [2**exponent for exponent in range(14)]
_MODEL = "fastserve"


class _Family:
    """A metric family; its members by label values are made when they are first used. Threads may share one.

    One at a time changes it: `server_lock` says why.
    """

    kind: Any
    _next_error_log = 0.0
    """A time, shared by all families."""

    def __init__(self, name: str, description: str, labels: Sequence[str] = (), **options: Any) -> None:
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=self.kind)
        self._labels = labels
        self._options = options
        self._members: dict[tuple[object, ...], Any] = {}

    def _report(self, method: str, value: float, labels: tuple[object, ...]) -> bool:
        """Calls a method of the member with these labels; False where that failed."""
        try:
            with SERVER_LOCK:
                member = self._members.get(labels)
                if member is None:
                    texts = dict(zip(self._labels, map(str, labels), strict=True))
                    member = self._family.Metric(labels={"model": _MODEL, **texts}, **self._options)
                    self._members[labels] = member
                getattr(member, method)(value)
        except Exception as error:
            now = time.monotonic()
            if now >= _Family._next_error_log:
                _Family._next_error_log = now + ERROR_LOG_SECONDS
                logger.error("metrics could not be reported: %s", error)
            return False
        return True


class Counter(_Family):
    """A number that only grows."""

    kind = pb_utils.MetricFamily.COUNTER

    def __init__(
        self, name: str, description: str, labels: Sequence[str] = (), known: Sequence[str] = ()
    ) -> None:
        """`known`: values of its one label that are shown from the start, with 0, as a counter without labels
        is: of a series that begins with 1, Prometheus' `rate` sees no increase."""
        super().__init__(name, description, labels)
        self._unreported: dict[tuple[object, ...], float] = {}
        for each in [(value,) for value in known] if labels else [()]:
            self._report("increment", 0, each)

    def add(self, amount: float, *labels: object) -> None:
        """Adds `amount`, if it is positive, and what could not be added before."""
        if amount <= 0:
            return
        with SERVER_LOCK:
            amount += self._unreported.pop(labels, 0.0)
            if not self._report("increment", amount, labels):
                self._unreported[labels] = amount


class Gauge(_Family):
    """A number as it is now; one that has not changed is not reported again."""

    kind = pb_utils.MetricFamily.GAUGE

    def __init__(self, name: str, description: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, description, labels)
        self._reported: dict[tuple[object, ...], float] = {}

    def set(self, value: float, *labels: object) -> bool:
        """Whether the gauge shows the value now; if not, the caller sets it again: nothing else may come."""
        if self._reported.get(labels) == value:
            return True
        if not self._report("set", value, labels):
            self._reported.pop(labels, None)
            return False
        self._reported[labels] = value
        return True


class Histogram(_Family):
    """Numbers of observations by size."""

    kind = pb_utils.MetricFamily.HISTOGRAM

    def observe(self, value: float, *labels: object) -> None:
        """Counts one observation."""
        self._report("observe", value, labels)


class SecondsByClass:
    """Durations of requests, by priority and by tenant: a histogram for each, since one by both had too many
    members."""

    def __init__(self, name: str, description: str, tenant_name: str) -> None:
        self.by_priority = Histogram(name, description, ["priority"], buckets=_SECONDS)
        self.by_tenant = Histogram(tenant_name, f"{description}, by tenant", ["tenant"], buckets=_SECONDS)

    def observe(self, seconds: float, labels: Labels) -> None:
        """Counts one request."""
        self.by_priority.observe(seconds, labels.priority)
        self.by_tenant.observe(seconds, labels.tenant)


def requests_total() -> Counter:
    """The counter of ended requests, for each model in which a request can end."""
    outcomes = [outcome.value for outcome in Outcome]
    return Counter("fastserve_requests_total", "Requests by how they ended", ["outcome"], outcomes)


class QueueMetrics:
    """The metrics of `scheduler`."""

    def __init__(self, labels: RequestLabels, max_queue_size: int) -> None:
        self._labels = labels
        self.max_queue_size = Gauge("fastserve_max_queue_size", "New requests that the queue takes")
        self.max_queue_size.set(max_queue_size)
        self.waiting = Gauge("fastserve_requests_waiting", "Requests in the queue", ["priority"])
        self.waiting_by_tenant = Gauge(
            "fastserve_tenant_requests_waiting", "Requests in the queue, by tenant", ["tenant"]
        )
        self.wait = SecondsByClass(
            "fastserve_queue_wait_seconds",
            "From arrival to release to the engine",
            "fastserve_tenant_queue_wait_seconds",
        )
        self.requests = requests_total()
        self.quota_rejections = Counter(
            "fastserve_quota_rejections_total", "Requests of tenants over a quota", ["tenant", "quota"]
        )
        self.report_at: float | None = None
        """When `report_waiting` is to be called next; None: the gauges show what is."""
        self._reported: dict[Labels, int] = {}
        self._reported_at = 0.0

    def observe_wait(self, request: Request, now: float) -> None:
        """Reports that a request has been released."""
        self.wait.observe(now - request.arrival, self._labels.of(request))

    def count_rejected(self, request: Request, error: QuotaError) -> None:
        """Counts a request of a tenant that was over its quota."""
        self.quota_rejections.add(1, self._labels.of(request).tenant, error.quota)

    def report_waiting(self, by_label: dict[Labels, int], now: float) -> None:
        """Sets how many requests wait: at once when none does, else every REPORT_SECONDS."""
        if by_label == self._reported:
            self.report_at = None
        elif any(by_label.values()) and now < self._reported_at + REPORT_SECONDS:
            self.report_at = self._reported_at + REPORT_SECONDS
        else:
            self._reported_at = now
            if self._set_waiting(by_label):
                self._reported, self.report_at = by_label, None
            else:
                self.report_at = now + RETRY_SECONDS

    def _set_waiting(self, by_label: dict[Labels, int]) -> bool:
        """Whether the gauges show it."""
        by_priority: collections.Counter[int] = collections.Counter()
        by_tenant: collections.Counter[str] = collections.Counter()
        for labels, count in by_label.items():
            by_priority[labels.priority] += count
            by_tenant[labels.tenant] += count
        shown = [self.waiting.set(count, priority) for priority, count in by_priority.items()]
        shown += [self.waiting_by_tenant.set(count, tenant) for tenant, count in by_tenant.items()]
        return all(shown)


class EngineMetrics:
    """The metrics of `engine`, summed over its replicas."""

    def __init__(self) -> None:
        self.running = Gauge("fastserve_requests_running", "Sequences in the batch")
        self.preempted = Gauge(
            "fastserve_requests_preempted",
            "Sequences that workers hold, without a place in a batch",
        )
        self.replicas = Gauge("fastserve_replicas_ready", "Engine replicas that can serve")
        self.kv_total = Gauge("fastserve_kv_blocks_total", "KV blocks there are")
        self.kv_used = Gauge("fastserve_kv_blocks_used", "KV blocks held by a request")
        self.step_tokens = Histogram(
            "fastserve_step_batch_tokens", "Tokens computed in a step", buckets=_TOKENS
        )
        self.computed = Counter(
            "fastserve_computed_tokens_total",
            "Tokens computed, those for a second time included",
            ["replica"],
        )
        self.cache_hits = Counter(
            "fastserve_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache"
        )
        self.preemptions = Counter(
            "fastserve_preemptions_total",
            "Preempted sequences that went on, by what that took",
            ["kind"],
            [kind.value for kind in PreemptionKind],
        )
        self.swapped = Counter("fastserve_swapped_blocks_total", "KV blocks that came back from host memory")
        self.recomputed = Counter(
            "fastserve_recomputed_tokens_total", "Tokens computed again after a preemption"
        )
        self.draft_tokens = Counter(
            "fastserve_spec_decode_draft_tokens_total", "Tokens proposed by speculation, and computed"
        )
        self.accepted_tokens = Counter(
            "fastserve_spec_decode_accepted_tokens_total", "Proposed tokens that were right"
        )
        self.restarts = Counter("fastserve_worker_restarts_total", "Workers started after one that died")
        self._lock = threading.Lock()
        self._latest: dict[int, EngineStats] = {}
        """By replica, after its worker's last step."""
        self._counted: dict[int, EngineStats] = {}
        """By replica, the totals that the counters have."""
        self._num_computed: collections.Counter[int] = collections.Counter()
        """By replica, tokens that its counter does not have yet."""
        self._reported_at = 0.0
        self._is_shown = True
        """The gauges show what they were last told."""

    def start(self, replica: int, stats: EngineStats) -> None:
        """Reports a new worker, whose totals count from these on."""
        with self._lock:
            self._latest[replica] = self._counted[replica] = stats
            self._report()

    def stop(self, replica: int) -> None:
        """Reports that a replica has no worker."""
        with self._lock:
            self._report()
            self._latest.pop(replica, None)
            self._report()

    def observe_step(self, replica: int, stats: EngineStats, now: float) -> None:
        """Reports a step: the gauges every REPORT_SECONDS, and when nothing runs any more."""
        if stats.step_tokens:
            self.step_tokens.observe(stats.step_tokens)
        with self._lock:
            self._latest[replica] = stats
            self._num_computed[replica] += stats.step_tokens
            if stats.running == 0 or now - self._reported_at >= REPORT_SECONDS:
                self._report()

    def repeat(self) -> None:
        """Tells the gauges again what they do not show: nothing else may come."""
        with self._lock:
            if not self._is_shown:
                self._report()

    def _report(self) -> None:
        """Sets the gauges, and adds to the counters what has come since the last report."""
        self._reported_at = time.monotonic()
        stats = self._latest.values()
        shown = [
            self.running.set(sum(each.running for each in stats)),
            self.preempted.set(sum(each.waiting for each in stats)),
            self.replicas.set(len(stats)),
            self.kv_total.set(sum(each.kv_blocks_total for each in stats)),
            self.kv_used.set(sum(each.kv_blocks_used for each in stats)),
        ]
        self._is_shown = all(shown)
        for replica, latest in self._latest.items():
            self._count(latest, self._counted[replica])
            self._counted[replica] = latest
        for replica, num_tokens in self._num_computed.items():
            self.computed.add(num_tokens, replica)
        self._num_computed.clear()

    def _count(self, now: EngineStats, before: EngineStats) -> None:
        self.cache_hits.add(now.prefix_cache_hit_tokens_total - before.prefix_cache_hit_tokens_total)
        self.swapped.add(now.swapped_blocks_total - before.swapped_blocks_total)
        self.recomputed.add(now.recomputed_tokens_total - before.recomputed_tokens_total)
        self.draft_tokens.add(now.draft_tokens_total - before.draft_tokens_total)
        self.accepted_tokens.add(now.accepted_tokens_total - before.accepted_tokens_total)
        for kind, count in now.resumptions_total.items():
            self.preemptions.add(count - before.resumptions_total.get(kind, 0), kind)


class ResponseMetrics:
    """The metrics of `postprocess`: the times that a client sees."""

    def __init__(self, labels: RequestLabels) -> None:
        self._labels = labels
        self.first_token = SecondsByClass(
            "fastserve_time_to_first_token_seconds",
            "From arrival to the first token",
            "fastserve_tenant_time_to_first_token_seconds",
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
        self.prompt_tokens = Counter(
            "fastserve_prompt_tokens_total", "Prompt tokens of finished requests", ["tenant"]
        )
        self.generation_tokens = Counter(
            "fastserve_generation_tokens_total", "Tokens generated for requests", ["tenant"]
        )
        self.requests = requests_total()
        self._num_tokens: collections.Counter[str] = collections.Counter()
        """By tenant, generated tokens that the counter does not have yet."""
        self._counted_at = 0.0

    def observe_first_token(self, request: Request, now: float) -> None:
        """Reports that the first token of a request came."""
        self.first_token.observe(now - request.arrival, self._labels.of(request))

    def count_tokens(self, request: Request, num_tokens: int, now: float) -> None:
        """Counts tokens generated for a request, which are reported every REPORT_SECONDS."""
        self._num_tokens[self._labels.of(request).tenant] += num_tokens
        if now - self._counted_at >= REPORT_SECONDS:
            self._counted_at = now
            self.report_tokens()

    def report_tokens(self) -> None:
        """Reports the tokens that were counted: for the end of a request, after which none may come."""
        for tenant, count in self._num_tokens.items():
            self.generation_tokens.add(count, tenant)
        self._num_tokens.clear()

    def observe_end(
        self, request: Request, outcome: Outcome, num_tokens: int, first_token: float, now: float
    ) -> None:
        """Reports the end of a request, which generated `num_tokens`, the first at the time `first_token`."""
        self.requests.add(1, outcome.value)
        labels = self._labels.of(request)
        self.prompt_tokens.add(len(request.prompt_token_ids), labels.tenant)
        if outcome in (Outcome.STOP, Outcome.LENGTH):
            self.end_to_end.observe(now - request.arrival, labels.priority)
            if num_tokens > 1:
                self.output_token.observe((now - first_token) / (num_tokens - 1))
