"""Anthropic's API: what becomes of a body, the shapes of answers, and of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient, completion

from fastserve.openai_api.app import create_app
from fastserve.openai_api.tool_formats import HERMES
from fastserve_client import Chunk, FastServeError, Generation

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
TOOL: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}, "description": "does"}
CALL = 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def claude(fake: FakeClient) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: fake, MODEL, HERMES), raise_server_exceptions=False) as client:
        yield client


def post(api: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return api.post("/v1/messages", json=BODY | fields, headers=headers)


def events(answer: Any) -> list[dict[str, Any]]:
    """The events, each of whose names is its `type`."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for each in answer.text.strip().split("\n\n"):
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_fields_reach_the_ensemble_under_its_names(claude: TestClient, fake: FakeClient) -> None:
    fields = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "priority": 2, "metadata": {"user_id": "ada"}}
    answer = post(claude, {"x-api-key": "k"}, **fields, stop_sequences=["END"], system="Be brief.")
    assert answer.status_code == 200
    [call] = fake.calls
    assert (call["temperature"], call["top_k"], call["top_p"], call["priority"]) == (0.5, 3, 0.9, 2)
    assert (call["max_tokens"], call["stop"], call["tenant"]) == (9, ["END"], "ada")
    assert call["include_stop_str_in_output"] is True
    assert call["headers"] == {"authorization": "Bearer k"}
    assert call["messages"] == [{"role": "system", "content": "Be brief."}, *BODY["messages"]]


def test_a_whole_message(claude: TestClient) -> None:
    answer = post(claude)
    said = answer.json()
    assert said["content"] == [{"type": "text", "text": "Hi", "citations": None}]
    assert (said["type"], said["role"], said["model"]) == ("message", "assistant", MODEL)
    assert (said["stop_reason"], said["stop_sequence"]) == ("end_turn", None)
    assert (said["usage"]["input_tokens"], said["usage"]["output_tokens"]) == (3, 2)
    assert answer.headers["request-id"] == said["id"]


@pytest.mark.parametrize(
    ("text", "finish", "shown", "reason", "sequence"),
    [
        ("One END", "stop", "One ", "stop_sequence", "END"),
        ("One END", "length", "One END", "max_tokens", None),
        ("One", "stop", "One", "end_turn", None),
    ],
)
def test_why_it_ended(
    claude: TestClient,
    fake: FakeClient,
    text: str,
    finish: str,
    shown: str,
    reason: str,
    sequence: str | None,
) -> None:
    fake.answer = Generation([completion(text, finish, (1,))], 3, None)
    whole = post(claude, stop_sequences=["END", "N"]).json()
    assert (whole["content"][0]["text"], whole["stop_reason"]) == (shown, reason)
    assert whole["stop_sequence"] == sequence
    fake.chunks = [Chunk([completion(each, None, (1,))], 3, None) for each in text]
    fake.chunks.append(Chunk([completion("", finish)], 3, None))
    found = events(post(claude, stop_sequences=["END", "N"], stream=True))
    deltas = [each["delta"]["text"] for each in found if each["type"] == "content_block_delta"]
    assert "".join(deltas) == shown
    assert found[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert found[-2]["usage"]["output_tokens"] == len(text)


def test_calls_whole_and_streamed(claude: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion(CALL, "stop", (1,))], 3, None)
    whole = post(claude, tools=[TOOL]).json()
    text, call = whole["content"]
    assert text == {"type": "text", "text": "Well.", "citations": None}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "f", {"a": 1})
    assert whole["stop_reason"] == "tool_use"
    fake.chunks = [Chunk([completion(each, None, (1,))], 3, None) for each in CALL]
    fake.chunks.append(Chunk([completion("", "stop")], 3, None))
    found = events(post(claude, tools=[TOOL], stream=True))
    kinds = [each["type"] for each in found if each["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, *block, "message_delta", "message_stop"]
    deltas = [each["delta"] for each in found if each["type"] == "content_block_delta" and each["index"] == 1]
    assert json.loads("".join(each["partial_json"] for each in deltas)) == {"a": 1}
    assert fake.streams[0].is_closed


def test_a_call_and_its_result_become_messages(claude: TestClient, fake: FakeClient) -> None:
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]}
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "Well."}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?", "cache_control": {}}]},
    ]
    assert post(claude, messages=messages, tools=[TOOL]).status_code == 200
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert fake.calls[0]["messages"] == [
        {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "user", "content": "And?"},
    ]


def test_an_answer_in_a_form(claude: TestClient, fake: FakeClient) -> None:
    schema = {"type": "object"}
    form = {"format": {"type": "json_schema", "schema": schema}}
    assert post(claude, output_config=form, cache_control={"type": "ephemeral"}).status_code == 200
    assert fake.calls[0]["structured_outputs"] == {"json": schema}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_a_forced_call_is_guided(claude: TestClient, fake: FakeClient, choice: dict[str, str]) -> None:
    assert post(claude, tools=[TOOL], tool_choice=choice).status_code == 200
    assert "grammar" in fake.calls[0]["structured_outputs"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "`max_tokens`"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "`messages[0].role`: got 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "`messages[0].content[0].type`"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "`messages[0].content[0].text`"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "`messages[0].mood`"),
        ({"system": [{"type": "image"}]}, "`system[0].type`"),
        ({"tool_choice": {"type": "some"}}, "`tool_choice.type`"),
        ({"thinking": {"type": "enabled"}}, "`thinking.type`"),
        ({"mood": 1}, "`mood`: unknown field"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "`output_config.format.type`"),
    ],
)
def test_what_is_wrong_is_named(claude: TestClient, fields: dict[str, Any], said: str) -> None:
    answer = post(claude, **fields)
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (
        400,
        "error",
        "invalid_request_error",
    )
    assert error["error"]["message"].startswith(said)


def test_a_missing_limit_is_named(claude: TestClient) -> None:
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    error = claude.post("/v1/messages", json=body).json()["error"]
    assert error["message"] == "`max_tokens`: missing, but required"


def test_the_servers_refusal_names_the_clients_field(claude: TestClient, fake: FakeClient) -> None:
    fake.answer = FastServeError("INVALID_ARG", "`stop[1]`: got ''; allowed: a text")
    error = post(claude, stop_sequences=["a", "b"]).json()["error"]
    assert error["message"] == "`stop_sequences[1]`: got ''; allowed: a text"


def test_errors_before_and_behind_the_first_event(claude: TestClient, fake: FakeClient) -> None:
    fake.answer = FastServeError("UNAVAILABLE", "the queue is full; try again in 3 s")
    answer = post(claude)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "3"
    fake.chunks = [Chunk([completion("a", None, (1,))], 3, None), FastServeError("INTERNAL", "lost")]
    last = events(post(claude, stream=True))[-1]
    assert (last["type"], last["error"]) == ("error", {"type": "api_error", "message": "lost"})
    assert claude.post("/v1/messages/none", json={}).json()["error"]["type"] == "not_found_error"
