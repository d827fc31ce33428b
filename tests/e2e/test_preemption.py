"""Streams that were preempted, on the real server: their clients see a pause and no difference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve_client import Client

BYTES_PER_BLOCK = 16 * 30 * 2 * 3 * 64 * 4
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
PROMPTS = ["Once upon a time", "The capital of France is", "def fibonacci(n):", "Roses are red,"]
URGENT = {**GREEDY, "max_tokens": 6, "priority": 5}
LONG = "All work and no play makes Jack a dull boy. " * 30
KINDS = ("kept", "swap", "recompute")


@pytest.fixture(scope="module", params=[0, 1 << 28], ids=["recompute", "swap"])
def small(launch: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    """A server with two places, whose cache holds two long prompts and one block more, and what it can do."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 2,
        "kv_cache_bytes": 45 * BYTES_PER_BLOCK,
        "swap_space_bytes": request.param,
        "stream_interval_ms": 0.0,
    }
    with launch(**settings) as server:
        yield server, "swap" if request.param else "recompute"


def test_preempted_streams_have_the_text_of_those_that_were_left_alone(small: tuple[Any, str]) -> None:
    server, kind = small
    with Client(server.grpc_url, retries=0) as client:
        alone = [client.generate(prompt, return_token_ids=True, **GREEDY) for prompt in PROMPTS]
    counts = preemptions(server)
    answers: list[Any] = [None] * len(PROMPTS)
    under_way = threading.Barrier(3)

    def read(index: int) -> None:
        with Client(server.grpc_url, retries=0) as client:
            chunks: list[Any] = []
            pauses = [5, 25] if index < 2 else []
            for chunk in client.stream(PROMPTS[index], return_token_ids=True, **GREEDY):
                chunks.append(chunk)
                if pauses and sum(len(each.token_ids) for each in chunks) >= pauses[0]:
                    pauses.pop(0)
                    under_way.wait(60)
            answers[index] = chunks

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads[:2]:
        thread.start()
    for time in range(2):
        under_way.wait(60)  # the first two have the places
        threads[2 + time].start()
        urgent = [
            threading.Thread(target=generate, args=(server, f"{time} {number} {LONG}")) for number in range(2)
        ]
        for each in urgent:
            each.start()
        for each in urgent:
            each.join(60)
    for thread in threads:
        thread.join(120)
    for index, whole in enumerate(alone):
        token_ids = [token for chunk in answers[index] for token in chunk.token_ids]
        assert token_ids == whole.token_ids, PROMPTS[index]
        assert "".join(chunk.text for chunk in answers[index]) == whole.text
    server.wait_until_idle(10)
    after = preemptions(server)
    assert sum(after.values()) - sum(counts.values()) >= 3
    assert after[kind] > counts[kind]
    recomputed = server.metrics().get("fastserve_recomputed_tokens_total", 0.0)
    assert (recomputed > 0) == (after["recompute"] > 0)


def generate(server: Any, prompt: str) -> None:
    with Client(server.grpc_url, retries=0) as client:
        assert client.generate(prompt, **URGENT).num_output_tokens == 6


def preemptions(server: Any) -> dict[str, float]:
    metrics = server.metrics()
    return {kind: metrics.get(f'fastserve_preemptions_total{{kind="{kind}"}}', 0.0) for kind in KINDS}


def test_a_preempted_stream_can_be_cancelled(small: tuple[Any, str]) -> None:
    server, _ = small
    with Client(server.grpc_url, retries=0) as client:
        patient = [client.stream(prompt, **{**GREEDY, "max_tokens": 500}) for prompt in PROMPTS[:2]]
        for stream in patient:
            next(iter(stream))
        urgent = [client.stream(LONG, **{**URGENT, "max_tokens": 100}) for _ in range(2)]
        for stream in urgent:
            next(iter(stream))
        server.wait_for_metrics(lambda m: m['fastserve_requests_waiting{priority="0"}'] == 2, 5)
        for stream in patient:
            stream.close()
        server.wait_for_metrics(lambda m: m['fastserve_requests_waiting{priority="0"}'] == 0, 5)
        for stream in urgent:
            assert sum(chunk.num_output_tokens for chunk in stream) > 0
    server.wait_until_idle(10)
