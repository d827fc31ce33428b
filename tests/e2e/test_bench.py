"""`fastserve bench` against the real server."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from tests.e2e.conftest import RunningServer

from fastserve import cli
from fastserve.benchmark.server_calibration import (
    CalibrationError,
    LoadPoint,
    calibrate_server,
    read_step_totals,
)
from fastserve.benchmark.targets import ServerTarget
from fastserve.simulation.default_step_time import DEFAULT_STEP_TIME
from fastserve.simulation.step_time import StepTimeModel

HITS = "fastserve_prefix_cache_hit_tokens_total"


def test_a_trace_is_replayed_to_the_server(server: RunningServer, tmp_path: Path) -> None:
    """Two conversations, whose second questions repeat their first; one prompt is longer than the model."""
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 64, "hash_ids": [0, 1]},
        {"timestamp": 100, "input_length": 1000, "output_length": 40, "hash_ids": [2, 3]},
        {"timestamp": 400, "input_length": 90_000, "output_length": 1, "hash_ids": list(range(100, 276))},
        {"timestamp": 30_000, "input_length": 1500, "output_length": 64, "hash_ids": [0, 1, 4]},
        {"timestamp": 30_000, "input_length": 1024, "output_length": 64, "hash_ids": [0, 1]},
    ]
    trace, report = tmp_path / "trace.jsonl", tmp_path / "report.json"
    trace.write_text("\n".join(map(json.dumps, rows)))
    hits = server.metrics().get(HITS, 0)
    urls = ["--grpc-url", server.grpc_url, "--http-url", server.http_url]
    words = ["bench", "--target", "grpc", "http", "infer", *urls]
    words += ["--trace", str(trace), "--speed", "10", "--length-scale", "0.125", "--priorities", "5:1,0:1"]
    assert cli.main([*words, "--tenants", "bench:1", "--json", str(report)]) == 0
    runs = json.loads(report.read_text())["runs"]
    assert [run["target"] for run in runs] == ["grpc", "http", "infer"]
    for run in runs:
        assert [row["error"] for row in run["requests"]] == [None, None, "INVALID_ARG", None, None]
        assert [row["num_output_tokens"] for row in run["requests"]] == [8, 5, 0, 8, 8]
        assert [row["arrival"] for row in run["requests"]] == pytest.approx([0, 0.01, 0.04, 3, 3])
        served = [row for row in run["requests"] if row["error"] is None]
        assert all(0 <= row["lateness"] < row["first_token"] <= row["completion"] for row in served)
        assert run["figures"]["errors"] == {"INVALID_ARG": 1}
        assert run["figures"]["classes"][-1]["served"] == 4
    # A prompt's last block is always computed: of 128 equal tokens 112 are found again.
    assert server.metrics()[HITS] - hits >= 3 * (128 + 112)
    generated = 'fastserve_generation_tokens_total{tenant="bench"}'
    server.wait_for_metrics(lambda metrics: metrics.get(generated) == 3 * (8 + 5 + 8 + 8), 10)


def test_a_running_server_is_calibrated_and_says_when_somebody_else_uses_it(server: RunningServer) -> None:
    lengths = [(1, 20, 8), (1, 40, 2), (2, 20, 8), (2, 60, 4), (4, 20, 8), (4, 30, 4), (4, 60, 2), (3, 25, 5)]
    points = [LoadPoint(*each, num_requests=2 * each[0]) for each in lengths]

    def calibrated() -> StepTimeModel:
        totals = partial(read_step_totals, server.metrics_url)
        return calibrate_server(target, totals, DEFAULT_STEP_TIME, 77, points)

    server.wait_until_idle(10)
    with closing(ServerTarget(server.grpc_url, "grpc")) as target:
        model = calibrated()
        assert (model.num_steps, model.kv_bytes_per_token) == (8, DEFAULT_STEP_TIME.kv_bytes_per_token)
        assert 1e-3 < model.seconds(3, 30, 2, 60, 465) < 1.0
        with pytest.raises(CalibrationError, match=r"asked for, and \d+ computed: somebody else"):
            calibrated()


def test_a_page_without_our_metrics_is_no_server_of_ours(server: RunningServer) -> None:
    with pytest.raises(OSError, match="404"):
        read_step_totals(server.http_url)
