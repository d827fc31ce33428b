"""What becomes of a request's fields, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient

from fastserve.openai_api.app import create_app

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hello"}


def chat(api: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return api.post("/v1/chat/completions", json=CHAT | fields, headers=headers)


def complete(api: TestClient, **fields: Any) -> Any:
    return api.post("/v1/completions", json=TEXT | fields)


def test_fields_reach_the_ensemble_under_its_names(api: TestClient, fake: FakeClient) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "n": 2,
        "stop": ["a"],
        "seed": 7,
        "logit_bias": {"5": -100},
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "min_tokens": 1,
        "ignore_eos": True,
    }
    extra: dict[str, Any] = {"user": "ada", "priority": 3, "deadline_ms": 1500, "max_completion_tokens": 9}
    assert chat(api, **fields, **extra).status_code == 200
    [call] = fake.calls
    assert {name: call[name] for name in fields} == fields
    assert (call["tenant"], call["priority"], call["timeout"], call["max_tokens"]) == ("ada", 3, 1.5, 9)


def test_headers_say_what_the_body_does_not(api: TestClient, fake: FakeClient) -> None:
    headers = {"x-priority": "4", "x-tenant": "grace", "x-deadline-ms": "250", "authorization": "Bearer k"}
    chat(api, headers)
    chat(api, headers, priority=-1, tenant="ada", deadline_ms=1000)
    first, second = fake.calls
    assert (first["priority"], first["tenant"], first["timeout"]) == (4, "grace", 0.25)
    assert (second["priority"], second["tenant"], second["timeout"]) == (-1, "ada", 1.0)
    assert first["headers"] == second["headers"] == {"authorization": "Bearer k"}


def test_a_chat_without_a_limit_has_none(api: TestClient, fake: FakeClient) -> None:
    chat(api)
    complete(api)
    assert fake.calls[0]["max_tokens"] is None
    assert "max_tokens" not in fake.calls[1]


@pytest.mark.parametrize(
    ("form", "guide"),
    [
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}, {"json": {"a": 1}}),
        ({"type": "text"}, None),
    ],
)
def test_the_form_of_an_answer(api: TestClient, fake: FakeClient, form: Any, guide: Any) -> None:
    assert chat(api, response_format=form).status_code == 200
    assert fake.calls[0].get("structured_outputs") == guide


def test_developer_is_the_template_s_system(api: TestClient, fake: FakeClient) -> None:
    chat(api, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert [message["role"] for message in fake.calls[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    "field",
    ["metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"],
)
def test_what_changes_nothing_is_taken(api: TestClient, fake: FakeClient, field: str) -> None:
    value: Any = {"metadata": {}, "store": False, "prediction": {}}.get(field, "x")
    assert chat(api, **{field: value}).status_code == 200
    assert field not in fake.calls[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": []}, "functions"),
        ({"n": "two"}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"priority": 2**31}, "priority"),
        ({"messages": "Hello"}, "messages"),
        ({"model": None}, "model"),
    ],
)
def test_what_a_chat_does_not_take_is_named(
    api: TestClient, fake: FakeClient, fields: dict[str, Any], param: str
) -> None:
    answer = chat(api, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert f"`{param}`" in error["message"]
    assert fake.calls == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, 2], "echo": True}, "echo"),
        ({"prompt": ["a"] * 257}, "prompt"),
    ],
)
def test_what_a_completion_does_not_take_is_named(
    api: TestClient, fake: FakeClient, fields: dict[str, Any], param: str
) -> None:
    answer = complete(api, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert fake.calls == []


def test_a_header_that_is_no_number_is_named(api: TestClient) -> None:
    answer = chat(api, {"x-priority": "high"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-priority")


@pytest.mark.parametrize(
    ("prompt", "calls"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1, 2], [3]], [(None, [1, 2]), (None, [3])]),
    ],
)
def test_prompts(api: TestClient, fake: FakeClient, prompt: Any, calls: Any) -> None:
    answer = complete(api, prompt=prompt).json()
    assert [(call["prompt"], call.get("prompt_token_ids")) for call in fake.calls] == calls
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(calls)))
    assert answer["usage"] == {
        "prompt_tokens": 3 * len(calls),
        "completion_tokens": 2 * len(calls),
        "total_tokens": 5 * len(calls),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "\xff"}'])
def test_a_body_that_is_no_request(api: TestClient, body: bytes) -> None:
    answer = api.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(("has_keys", "tenant"), [(False, "ada"), (True, None)])
def test_a_user_is_the_tenant_unless_keys_say_that(
    fake: FakeClient, has_keys: bool, tenant: str | None
) -> None:
    with TestClient(create_app(lambda: fake, MODEL, has_keys=has_keys)) as api:
        chat(api, user="ada")
    assert fake.calls[0].get("tenant") == tenant
