"""What dies is replaced, and nobody waits for ever meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

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
