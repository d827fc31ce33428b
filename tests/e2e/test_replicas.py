"""Two replicas of the default model behind one queue, on the real server."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from fastserve_client import Client, FastServeError

SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
MAX_NUM_SEQS = 4


@pytest.fixture(scope="module")
def pair(launch: Any) -> Iterator[Any]:
    with launch(replicas=2, max_num_seqs=MAX_NUM_SEQS, kv_cache_bytes=1 << 28) as server:
        yield server


def workers(server: Any) -> list[psutil.Process]:
    root = psutil.Process(server.launcher.process.pid)
    return [
        child
        for child in root.children(recursive=True)
        if "multiprocessing.spawn" in " ".join(child.cmdline())
    ]


class Load:
    """Requests, all at once; what came of each."""

    def __init__(self, server: Any, count: int, max_tokens: int) -> None:
        self._server = server
        self._sampling = {**SAMPLING, "max_tokens": max_tokens}
        self.lengths: list[int] = []
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        with Client(self._server.grpc_url, retries=0) as client:
            try:
                answer = client.generate(f"Story number {number}:", **self._sampling)
                self.lengths.append(answer.num_output_tokens)
            except FastServeError as error:
                self.errors.append(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(200)
        assert not any(thread.is_alive() for thread in self._threads)


def is_ready(server: Any) -> bool:
    with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready", timeout=5) as response:
        return bool(response.status == 200)


def computed(server: Any) -> list[float]:
    metrics = server.metrics()
    return [metrics.get(f'fastserve_computed_tokens_total{{replica="{number}"}}', 0.0) for number in range(2)]


def test_both_take_their_share(pair: Any) -> None:
    assert pair.metrics()["fastserve_replicas_ready"] == 2
    with Client(pair.grpc_url, retries=0) as client:
        client.generate("Hello", max_tokens=2, **SAMPLING)  # before it, the queue knows of one slot
    before = computed(pair)
    load = Load(pair, 96, max_tokens=40)
    load.join()
    assert load.errors == []
    assert load.lengths == [40] * 96
    pair.wait_until_idle(10)
    first, second = (after - at for after, at in zip(computed(pair), before, strict=True))
    assert 0.45 <= first / (first + second) <= 0.55


def test_one_that_is_killed_fails_what_it_had_and_nothing_else(pair: Any) -> None:
    load = Load(pair, 32, max_tokens=120)
    running = "fastserve_requests_running"
    pair.wait_for_metrics(lambda m: m[running] >= 2 * MAX_NUM_SEQS - 2, 30)
    os.kill(workers(pair)[0].pid, signal.SIGKILL)
    pair.wait_for_metrics(lambda m: m["fastserve_replicas_ready"] == 1, 5)
    assert is_ready(pair)
    load.join()
    assert 1 <= len(load.errors) <= MAX_NUM_SEQS + 2  # those on their way to it, too
    assert all("worker" in str(error) for error in load.errors)
    assert load.lengths == [120] * (32 - len(load.errors))
    pair.wait_for_metrics(lambda m: m["fastserve_replicas_ready"] == 2, 60)
    pair.wait_until_idle(10)
    assert pair.metrics()["fastserve_worker_restarts_total"] == 1
    again = Load(pair, 24, max_tokens=40)
    before = computed(pair)
    again.join()
    assert again.errors == []
    deadline = time.monotonic() + 10
    while not all(after > at for after, at in zip(computed(pair), before, strict=True)):
        assert time.monotonic() < deadline, "one of the replicas gets nothing"
        time.sleep(0.1)
