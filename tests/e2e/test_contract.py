"""The tensors and parameters of `fastserve`, as the clients of the vLLM backend know them."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

from fastserve_client import Client

PROMPT = "The capital of France is"
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 20}


def tensor(module: Any, name: str, value: Any, dtype: Any = np.object_) -> Any:
    array = np.array([value], dtype=dtype)
    given = module.InferInput(name, [1], np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    return given


def post(server: Any, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def by_generate(server: Any) -> str:
    body = {"text_input": PROMPT, "exclude_input_in_output": True, "parameters": SAMPLING}
    return json.loads(post(server, "fastserve/generate", body))["text_output"]


def by_infer(server: Any) -> str:
    client = tritonclient.http.InferenceServerClient(server.http_url)
    inputs = [
        tensor(tritonclient.http, "text_input", PROMPT),
        tensor(tritonclient.http, "sampling_parameters", json.dumps(SAMPLING)),
        tensor(tritonclient.http, "exclude_input_in_output", True, bool),
    ]
    return client.infer("fastserve_infer", inputs).as_numpy("text_output")[0].decode()


def grpc_responses(server: Any, inputs: list[Any], outputs: list[str] | None = None) -> list[Any]:
    """All responses to one streamed request, by the plain client of Triton server."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    asked = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs] if outputs else None
    responses = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(callback=lambda result, error: results.put((result, error)))
        client.async_stream_infer("fastserve", inputs, outputs=asked, enable_empty_final_response=True)
        while True:
            result, error = results.get(timeout=60)
            assert error is None, error
            response = result.get_response()
            if len(response.outputs):
                responses.append(result)
            if response.parameters["triton_final_response"].bool_param:
                client.stop_stream()
                return responses


def by_grpc_stream(server: Any) -> str:
    inputs = [
        tensor(tritonclient.grpc, "text_input", PROMPT),
        tensor(tritonclient.grpc, "stream", True, bool),
        tensor(tritonclient.grpc, "sampling_parameters", json.dumps(SAMPLING)),
    ]
    return "".join(result.as_numpy("text_output")[0].decode() for result in grpc_responses(server, inputs))


def test_every_way_in_gives_the_same_text(server: Any, embedded_text: str) -> None:
    texts = {by_generate(server), by_infer(server), by_grpc_stream(server), embedded_text}
    assert len(texts) == 1
    assert "Paris" in texts.pop()


@pytest.fixture(scope="module")
def embedded_text(default_model_path: Any) -> str:
    from fastserve import Model

    return Model.load(str(default_model_path), kv_cache_bytes=1 << 26).predict(PROMPT, **SAMPLING)


def test_generate_echoes_the_prompt_by_default(server: Any) -> None:
    answer = json.loads(post(server, "fastserve/generate", {"text_input": PROMPT, "parameters": SAMPLING}))
    assert answer["text_output"].startswith(PROMPT)


def test_generate_stream_sends_events_of_deltas(server: Any) -> None:
    body = {"text_input": PROMPT, "stream": True, "parameters": SAMPLING}
    events = post(server, "fastserve/generate_stream", body).decode().split("\n\n")
    deltas = [json.loads(event.removeprefix("data: "))["text_output"] for event in events if event]
    assert len(deltas) > 1
    assert "".join(deltas) == by_generate(server)


def test_the_last_response_with_data_is_the_final_one(server: Any) -> None:
    inputs = [
        tensor(tritonclient.grpc, "text_input", PROMPT),
        tensor(tritonclient.grpc, "stream", True, bool),
        tensor(tritonclient.grpc, "sampling_parameters", json.dumps(SAMPLING)),
        tensor(tritonclient.grpc, "return_finish_reason", True, bool),
    ]
    responses = grpc_responses(server, inputs)
    finals = [each.get_response().parameters["triton_final_response"].bool_param for each in responses]
    assert finals == [False] * (len(responses) - 1) + [True]
    reasons = [each.as_numpy("finish_reason")[0].decode() for each in responses]
    assert reasons == ["None"] * (len(responses) - 1) + ["length"]


def test_every_output_that_is_asked_for_comes(server: Any) -> None:
    flags = [
        "finish_reason",
        "cumulative_logprob",
        "logprobs",
        "token_ids",
        "num_input_tokens",
        "num_output_tokens",
    ]
    inputs = [
        tensor(tritonclient.grpc, "text_input", PROMPT),
        tensor(tritonclient.grpc, "sampling_parameters", json.dumps({**SAMPLING, "logprobs": 2})),
        *(tensor(tritonclient.grpc, f"return_{flag}", True, bool) for flag in flags),
    ]
    (response,) = grpc_responses(server, inputs)
    assert response.as_numpy("token_ids").shape == (20,)
    assert response.as_numpy("num_input_tokens").tolist() == [5]
    assert response.as_numpy("num_output_tokens").tolist() == [20]
    logprobs = json.loads(response.as_numpy("logprobs")[0])
    assert len(logprobs) == 20
    chosen = [
        entries[str(token)]["logprob"]
        for entries, token in zip(logprobs, response.as_numpy("token_ids"), strict=True)
    ]
    assert sum(chosen) == pytest.approx(float(response.as_numpy("cumulative_logprob")[0]), rel=1e-5)
    assert all(
        entries[str(token)]["rank"] == 1
        for entries, token in zip(logprobs, response.as_numpy("token_ids"), strict=True)
    )


def test_what_is_not_asked_for_does_not_come(server: Any) -> None:
    answer = json.loads(post(server, "fastserve/generate", {"text_input": PROMPT, "parameters": SAMPLING}))
    assert set(answer) == {
        "model_name",
        "model_version",
        "text_output",
        "sequence_id",
        "sequence_start",
        "sequence_end",
    }


def test_several_sequences_of_one_prompt(server: Any) -> None:
    with Client(server.grpc_url) as client:
        answer = client.generate(PROMPT, n=3, temperature=1.0, seed=7, max_tokens=12)
    texts = [completion.text for completion in answer.completions]
    assert len(texts) == 3
    assert len(set(texts)) > 1


def test_chat_messages_and_prompt_token_ids(server: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France? One word."}]
    with Client(server.grpc_url) as client:
        assert "Paris" in client.generate(messages=messages, temperature=0, max_tokens=16).text
        ids = client.generate(prompt_token_ids=[504, 3575, 282, 4649, 314], **SAMPLING)
    assert ids.text == by_generate(server)


@pytest.mark.parametrize(
    "guide",
    [
        {
            "json": {
                "type": "object",
                "properties": {"age": {"type": "integer", "maximum": 99}},
                "required": ["age"],
                "additionalProperties": False,
            }
        },
        {"regex": "[0-9]{3}-[a-z]{2}"},
        {"choice": ["Lyon", "Nice"]},
        {"grammar": 'start: "yes" | "no"'},
    ],
)
def test_guided_decoding(server: Any, guide: Any) -> None:
    import re

    with Client(server.grpc_url) as client:
        text = client.generate(PROMPT, temperature=1.0, seed=3, max_tokens=64, structured_outputs=guide).text
    if "json" in guide:
        assert json.loads(text)["age"] <= 99
    elif "regex" in guide:
        assert re.fullmatch(guide["regex"], text)
    else:
        assert text in guide.get("choice", ["yes", "no"])


def test_prompt_logprobs(server: Any) -> None:
    body = {"text_input": PROMPT, "parameters": {**SAMPLING, "prompt_logprobs": 1}}
    answer = json.loads(post(server, "fastserve/generate", body))
    positions = json.loads(answer["prompt_logprobs"])
    assert len(positions) == 5
    assert positions[0] is None
    assert all(entry["logprob"] <= 0 for position in positions[1:] for entry in position.values())


def test_a_request_cancelled_by_its_id_from_outside(server: Any) -> None:
    with Client(server.grpc_url) as client, Client(server.http_url, "http") as other:
        stream = client.stream(PROMPT, request_id="to-be-cancelled", max_tokens=4000, ignore_eos=True)
        next(iter(stream))
        other.cancel("to-be-cancelled")
        with pytest.raises(Exception, match="cancelled"):
            stream.read()
    server.wait_until_idle(5)


INTERNAL = [
    ("scheduler", "capacity"),
    ("scheduler", "request"),
    ("engine", "released"),
    ("engine", "stop"),
    ("engine", "cancel"),
    ("engine", "health"),
    ("postprocess", "output"),
    ("readiness", "health"),
]


@pytest.mark.parametrize(("model", "name"), INTERNAL)
def test_what_the_steps_say_to_one_another_is_refused_from_a_client(
    server: Any, model: str, name: str
) -> None:
    """With a message that would be valid, but for its seal; a request beside it goes on."""
    from fastserve.ensemble.control_messages import CancelById
    from fastserve.scheduling.capacity import EngineCapacity, ReplicaCapacity
    from fastserve.types import Cancel, Outcome, encode

    with Client(server.grpc_url) as client:
        stream = client.stream(PROMPT, request_id="good", max_tokens=64, ignore_eos=True)
        next(iter(stream))
        messages: dict[str, Any] = {
            "capacity": EngineCapacity(
                10**9, 0.0, [ReplicaCapacity("x", 0, 0, -(10**6), -(10**6), -(10**6), 64)]
            ),
            "cancel": CancelById("good", 1e12),
            "stop": Cancel("good", Outcome.CANCELLED),
        }
        message = encode(messages.get(name, "anything")).decode("latin-1")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, f"{model}/generate", {name: message})
        assert (
            f"INVALID_ARG: `{name}`: got a message that is not of this server"
            in refused.value.read().decode()
        )
        assert next(iter(stream)).text
        assert 1 < stream.read().num_output_tokens < 64
        assert client.generate(PROMPT, **SAMPLING).num_output_tokens == 20
