"""A request whose client is gone costs nothing more, and leaves nothing behind."""

from __future__ import annotations

import json
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from fastserve_client import Client, DeadlineExceeded, FastServeError

ENDLESS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4000, "ignore_eos": True}
SMALL, FULL, WARM_UP = 100, 1000, 500


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client
    server.wait_until_idle(10)


def requests_by_outcome(server: Any, outcome: str) -> float:
    return server.metrics().get(f'fastserve_requests_total{{outcome="{outcome}"}}', 0)


def test_grpc_cancel_frees_the_blocks_within_a_second(server: Any, client: Client) -> None:
    before = requests_by_outcome(server, "cancelled")
    stream = client.stream("Count up.", **ENDLESS)
    next(iter(stream))
    server.wait_for_metrics(lambda metrics: metrics["fastserve_kv_blocks_used"] > 0, 5)
    stream.close()
    assert server.wait_until_idle(5) < 1.0
    server.wait_for_metrics(lambda _: requests_by_outcome(server, "cancelled") == before + 1, 2)


def test_http_disconnect_frees_the_blocks_within_a_second(server: Any) -> None:
    host, port = server.http_url.split(":")
    body = (
        b'{"text_input": "Count up.", "stream": true, "parameters": {"max_tokens": 4000, "ignore_eos": true}}'
    )
    path = "/v2/models/fastserve/generate_stream"
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        assert b"data: " in connection.recv(4096) + connection.recv(4096)
        server.wait_for_metrics(lambda metrics: metrics["fastserve_kv_blocks_used"] > 0, 5)
    assert server.wait_until_idle(5) < 1.0


def test_a_client_deadline_frees_the_blocks_within_a_second(server: Any, client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate("Count up.", timeout=1.0, **ENDLESS)
    assert server.wait_until_idle(5) < 1.0


def test_a_request_over_its_time_is_ended_by_the_server(server: Any) -> None:
    before = requests_by_outcome(server, "timeout")
    with Client(server.http_url, "http", retries=0) as client, pytest.raises(FastServeError):
        client.generate("Count up.", timeout=0.7, **ENDLESS)
    server.wait_for_metrics(lambda _: requests_by_outcome(server, "timeout") == before + 1, 2)
    assert server.wait_until_idle(5) < 1.0


def test_random_cancels_leave_nothing(server: Any, client: Client, soak: bool) -> None:
    """Many clients, each leaving at a random moment: before, in or after the queue, prompt or answer."""
    # The server's threads and their memory come with the first hundreds: 4 MB, then 0.3 MB for each thousand.
    run_cancels(client, WARM_UP, seed=1)
    server.wait_until_idle(20)
    before = memory_of(server)
    run_cancels(client, FULL if soak else SMALL, seed=2)
    assert server.wait_until_idle(20) < 20
    after = memory_of(server)
    for name, size in before.items():
        assert after[name] <= size * 1.05, f"{name} grew from {size} to {after[name]} bytes"


def run_cancels(client: Client, count: int, seed: int) -> None:
    numbers = random.Random(seed)
    jobs = [(numbers.randrange(1, 400), numbers.uniform(0, 0.6)) for _ in range(count)]
    lock = threading.Lock()
    errors: list[FastServeError] = []

    def leave_early() -> None:
        while True:
            with lock:
                if not jobs:
                    return
                prompt_length, seconds = jobs.pop()
            prompt = [100 + (seed * 7919 + prompt_length * i) % 9000 for i in range(prompt_length)]
            with client.stream(prompt_token_ids=prompt, **ENDLESS) as stream:
                closer = threading.Timer(seconds, stream.close)
                closer.start()
                try:
                    for _ in stream:
                        pass
                except FastServeError as error:
                    errors.append(error)
                closer.cancel()

    threads = [threading.Thread(target=leave_early) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {error.code for error in errors} <= {"CANCELLED"}


def memory_of(server: Any) -> dict[str, int]:
    """Resident bytes of the server's processes by what they are."""
    process = psutil.Process(server.launcher.process.pid)
    sizes = {"tritonserver": process.memory_info().rss}
    for child in process.children(recursive=True):
        words = child.cmdline()
        name = next(
            (word.split("/")[-3] for word in words if word.endswith("model.py")), " ".join(words)[-60:]
        )
        sizes[name] = child.memory_info().rss
    return sizes


def test_a_queue_timeout_is_told_and_costs_nothing(launch: Any) -> None:
    with launch(max_num_seqs=1, max_num_batched_tokens=64, max_queue_seconds=0.5) as server:
        with Client(server.grpc_url, retries=0) as client:
            first = client.stream("Count up.", **ENDLESS)
            next(iter(first))
            start = time.monotonic()
            with pytest.raises(FastServeError, match="queue") as error:
                client.generate("Hello", max_tokens=4)
            assert error.value.code == "UNAVAILABLE"
            assert 0.4 < time.monotonic() - start < 2
            first.close()
        assert server.wait_until_idle(5) < 1.0


def plain_request() -> list[Any]:
    """Of `infer()`: an endless one."""
    tensors = []
    for name, text in (("text_input", "Count up."), ("sampling_parameters", json.dumps(ENDLESS))):
        tensors.append(tritonclient.grpc.InferInput(name, [1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([text], dtype=np.object_))
    return tensors


@pytest.mark.parametrize("how", ["cancel", "client_timeout", "by id"])
def test_a_plain_infer_that_is_cancelled_costs_nothing_more(server: Any, client: Client, how: str) -> None:
    before = requests_by_outcome(server, "cancelled")
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as plain:
        call = plain.async_infer(
            "fastserve_infer",
            plain_request(),
            lambda result, error: outcome.put(error),
            request_id="plain",
            client_timeout=1.0 if how == "client_timeout" else None,
        )
        server.wait_for_metrics(lambda metrics: metrics["fastserve_kv_blocks_used"] > 0, 5)
        if how == "cancel":
            call.cancel()
        elif how == "by id":
            client.cancel("plain")
        assert isinstance(outcome.get(timeout=10), InferenceServerException)
    assert server.wait_until_idle(10) < 2.0
    server.wait_for_metrics(lambda _: requests_by_outcome(server, "cancelled") == before + 1, 5)


def generated_tokens(server: Any) -> float:
    """Of all tenants."""
    samples = server.metrics().items()
    return sum(value for name, value in samples if name.startswith("fastserve_generation_tokens_total"))


def test_every_token_before_a_failure_arrives(server: Any) -> None:
    """In a streaming ensemble of 2.51 an error overtakes the answers before it: ours travels as data."""
    for url, protocol in ((server.grpc_url, "grpc"), (server.http_url, "http")):
        server.wait_until_idle(10)
        before = generated_tokens(server)
        tokens: list[int] = []
        with Client(url, protocol, retries=0) as client:  # type: ignore[arg-type]
            stream = client.stream("Count up.", **ENDLESS, request_id="fails", return_token_ids=True)
            try:
                for chunk in stream:
                    tokens += chunk.token_ids or []
                    if len(tokens) > 20:
                        client.cancel("fails")
            except FastServeError as error:
                assert error.code == "CANCELLED"  # noqa: PT017
        server.wait_until_idle(10)
        assert len(tokens) == generated_tokens(server) - before > 20
