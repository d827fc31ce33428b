"""Writes the Grafana dashboard: `python deploy/grafana/dashboard.py` (needs `grafana-foundation-sdk`).

Each panel shows metrics of `docs/api.md`; `tests/deploy` holds the queries against what a server exports.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

FILE = Path(__file__).with_name("fastserve.json")
WHERE = '{instance=~"$instance"}'
QUANTILES = (0.5, 0.95, 0.99)


class Query(NamedTuple):
    """A curve, or one for each set of labels."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """A plot. `unit`: as Grafana names it."""

    title: str
    unit: str
    queries: list[Query]


def _rate(metric: str, by: str, legend: str) -> Query:
    return Query(f"sum by ({by}) (rate({metric}{WHERE}[$__rate_interval]))", legend)


def _quantiles(metric: str, by: str = "") -> list[Query]:
    labels, name = f"le, {by}" if by else "le", f"{{{{{by}}}}} " if by else ""
    return [
        Query(
            f"histogram_quantile({quantile}, sum by ({labels}) "
            f"(rate({metric}_bucket{WHERE}[$__rate_interval])))",
            f"{name}p{quantile * 100:g}",
        )
        for quantile in QUANTILES
    ]


ROWS: dict[str, list[Panel]] = {
    "Requests": [
        Panel(
            "Requests by how they ended",
            "reqps",
            [_rate("fastserve_requests_total", "outcome", "{{outcome}}")],
        ),
        Panel(
            "Time to first token by priority",
            "s",
            _quantiles("fastserve_time_to_first_token_seconds", "priority"),
        ),
        Panel("Time per output token", "s", _quantiles("fastserve_time_per_output_token_seconds")),
        Panel(
            "Whole answers by priority", "s", _quantiles("fastserve_e2e_request_latency_seconds", "priority")
        ),
    ],
    "Queue": [
        Panel(
            "Waiting by priority",
            "short",
            [
                Query(f"sum by (priority) (fastserve_requests_waiting{WHERE})", "priority {{priority}}"),
                Query(f"sum(fastserve_max_queue_size{WHERE})", "the queue takes"),
            ],
        ),
        Panel("Wait in the queue by priority", "s", _quantiles("fastserve_queue_wait_seconds", "priority")),
        Panel(
            "Waiting by tenant",
            "short",
            [Query(f"sum by (tenant) (fastserve_tenant_requests_waiting{WHERE})", "{{tenant}}")],
        ),
        Panel(
            "Refused over a quota",
            "reqps",
            [_rate("fastserve_quota_rejections_total", "tenant, quota", "{{tenant}} {{quota}}")],
        ),
    ],
    "Engine": [
        Panel(
            "Sequences",
            "short",
            [
                Query(f"sum(fastserve_requests_running{WHERE})", "running"),
                Query(f"sum(fastserve_requests_preempted{WHERE})", "preempted"),
            ],
        ),
        Panel(
            "Tokens",
            "short",
            [
                _rate("fastserve_generation_tokens_total", "instance", "generated {{instance}}"),
                _rate("fastserve_computed_tokens_total", "replica", "computed by replica {{replica}}"),
                _rate(
                    "fastserve_prefix_cache_hit_tokens_total", "instance", "found in the cache {{instance}}"
                ),
            ],
        ),
        Panel(
            "KV cache",
            "percentunit",
            [
                Query(
                    f"sum by (instance) (fastserve_kv_blocks_used{WHERE}) "
                    f"/ sum by (instance) (fastserve_kv_blocks_total{WHERE})",
                    "held by requests {{instance}}",
                )
            ],
        ),
        Panel(
            "Preemptions",
            "ops",
            [
                _rate("fastserve_preemptions_total", "kind", "{{kind}}"),
                _rate("fastserve_recomputed_tokens_total", "instance", "tokens computed again {{instance}}"),
            ],
        ),
        Panel("Tokens of a step", "short", _quantiles("fastserve_step_batch_tokens")),
        Panel(
            "Speculation",
            "short",
            [
                _rate("fastserve_spec_decode_draft_tokens_total", "instance", "proposed {{instance}}"),
                _rate("fastserve_spec_decode_accepted_tokens_total", "instance", "right {{instance}}"),
            ],
        ),
        Panel(
            "Workers",
            "short",
            [
                Query(f"sum by (instance) (fastserve_replicas_ready{WHERE})", "ready {{instance}}"),
                Query(f"sum by (instance) (fastserve_worker_restarts_total{WHERE})", "restarts {{instance}}"),
            ],
        ),
    ],
}


def build() -> str:
    """The dashboard's JSON."""
    board = (
        dashboard.Dashboard("FastServe")
        .uid("fastserve")
        .tags(["fastserve"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Server")
            .query("label_values(fastserve_replicas_ready, instance)")
            .datasource(_source())
            .multi(True)
            .include_all(True)
        )
    )
    for row, panels in ROWS.items():
        board = board.with_row(dashboard.Row(row))
        for panel in panels:
            board = board.with_panel(_plot(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _plot(panel: Panel) -> timeseries.Panel:
    plot = (
        timeseries.Panel().title(panel.title).unit(panel.unit).min(0).span(8).height(8).datasource(_source())
    )
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expression).legend_format(query.legend)
        plot = plot.with_target(target)
    return plot


def _source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid="$datasource")


if __name__ == "__main__":
    FILE.write_text(build())
