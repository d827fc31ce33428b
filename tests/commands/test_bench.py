"""`fastserve bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve import cli
from fastserve.benchmark.job import Job
from fastserve.commands import bench
from fastserve_client import FastServeError


class FakeTarget:
    """Serves a token at a time; refuses what asks for one token only."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def stream(self, job: Job) -> Iterator[int]:
        self.jobs.append(job)
        if job.max_tokens == 1:
            raise FastServeError("UNAVAILABLE", "full")
        for _ in range(job.max_tokens):
            yield 1

    def close(self) -> None:
        pass


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    """It stands for every server."""
    target = FakeTarget()
    monkeypatch.setattr(bench, "ServerTarget", lambda *_, **__: target)
    return target


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    rows = [dict(zip(keys, (10 * n, 20 + n, 1 + n, [n % 2]), strict=True)) for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(*words: object) -> int:
    return cli.main(["bench", *map(str, words)])


def test_an_open_loop_prints_its_classes_and_writes_every_request(
    target: FakeTarget, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert run("--trace", trace, "--priorities", "3:1", "--tenants", "a:1", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "4 requests in 0.0 s, 100 a second" in printed
    assert "1 requests ended with UNAVAILABLE" in printed
    assert "sent after they were due" in printed
    report = json.loads(path.read_text())
    assert report["workload"]["trace"] == trace.name
    [result] = report["runs"]
    assert result["target"] == "grpc"
    assert [row["priority"] for row in result["figures"]["classes"]] == [3, None]
    rows: list[dict[str, Any]] = result["requests"]
    assert [row["arrival"] for row in rows] == pytest.approx([0, 0.01, 0.02, 0.03])
    assert [row["error"] for row in rows] == ["UNAVAILABLE", None, None, None]
    assert [row["num_output_tokens"] for row in rows] == [0, 2, 3, 4]
    assert {row["tenant"] for row in rows} == {"a"}


def test_targets_of_one_run_get_different_prompts_of_the_same_shape(target: FakeTarget, trace: Path) -> None:
    """Two of them may be ways to one server, whose prefix cache would answer for the engine."""
    assert run("--trace", trace, "--target", "grpc", "http") == 0
    replayed = [job.prompt_token_ids for job in target.jobs if job.max_tokens <= 4 and job.tenant == ""]
    first, second = replayed[:4], replayed[4:]
    assert sorted(map(len, first)) == sorted(map(len, second)) == [20, 21, 22, 23]
    assert not {tuple(each[:10]) for each in first} & {tuple(each[:10]) for each in second}
    assert len({tuple(each[:10]) for each in first}) == 2  # as many as the trace has hashes


def test_a_target_that_serves_nothing_is_a_failure(target: FakeTarget) -> None:
    assert run("--poisson", 1000, "--requests", 3, "--output-tokens", 1) == 1


def test_a_closed_loop_is_what_runs_without_a_source_of_arrivals(
    target: FakeTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--clients", 2, "--requests", 5, "--rounds", 2, "--prompt-tokens", 30, "--output-tokens", 4]
    assert run(*words) == 0
    assert "clients" in capsys.readouterr().out
    assert [(len(job.prompt_token_ids), job.max_tokens) for job in target.jobs] == [(30, 4)] * (2 + 2 * 5)
    assert len({tuple(job.prompt_token_ids) for job in target.jobs}) == 12


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", 2, "--poisson", 1], "--rounds: not in an open loop"),
        (["--clients", 2, "--gamma", "1,2"], "--clients: not in an open loop"),
        (["--priorities", "1:1"], "--priorities: not in a closed loop"),
        (["--json", "x"], "--json: not in a closed loop"),
        (["--load-of", 1], "--load-of: not in a closed loop"),
        (["--calibrate", "x", "--requests", 1], "--requests: not with --calibrate"),
        (["--calibrate", "x", "--trace", "x"], "--trace: not with --calibrate"),
        (["--calibrate", "x", "--target", "http"], "--target: got http; allowed with --calibrate: grpc"),
        (["--calibrate", "x", "--target", "grpc"], "x: [Errno 2] No such file or directory"),
        (["--calibrate", "x", "--metrics-url", "a:1"], "--metrics-url: not without --target"),
        (["--metrics-url", "a:1"], "--metrics-url: not without --calibrate"),
        (["--calibrate", "nowhere/x"], "--calibrate: nowhere is no directory"),
        (["--poisson", 1, "--json", "nowhere/x"], "--json: nowhere is no directory"),
        (["--requests", 0], "--requests: got 0"),
        (["--clients", 0], "--clients: got"),
        (["--rounds", 0], "--rounds: got 0"),
        (["--trace", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    words: list[object], sentence: str, target: FakeTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 1
    assert sentence in capsys.readouterr().err
    assert target.jobs == []


def test_every_option_belongs_to_one_kind_of_run() -> None:
    """Else one would be accepted where nobody reads it."""
    parser = argparse.ArgumentParser(add_help=False)
    bench.add_arguments(parser)
    lists = [bench.CALIBRATED, bench.closed_loop.OPTIONS, bench.open_loop.OPTIONS]
    known = [name for each in lists for name in each] + ["target", "grpc_url", "http_url"]
    assert sorted([*known, "model", "seed", "calibrate", "metrics_url"]) == sorted(
        vars(parser.parse_args([]))
    )
