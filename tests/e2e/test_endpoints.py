"""Every way in has the one queue, the one order and the same errors, here of a small engine."""

from __future__ import annotations

import contextlib
import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from fastserve.config import TenantQuota
from fastserve_client import Client, FastServeError

CACHE_BYTES = 1 << 27
OTHER_INPUTS: list[tuple[str, str, Any]] = [
    ("priority", "INT32", np.int32),
    ("expected_output_tokens", "INT32", np.int32),
    ("tenant", "BYTES", np.object_),
]
STATUSES: dict[str, dict[str, Any]] = {
    "generate": {"INVALID_ARG": 400, "UNAVAILABLE": 400, "CANCELLED": 400},
    "generate_stream": {"INVALID_ARG": 400, "UNAVAILABLE": 400, "CANCELLED": 200},
    "grpc_stream": {"INVALID_ARG": None, "UNAVAILABLE": None, "CANCELLED": None},
    "infer_http": {"INVALID_ARG": "400", "UNAVAILABLE": "503", "CANCELLED": "400"},
    "infer_grpc": {
        "INVALID_ARG": "StatusCode.INVALID_ARGUMENT",
        "UNAVAILABLE": "StatusCode.UNAVAILABLE",
        "CANCELLED": "StatusCode.CANCELLED",
    },
    "infer_generate": {"INVALID_ARG": 400, "UNAVAILABLE": 400, "CANCELLED": 400},
}
"""The status of an error by endpoint, as Triton server 2.51 allows: "Errors by endpoint" in docs/api.md."""
QUOTAS = {
    "limited": TenantQuota(requests_per_second=0.001, burst_seconds=1),
    "patient": TenantQuota(requests_per_second=0.5, burst_seconds=1),
    "one at a time": TenantQuota(tokens_in_flight=1010),
}
BLOCKED, RUNNING, OVER_QUOTA = "the engine is busy", "it runs", "the tenant is over its quota"
ERRORS: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("an invalid value", {"parameters": {"temperature": -1}}, "", "INVALID_ARG", "`temperature`: got "),
    ("a fraction", {"parameters": {"temperature": -0.5}}, "", "INVALID_ARG", "`temperature`: got "),
    ("an unknown name", {"parameters": {"temprature": 1}}, "", "INVALID_ARG", "`temprature`: "),
    ("a priority beyond the range", {"priority": 11}, "", "INVALID_ARG", "`priority`: got 11; allowed: "),
    (
        "a hint beyond max_tokens",
        {"expected_output_tokens": 17},
        "",
        "INVALID_ARG",
        "`expected_output_tokens`: got 17; allowed: an integer from 1 to `max_tokens`, which is 16",
    ),
    (
        "over a quota",
        {"tenant": "limited"},
        OVER_QUOTA,
        "UNAVAILABLE",
        "tenant 'limited' is over its quota of ",
    ),
    ("a long prompt", {"text_input": "word " * 9000}, "", "INVALID_ARG", "`text_input`: got "),
    ("a full queue", {"queued": 2}, BLOCKED, "UNAVAILABLE", "the queue is full"),
    ("time over in the queue", {"timeout": 200_000}, BLOCKED, "UNAVAILABLE", "no room within 0."),
    ("cancelled", {"id": "mine"}, RUNNING, "CANCELLED", "the request was cancelled"),
    ("time over", {"timeout": 600_000}, RUNNING, "CANCELLED", "the request's time was over"),
]


@pytest.fixture(scope="module")
def small_server(launch: Any) -> Iterator[Any]:
    with launch(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_queue_size=2,
        kv_cache_bytes=CACHE_BYTES,
        kv_cache_dtype="int8",
        tenant_quotas=QUOTAS,
    ) as server:
        yield server


def test_a_cache_of_8_bits_holds_a_token_in_a_byte_per_element(small_server: Any) -> None:
    bytes_per_block = 16 * 30 * 2 * 3 * 64
    assert small_server.metrics()["fastserve_kv_blocks_total"] == CACHE_BYTES // bytes_per_block
    with Client(small_server.grpc_url, retries=0) as client:
        answer = client.generate("The capital of France is", max_tokens=12, temperature=0)
    assert "Paris" in answer.text


def test_a_full_queue_says_unavailable_at_once(small_server: Any) -> None:
    with Client(small_server.grpc_url, retries=0) as client:
        endless: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True, "temperature": 0}
        streams = [client.stream("One", **endless)]
        next(iter(streams[0]))
        streams += [client.stream("More", **endless) for _ in range(2)]
        small_server.wait_for_metrics(lambda m: m.get('fastserve_requests_waiting{priority="0"}', 0) == 2, 5)
        with pytest.raises(FastServeError, match="queue") as error:
            client.generate("Too many", max_tokens=1)
        assert error.value.code == "UNAVAILABLE"
        for stream in streams:
            stream.close()
    small_server.wait_until_idle(5)


def test_a_more_urgent_request_takes_a_place_at_the_next_iteration(small_server: Any) -> None:
    with Client(small_server.grpc_url, retries=0) as client:
        batch_job = client.stream("A long story", max_tokens=200, ignore_eos=True, temperature=0)
        chunks = iter(batch_job)
        first = next(chunks)
        urgent = client.generate("Quick", priority=10, max_tokens=4, temperature=0)
        assert urgent.num_output_tokens <= 4
        rest = list(chunks)
        assert first.num_output_tokens + sum(chunk.num_output_tokens for chunk in rest) == 200
    small_server.wait_for_metrics(lambda m: m.get('fastserve_preemptions_total{kind="kept"}', 0) >= 1, 5)


@pytest.mark.parametrize(
    ("fields", "state", "code", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_every_endpoint_tells_every_error_by_its_code(
    small_server: Any, fields: dict[str, Any], state: str, code: str, words: str
) -> None:
    endless: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True, "temperature": 0}
    fields = {"text_input": "Count up.", "parameters": {}, **fields}
    queued = fields.pop("queued", 0)
    if state == RUNNING:
        fields["parameters"] = endless
    with Client(small_server.grpc_url, retries=0) as client:
        streams = [client.stream("One", priority=10, **endless)] if state == BLOCKED else []
        if streams:
            next(iter(streams[0]))
        streams += [client.stream("More", **endless) for _ in range(queued)]
        if state == OVER_QUOTA:
            with contextlib.suppress(FastServeError):  # the test may have run before
                client.generate("Hi", max_tokens=1, tenant=fields["tenant"])
        small_server.wait_for_metrics(
            lambda m: m.get('fastserve_requests_waiting{priority="0"}', 0) == queued, 10
        )
        for endpoint, statuses in STATUSES.items():
            answer = error_while_cancelling(small_server, client, endpoint, fields)
            assert answer[0] == statuses[code], (endpoint, answer)
            assert f"{code}: {words}" in answer[1], (endpoint, answer)
        for stream in streams:
            stream.close()
    small_server.wait_until_idle(10)


def error_while_cancelling(
    server: Any, client: Client, endpoint: str, fields: dict[str, Any]
) -> tuple[Any, str]:
    """What an endpoint answers; a request that has an id is cancelled by it when it runs."""
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(error_at, server, endpoint, fields)
        if "id" in fields:
            server.wait_for_metrics(lambda metrics: metrics["fastserve_requests_running"] == 1, 10)
            client.cancel(fields["id"])
        return answer.result(30)


def error_at(server: Any, endpoint: str, fields: dict[str, Any]) -> tuple[Any, str]:
    """The status and the message of the error that a request gets at one of the endpoints."""
    if endpoint in ("generate", "generate_stream", "infer_generate"):
        model, path = (
            ("fastserve_infer", "generate") if endpoint == "infer_generate" else ("fastserve", endpoint)
        )
        body = {**fields, "stream": True} if endpoint == "generate_stream" else fields
        url = f"http://{server.http_url}/v2/models/{model}/{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
    module, url = (
        (tritonclient.http, server.http_url)
        if endpoint == "infer_http"
        else (tritonclient.grpc, server.grpc_url)
    )
    prompt = module.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([fields["text_input"]], dtype=np.object_))
    sampling = module.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps(fields["parameters"])], dtype=np.object_))
    inputs = [prompt]
    for name, data_type, dtype in OTHER_INPUTS:
        if name in fields:
            inputs.append(module.InferInput(name, [1], data_type))
            inputs[-1].set_data_from_numpy(np.array([fields[name]], dtype=dtype))
    options = {"request_id": fields.get("id", ""), "timeout": fields.get("timeout")}
    with module.InferenceServerClient(url) as client:
        try:
            if endpoint != "grpc_stream":
                client.infer("fastserve_infer", inputs, parameters=fields["parameters"], **options)
                raise AssertionError(f"served by {endpoint}: {fields}")
            errors: queue.SimpleQueue[Any] = queue.SimpleQueue()
            client.start_stream(lambda result, error: errors.put(error))
            client.async_stream_infer("fastserve", inputs, parameters=fields["parameters"], **options)
            failure = errors.get(timeout=30)
            client.stop_stream()
            return failure.status(), failure.message()
        except InferenceServerException as error:
            return error.status(), error.message()


def test_float_parameters_mean_the_same_at_every_endpoint_and_an_input_wins(small_server: Any) -> None:
    def text(parameters: dict[str, Any], *inputs: Any) -> str:
        prompt = tritonclient.http.InferInput("text_input", [1], "BYTES")
        prompt.set_data_from_numpy(np.array(["Once upon a time"], dtype=np.object_))
        with tritonclient.http.InferenceServerClient(small_server.http_url) as client:
            result = client.infer("fastserve_infer", [prompt, *inputs], parameters=parameters)
        return result.as_numpy("text_output")[0].decode().removeprefix("Once upon a time")

    sampling: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 12}
    with Client(small_server.grpc_url) as client:
        expected = client.generate("Once upon a time", **sampling).text
        greedy = client.generate("Once upon a time", **{**sampling, "temperature": 0}).text
    assert text(sampling) == expected != greedy
    given = tritonclient.http.InferInput("sampling_parameters", [1], "BYTES")
    given.set_data_from_numpy(np.array([json.dumps({"temperature": 0.0})], dtype=np.object_))
    assert text(sampling, given) == greedy


def test_plain_infer_waits_in_the_one_queue_in_the_order_of_priorities(small_server: Any) -> None:
    ended: list[int] = []

    def infer(priority: int) -> None:
        inputs = [
            tritonclient.grpc.InferInput("text_input", [1], "BYTES"),
            tritonclient.grpc.InferInput("priority", [1], "INT32"),
        ]
        inputs[0].set_data_from_numpy(np.array(["Hi"], dtype=np.object_))
        inputs[1].set_data_from_numpy(np.array([priority], dtype=np.int32))
        with tritonclient.grpc.InferenceServerClient(small_server.grpc_url) as client:
            client.infer("fastserve_infer", inputs, parameters={"max_tokens": 2, "ignore_eos": True})
        ended.append(priority)

    with Client(small_server.grpc_url, retries=0) as client, ThreadPoolExecutor(3) as threads:
        blocker = client.stream("One", priority=10, max_tokens=3000, ignore_eos=True)
        next(iter(blocker))
        waiting = [threads.submit(infer, priority) for priority in (1, 7)]
        small_server.wait_for_metrics(
            lambda m: all(m.get(f'fastserve_requests_waiting{{priority="{p}"}}', 0) == 1 for p in (1, 7)), 10
        )
        with pytest.raises(FastServeError, match="the queue is full"):
            client.generate("Too many", max_tokens=1)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE: the queue is full"):
            infer(9)
        blocker.close()
        for each in waiting:
            each.result(30)
    assert ended == [7, 1]


def test_the_client_waits_as_a_quota_says(small_server: Any) -> None:
    urls: dict[Any, str] = {"grpc": small_server.grpc_url, "http": small_server.http_url}
    for protocol, url in urls.items():
        with Client(url, protocol, retries=1) as client:
            for _ in range(2):  # two seconds apart
                client.generate("Hi", tenant="patient", max_tokens=1)


def test_tokens_in_flight_are_free_again_when_their_request_has_ended(small_server: Any) -> None:
    with Client(small_server.grpc_url, retries=0) as client, Client(small_server.grpc_url) as patient:
        stream = client.stream("One", tenant="one at a time", max_tokens=1000, ignore_eos=True)
        next(iter(stream))
        with pytest.raises(FastServeError, match="over its quota of 1010 tokens in flight") as caught:
            client.generate("Two", tenant="one at a time")
        assert (caught.value.code, caught.value.retry_after) == ("UNAVAILABLE", pytest.approx(1.0, abs=0.01))
        assert client.generate("Two", tenant="another", max_tokens=1, priority=1).num_output_tokens == 1
        stream.close()
        assert patient.generate("Two", tenant="one at a time", max_tokens=1).num_output_tokens == 1
    rejections = 'fastserve_quota_rejections_total{quota="tokens_in_flight",tenant="one at a time"}'
    assert small_server.metrics()[rejections] >= 1


def test_while_the_ensemble_is_unloaded_every_endpoint_is_unavailable(small_server: Any) -> None:
    def control(verb: str) -> None:
        url = f"http://{small_server.http_url}/v2/repository/models/fastserve/{verb}"
        with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=60) as response:
            assert response.status == 200

    control("unload")
    try:
        status, message = error_at(small_server, "infer_http", {"text_input": "Hi", "parameters": {}})
        assert status == "503"
        assert "UNAVAILABLE: the model `fastserve` is not ready" in message
        urls: dict[Any, str] = {"grpc": small_server.grpc_url, "http": small_server.http_url}
        for protocol, url in urls.items():
            with Client(url, protocol, retries=0) as client, pytest.raises(FastServeError) as caught:
                client.generate("Hi")
            assert caught.value.code == "UNAVAILABLE"
    finally:
        control("load")
    with Client(small_server.grpc_url) as client:
        assert client.generate("Hi", max_tokens=1).num_output_tokens == 1
