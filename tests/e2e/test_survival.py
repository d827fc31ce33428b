"""What dies is replaced, and nobody waits for ever meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
import pytest

from fastserve.launcher.repository import model_repository
from fastserve_client import Client, FastServeError

ENDLESS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4000, "ignore_eos": True}
STUBS = ["preprocess", "scheduler", "engine", "postprocess", "fastserve_infer"]


@pytest.fixture(scope="module")
def own_server(launch: Any) -> Iterator[Any]:
    """Not the one that the other tests use: this one is hurt."""
    with launch(kv_cache_bytes=1 << 28) as server:
        yield server


def processes(server: Any) -> dict[str, psutil.Process]:
    """The server's processes by what they do."""
    root = psutil.Process(server.launcher.process.pid)
    named = {"tritonserver": root}
    for child in root.children(recursive=True):
        words = " ".join(child.cmdline())
        if "spawn_main" in words:
            named["worker"] = child
        for stub in STUBS:
            if f"/{stub}/1/model.py" in words:
                named[stub] = child
    return named


class Streams:
    """Several endless streams, and when and how each ended."""

    def __init__(self, server: Any, count: int) -> None:
        self._client = Client(server.grpc_url, retries=0)
        self.ended: list[float] = []
        self.errors: list[Exception] = []
        self._flowing = threading.Barrier(count + 1)
        self._threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()
        self._flowing.wait(60)

    def _read(self, index: int) -> None:
        stream = iter(self._client.stream(f"Story number {index}:", **ENDLESS))
        next(stream)
        self._flowing.wait(60)
        try:
            for _ in stream:
                pass
        except FastServeError as error:
            self.errors.append(error)
        self.ended.append(time.monotonic())

    def join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), (
            f"a client still waits after {seconds} s"
        )


def is_ready(server: Any) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def seconds_until_served(server: Any, limit: float) -> float:
    """Until a new request is answered, asked again and again."""
    start = time.monotonic()
    while True:
        try:
            with Client(server.grpc_url, retries=0) as client:
                client.generate("Hello", temperature=0, max_tokens=2, timeout=5)
                return time.monotonic() - start
        except FastServeError:
            assert time.monotonic() - start < limit, f"nothing was served for {limit} s"
            time.sleep(0.1)


def test_a_killed_worker_fails_its_streams_and_is_replaced(own_server: Any) -> None:
    seconds_until_served(own_server, 60)
    streams = Streams(own_server, 8)
    killed = time.monotonic()
    os.kill(processes(own_server)["worker"].pid, signal.SIGKILL)
    streams.join(2)
    assert len(streams.errors) == 8
    assert all("worker" in str(error) for error in streams.errors)
    deadline = killed + 3
    while is_ready(own_server):
        assert time.monotonic() < deadline, "the server still says that it is ready"
        time.sleep(0.02)
    assert seconds_until_served(own_server, 20) < 20
    while not is_ready(own_server):
        assert time.monotonic() < killed + 25, "the server does not say that it is ready again"
        time.sleep(0.02)
    assert own_server.metrics()["fastserve_worker_restarts_total"] == 1


@pytest.mark.parametrize("name", [*STUBS, "tritonserver"])
def test_a_killed_process_of_the_server_is_replaced(own_server: Any, name: str) -> None:
    seconds_until_served(own_server, 60)
    restarts = len(own_server.launcher.restarts)
    streams = Streams(own_server, 4)
    killed = time.monotonic()
    os.kill(processes(own_server)[name].pid, signal.SIGKILL)
    streams.join(10)
    seconds_until_served(own_server, 40)
    assert time.monotonic() - killed < 40
    own_server.launcher.wait_restarts(restarts + 1, 40)


def test_a_bad_grammar_fails_its_request_only(own_server: Any) -> None:
    seconds_until_served(own_server, 60)
    with Client(own_server.grpc_url, retries=0) as client:
        good = client.stream("Once", temperature=0, max_tokens=40, ignore_eos=True)
        with pytest.raises(FastServeError) as error:
            client.generate("x", structured_outputs={"regex": "(unclosed"})
        assert error.value.code == "INVALID_ARG"
        assert good.read().num_output_tokens == 40


@pytest.fixture(scope="module")
def fresh_server(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One that runs from a repository as a fresh clone has it. The last test stops it."""
    repository = tmp_path_factory.mktemp("clone") / "model_repository"
    shutil.copytree(model_repository(), repository, ignore=shutil.ignore_patterns("__pycache__"))
    with launch(
        exit_timeout_seconds=120, model_repository=repository, kv_cache_bytes=1 << 28, max_num_seqs=16
    ) as server:
        yield server


def test_a_killed_worker_of_a_fresh_clone_leaves_one(fresh_server: Any) -> None:
    seconds_until_served(fresh_server, 60)
    lost = processes(fresh_server)["worker"]
    os.kill(lost.pid, signal.SIGKILL)
    seconds_until_served(fresh_server, 60)
    deadline = time.monotonic() + 60
    # The model of that name is loaded when the new worker is there, and what it needs is looked at then.
    while fresh_server.launcher.log_path.read_text().count("successfully loaded 'readiness'") < 2:
        assert time.monotonic() < deadline, "the server does not say that it is ready again"
        time.sleep(0.02)
    assert fresh_server.launcher.log_path.read_text().count('"loading: engine:1"') == 1
    root = psutil.Process(fresh_server.launcher.process.pid)
    workers = [child for child in root.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 1


def test_a_stop_loses_nothing_that_was_accepted(fresh_server: Any) -> None:
    """8 gRPC streams and 8 HTTP streams run, 8 more requests wait: all get their whole answer."""
    seconds_until_served(fresh_server, 60)
    length = 150

    def finish(stream: Any) -> int:
        return stream.read().num_output_tokens

    with ExitStack() as stack:
        clients: dict[str, Client] = {
            "grpc": stack.enter_context(Client(fresh_server.grpc_url, "grpc", retries=0)),
            "http": stack.enter_context(Client(fresh_server.http_url, "http", retries=0)),
        }
        threads = stack.enter_context(ThreadPoolExecutor(32))
        answers = []
        for client in clients.values():
            for number in range(8):
                stream = client.stream(f"Story {number}:", temperature=0, max_tokens=length, ignore_eos=True)
                answers.append(threads.submit(finish, stream))
        fresh_server.wait_for_metrics(lambda values: values["fastserve_requests_running"] == 16, 60)
        for number in range(8):
            client = clients["grpc" if number % 2 else "http"]
            question = partial(client.generate, temperature=0, max_tokens=length, ignore_eos=True)
            answers.append(
                threads.submit(lambda ask, n: ask(f"Tale {n}:").num_output_tokens, question, number)
            )
        waiting = "fastserve_requests_waiting"
        fresh_server.wait_for_metrics(
            lambda values: sum(value for name, value in values.items() if name.startswith(waiting)) == 8, 60
        )
        fresh_server.launcher.request_shutdown()
        deadline = time.monotonic() + 30
        while not (fresh_server.launcher.run_directory.path / "stopping").exists():
            assert time.monotonic() < deadline, "the launcher does not stop the server"
            time.sleep(0.02)
        for client in clients.values():
            with pytest.raises(FastServeError, match="the server is stopping") as refusal:
                client.generate("Hello", temperature=0, max_tokens=1)
            assert refusal.value.code == "UNAVAILABLE"
        assert [answer.result() for answer in answers] == [length] * 24
        answered = time.monotonic()
        fresh_server.launcher.join()
        assert time.monotonic() - answered < 30, "with nothing in flight, the server does not leave"
    assert fresh_server.launcher.restarts == []
