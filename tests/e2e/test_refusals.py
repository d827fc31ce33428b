"""Every malformed request gets an error that names the field; good ones beside it never notice."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fastserve_client import Client, FastServeError

from .conftest import fuzzing

SMALL, FULL = 120, 1000

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
texts = st.text(max_size=8)
out_of_range: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(max_value=-0.001) | st.floats(min_value=100.1) | st.just("warm"),
    "top_p": st.floats(max_value=0.0) | st.floats(min_value=1.001),
    "top_k": st.integers(max_value=-2) | st.floats(0.1, 0.9),
    "min_p": st.floats(max_value=-0.001) | st.floats(min_value=1.001),
    "max_tokens": st.integers(max_value=0) | st.just("many"),
    "n": st.integers(max_value=0) | st.integers(min_value=65),
    "repetition_penalty": st.floats(max_value=0.0),
    "presence_penalty": st.floats(min_value=2.001),
    "seed": st.integers(min_value=2**63) | st.just("lucky"),
    "stop": st.just([""]) | st.integers(),
    "stop_token_ids": st.just([-1]) | st.just([10**9]) | st.just("x"),
    "logprobs": st.integers(min_value=21) | st.integers(max_value=-1),
    "logit_bias": st.just({"x": 1}) | st.just({"5": "a"}) | st.just({str(10**9): 1}),
    "ignore_eos": st.just("perhaps"),
    "bad_words": st.integers() | st.just([5]),
    "structured_outputs": st.just({"regex": "("})
    | st.just({"json": "{"})
    | st.just({"both": 1})
    | st.just(7),
    "tempurature": st.just(0.5),
    "best_of": st.just(3),
    "timeout": st.just(-5),
}


def bodies() -> st.SearchStrategy[tuple[bytes, str]]:
    """A body for `generate`, and the word that its error must contain."""
    bad_parameter = st.sampled_from(sorted(out_of_range)).flatmap(
        lambda name: out_of_range[name].map(
            lambda value: (json.dumps({"text_input": "Hi", "parameters": {name: value}}).encode(), name)
        )
    )
    bad_sampling = st.sampled_from(sorted(set(out_of_range) - {"timeout"})).flatmap(
        lambda name: out_of_range[name].map(
            lambda value: (
                json.dumps({"text_input": "Hi", "sampling_parameters": json.dumps({name: value})}).encode(),
                name if is_json(value) else "sampling_parameters",
            )
        )
    )
    others = st.sampled_from(
        [
            (b'{"parameters": {"max_tokens": 4}}', "text_input"),
            (b'{"text_input": ""}', "text_input"),
            (b'{"text_input": "a", "messages": "[]"}', "text_input"),
            (b'{"messages": "not json"}', "messages"),
            (b'{"messages": "[]"}', "messages"),
            (b'{"messages": "[{\\"role\\": 5}]"}', "messages"),
            (b'{"text_input": "a", "sampling_parameters": "{"}', "sampling_parameters"),
            (b'{"text_input": "a", "sampling_parameters": "[1]"}', "sampling_parameters"),
            (
                b'{"text_input": "a", "stream": true, "exclude_input_in_output": false}',
                "exclude_input_in_output",
            ),
            (b'{"prompt_token_ids": [-1]}', "prompt_token_ids"),
            (b'{"prompt_token_ids": [999999999]}', "prompt_token_ids"),
            (json.dumps({"text_input": "word " * 9000}).encode(), "text_input"),
            (json.dumps({"text_input": "x" * 2_000_000}).encode(), "text_input"),
            (b'{"text_input": "\xff\xfe"}', ""),
        ]
    )
    strange = json_values.map(
        lambda value: (
            json.dumps({"text_input": "Hi", "sampling_parameters": json.dumps({"odd name": value})}).encode(),
            "odd name" if is_json(value) else "sampling_parameters",
        )
    )
    return st.one_of(bad_parameter, bad_sampling, others, strange)


def is_json(value: Any) -> bool:
    """Whether JSON has it: Python writes infinities and NaN, which it has not."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def refused(server: Any, body: bytes) -> tuple[int, str]:
    """The status and the error of a request that must fail."""
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/fastserve/generate", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            raise AssertionError(f"served: {body[:200]!r}: {response.read()[:200]!r}")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def test_malformed_requests_are_refused_by_name(server: Any, soak: bool) -> None:
    refusals: list[str] = []
    with good_traffic(server) as outcomes:

        @fuzzing(FULL if soak else SMALL)
        @given(bodies())
        def check(case: tuple[bytes, str]) -> None:
            body, word = case
            status, message = refused(server, body)
            assert 400 <= status < 500, (status, message, body[:300])
            assert word in message, (message, body[:300])
            refusals.append(message)

        check()
        print(f"{len(refusals)} malformed requests refused beside {len(outcomes)} good ones")
    assert len(refusals) >= 0.9 * (FULL if soak else SMALL)
    assert outcomes
    assert set(outcomes) == {outcomes[0]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"text_input": ',
        b"[" * 5000,
        b"\x00\xff",
        b"null",
        b'{"text_input": 5}',
        b'{"text_input": "Hi", "priority": "high"}',
        b'{"text_input": "Hi", "stream": "yes"}',
    ],
)
def test_what_triton_server_itself_cannot_read_is_refused_by_it(server: Any, body: bytes) -> None:
    """With 500, before any model is asked: a body that is no JSON object, an input of another type."""
    status, message = refused(server, body)
    assert status in (400, 500)
    assert json.loads(message)["error"]


class good_traffic:
    """Sends one good request after another meanwhile; the texts they gave."""

    def __init__(self, server: Any) -> None:
        self._client = Client(server.grpc_url, retries=0)
        self._outcomes: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._outcomes.append(
                    self._client.generate("The capital of France is", temperature=0, max_tokens=8).text
                )
            except FastServeError as error:
                self._outcomes.append(f"failed: {error}")

    def __enter__(self) -> list[str]:
        self._thread.start()
        return self._outcomes

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("text_input", np.array([5], dtype=np.int32)),
        ("text_input", np.array(["a", "b"], dtype=np.object_)),
        ("text_input", np.array([b"\xff\xfe"], dtype=np.object_)),
        ("priority", np.array([1.5], dtype=np.float32)),
        ("stream", np.array([1], dtype=np.int32)),
        ("sampling_parameters", np.array([b"{"], dtype=np.object_)),
        ("prompt_token_ids", np.array([-1], dtype=np.int64)),
        ("prompt_token_ids", np.array([], dtype=np.int64)),
        ("no_such_input", np.array(["x"], dtype=np.object_)),
    ],
)
def test_a_wrong_tensor_is_refused_by_name_over_grpc(server: Any, name: str, array: np.ndarray) -> None:
    wrong = tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    wrong.set_data_from_numpy(array)
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match=name),
    ):
        client.infer("fastserve_infer", [wrong])
