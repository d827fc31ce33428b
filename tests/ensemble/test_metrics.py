"""Metrics that several threads report, and those that are summed over replicas."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from msgspec.structs import replace

from fastserve.types import EngineStats

STATS = EngineStats(0, 2, 1, 4, 100, 512, [], [], 100, 7, 0, 0, {}, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["Counter", "Gauge", "Histogram"])
def test_one_thread_at_a_time_changes_a_metric(pb_utils: Any, kind: str) -> None:
    """`server_lock` says why."""
    from fastserve.ensemble import metrics

    family = getattr(metrics, kind)("name", "description")
    report = {"Counter": "add", "Gauge": "set", "Histogram": "observe"}[kind]
    change = {"Counter": "increment", "Gauge": "set", "Histogram": "observe"}[kind]
    getattr(family, report)(1.0)
    (metric,) = pb_utils.server.metrics["name"]
    first_is_in, goes_on = threading.Event(), threading.Event()
    inside: list[float] = []
    most: list[int] = []

    def changing(value: float) -> None:
        inside.append(value)
        most.append(len(inside))
        first_is_in.set()
        goes_on.wait(20)
        inside.remove(value)

    setattr(metric, change, changing)
    threads = [threading.Thread(target=getattr(family, report), args=(float(n),)) for n in (2, 3)]
    threads[0].start()
    assert first_is_in.wait(20)
    threads[1].start()
    threads[1].join(0.05)
    goes_on.set()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1]


def test_gauges_are_sums_over_replicas_and_counters_go_on_over_workers(pb_utils: Any) -> None:
    from fastserve.ensemble.metrics import EngineMetrics

    server, metrics = pb_utils.server, EngineMetrics()
    for number in range(2):
        metrics.start(number, STATS)
    assert server.metric("fastserve_requests_running") == 4
    assert server.metric("fastserve_kv_blocks_total") == 200
    assert server.metric("fastserve_replicas_ready") == 2
    metrics.observe_step(0, replace(STATS, running=0, recomputed_tokens_total=5, step_tokens=9), 1e9)
    metrics.observe_step(1, replace(STATS, resumptions_total={"swap": 2}, step_tokens=3), 1e9)
    metrics.stop(0)
    assert server.metric("fastserve_requests_running") == 2
    assert server.metric("fastserve_replicas_ready") == 1
    metrics.start(0, STATS)
    metrics.observe_step(0, replace(STATS, running=0, recomputed_tokens_total=2), 2e9)
    assert server.metric("fastserve_recomputed_tokens_total") == 7
    assert server.metric("fastserve_preemptions_total", kind="swap") == 2
    assert server.metric("fastserve_computed_tokens_total", replica="0") == 9
    assert server.metric("fastserve_computed_tokens_total", replica="1") == 3
