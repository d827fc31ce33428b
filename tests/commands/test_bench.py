"""`fastserve bench`."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastserve import cli
from fastserve.benchmark.job import Job
from fastserve.benchmark.other_load import other_load
from fastserve.benchmark.peers import open_peer
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
    monkeypatch.setattr(bench.closed_loop, "SAMPLE_SECONDS", 0.01)
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


def test_a_closed_loop_writes_its_runs_and_a_plot(
    target: FakeTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    words = ["--target", "grpc", "http", "--clients", 1, 2, "--requests", 3, "--prompt-tokens", "30,0.5,9,40"]
    assert run(*words, "--output-tokens", 4, "--prefix-tokens", 7, "--json", figures, "--plot", plot) == 0
    report = json.loads(figures.read_text())
    assert [(each["clients"], each["target"]) for each in report["runs"]] == [
        (1, "grpc"),
        (1, "http"),
        (2, "grpc"),
        (2, "http"),
    ]
    assert all(each["figures"]["responses/token"] == 1 for each in report["runs"])
    assert "2" in report["machine"]
    assert "clients" in plot.read_text()
    first, second = ([job.prompt_token_ids for job in target.jobs[at : at + 3]] for at in (4, 7))
    assert list(map(len, first)) == list(map(len, second))
    assert {tuple(each[:7]) for each in first + second} == {tuple(first[0][:7])}
    assert len({tuple(each[7:]) for each in first + second}) == 6


def test_runs_beside_others_are_marked_and_do_not_count(
    target: FakeTarget, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = iter([0.0, 0.9, 0.0, 0.0])
    monkeypatch.setattr(bench.closed_loop, "other_load", lambda _: next(loads))
    assert run("--clients", 1, "--requests", 2, "--output-tokens", 3, "--rounds", 2) == 0
    printed = capsys.readouterr().out
    assert "*: 1 of 2 runs were beside others' load" in printed
    assert "0%" in printed
    assert "90%" not in printed


def test_other_load_counts_a_busy_thread() -> None:
    def work() -> None:
        while not done.is_set():
            pass

    done = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert other_load(0.3) > 0.4
    finally:
        done.set()
        thread.join()


ADAPTER = """
import json, sys
print("a library's greeting")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["max_tokens"] == 9:
        print(json.dumps({"id": request["id"], "error": "nine"}), flush=True)
    elif request["max_tokens"] == 8:
        sys.exit(3)
    else:
        for left in range(request["max_tokens"] - 1, -1, -1):
            print(json.dumps({"id": request["id"], "num_tokens": 1, "done": left == 0}), flush=True)
"""


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A command that serves; of 9 tokens it makes an error, of 8 its end."""
    path = tmp_path / "adapter.py"
    path.write_text(ADAPTER)
    return f"{sys.executable} {path}"


def test_a_peer_is_measured_beside_the_target(
    target: FakeTarget, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--clients", 2, "--requests", 5, "--output-tokens", 4]
    assert run(*words, "--peer", f"other={adapter}") == 0
    printed = capsys.readouterr().out
    assert "other" in printed
    assert "x grpc" in printed


@pytest.mark.parametrize(("max_tokens", "sentence"), [(9, "nine"), (8, "the command has ended")])
def test_what_a_peer_cannot_serve_is_told(
    max_tokens: int, sentence: str, target: FakeTarget, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--clients", 2, "--output-tokens", max_tokens, "--peer", f"other={adapter}") == 1
    assert sentence in capsys.readouterr().err


class CompletionsHandler(BaseHTTPRequestHandler):
    """OpenAI's completions, of two tokens in a chunk."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._start()
        self.wfile.write(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (request["model"], request["ignore_eos"], request["stream"]) == ("m", True, True)
        self._start()
        usage = {"completion_tokens": request["max_tokens"]}
        events = [{"choices": [{"text": "a b"}]}] * (request["max_tokens"] // 2)
        for event in [*events, {"choices": [], "usage": usage}]:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _start(self) -> None:
        self.send_response(200)
        self.end_headers()


def test_a_server_of_openais_api_is_counted_by_its_own_count() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), CompletionsHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        peer = open_peer(f"http://127.0.0.1:{server.server_port}")
        assert list(peer.stream(Job([1, 2, 3], 6))) == [1, 1, 1, 3]
        server.shutdown()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", 2, "--poisson", 1], "--rounds: not in an open loop"),
        (["--clients", 2, "--gamma", "1,2"], "--clients: not in an open loop"),
        (["--priorities", "1:1"], "--priorities: not in a closed loop"),
        (["--prefix-tokens", 2, "--poisson", 1], "--prefix-tokens: not in an open loop"),
        (["--prefix-tokens", -1], "--prefix-tokens: got -1; allowed: 0 or more"),
        (["--plot", "x.gif"], "--plot: got x.gif; allowed: a name that ends in .png or .svg"),
        (["--peer", "x"], "--peer: got 'x'; allowed: NAME=URL or NAME=COMMAND"),
        (["--peer", "grpc=true"], "--peer: grpc is there already"),
        (["--peer", "x=false"], "false: ended with 1 before it was ready"),
        (["--peer", "x=http://127.0.0.1:1"], "http://127.0.0.1:1: [Errno 111] Connection refused"),
        (["--calibrate", "x", "--json", "x"], "--json: not with --calibrate"),
        (["--load-of", 1], "--load-of: not in a closed loop"),
        (["--calibrate", "x", "--requests", 1], "--requests: not with --calibrate"),
        (["--calibrate", "x", "--trace", "x"], "--trace: not with --calibrate"),
        (["--calibrate", "x", "--target", "http"], "--target: got http; allowed with --calibrate: grpc"),
        (["--calibrate", "x", "--target", "grpc"], "x: [Errno 2] No such file or directory"),
        (["--calibrate", "x", "--metrics-url", "a:1"], "--metrics-url: not without --target"),
        (["--metrics-url", "a:1"], "--metrics-url: not without --calibrate"),
        (["--calibrate", "nowhere/x"], "--calibrate: nowhere is no directory"),
        (["--poisson", 1, "--json", "nowhere/x"], "--json: nowhere is no directory"),
        (["--profile", "--rounds", 2], "--rounds: not with --profile"),
        (["--profile", "--target", "grpc"], "--target: not with --profile"),
        (["--profile", 0], "--profile: got 0; allowed: at least 1"),
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
    options = sorted(vars(parser.parse_args([])))
    known = [*bench.CALIBRATED, *bench.LOAD, "target", "grpc_url", "http_url", "profile"]
    assert sorted([*known, "model", "seed", "calibrate", "metrics_url"]) == options
    assert sorted([*bench.NOT_PROFILED, "model", "seed", "clients", "profile"]) == options
