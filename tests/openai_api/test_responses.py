"""OpenAI's Responses API: what becomes of a body, and the shapes of answers."""

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

TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def tools_api(fake: FakeClient) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: fake, MODEL, HERMES), raise_server_exceptions=False) as client:
        yield client


def respond(api: TestClient, **fields: Any) -> Any:
    return api.post("/v1/responses", json={"model": MODEL, "input": "Hello"} | fields)


def events(answer: Any) -> list[dict[str, Any]]:
    """The events, each of whose names is its `type`, numbered from 0."""
    found = []
    for each in answer.text.strip().split("\n\n"):
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def stream_of(fake: FakeClient, text: str, finish: str) -> None:
    fake.chunks = [Chunk([completion(each, None, (1,))], 3, None) for each in text]
    fake.chunks.append(Chunk([completion("", finish)], 3, None))


def test_fields_reach_the_ensemble_under_its_names(api: TestClient, fake: FakeClient) -> None:
    schema = {"type": "object"}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    fields = {"temperature": 0.5, "top_p": 0.9, "priority": 2, "user": "ada", "max_output_tokens": 7}
    assert respond(api, **fields, instructions="Be brief.", text=text, store=False).status_code == 200
    [call] = fake.calls
    assert (call["temperature"], call["top_p"], call["priority"], call["tenant"]) == (0.5, 0.9, 2, "ada")
    assert (call["max_tokens"], call["structured_outputs"]) == (7, {"json": schema})
    assert call["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_a_whole_response(api: TestClient) -> None:
    said = respond(api, include=["message.output_text.logprobs"], top_logprobs=1).json()
    [item] = said["output"]
    [part] = item["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "Hi", [])
    assert [each["token"] for each in part["logprobs"]] == ["<1>", "<2>"]
    assert (said["object"], said["status"], said["store"]) == ("response", "completed", False)
    assert said["usage"]["total_tokens"] == 5
    assert said["id"].startswith("resp_")


def test_an_answer_that_was_too_long(api: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion("Hi", "length", (1,))], 3, None)
    said = respond(api).json()
    assert (said["status"], said["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    stream_of(fake, "Hi", "length")
    assert events(respond(api, stream=True))[-1]["type"] == "response.incomplete"


def test_a_stream_adds_up_to_the_whole(api: TestClient, fake: FakeClient) -> None:
    stream_of(fake, "Hello", "stop")
    found = events(respond(api, stream=True))
    kinds = [each["type"].removeprefix("response.") for each in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:9] == ["output_text.delta"] * 5
    assert kinds[9:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(each["delta"] for each in found[4:9]) == found[9]["text"] == "Hello"
    last = found[-1]["response"]
    assert last["output"][0] == found[-2]["item"]
    assert found[2]["item"]["content"] == []
    assert len({each["item_id"] for each in found[3:10]}) == 1
    assert last["usage"]["output_tokens"] == 5
    assert fake.streams[0].is_closed


def test_calls_whole_and_streamed(tools_api: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion(CALL, "stop", (1,))], 3, None)
    message, call = respond(tools_api, tools=[TOOL]).json()["output"]
    assert message["content"][0]["text"] == "Well."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "f", {"a": 1})
    stream_of(fake, CALL, "stop")
    found = events(respond(tools_api, tools=[TOOL], stream=True))
    pieces = [each["delta"] for each in found if each["type"] == "response.function_call_arguments.delta"]
    [done] = [each for each in found if each["type"] == "response.function_call_arguments.done"]
    assert json.loads("".join(pieces)) == json.loads(done["arguments"]) == {"a": 1}
    assert done["output_index"] == 1
    assert [item["type"] for item in found[-1]["response"]["output"]] == ["message", "function_call"]


def test_items_become_messages(tools_api: TestClient, fake: FakeClient) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Add."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well.", "annotations": []}]},
        {
            "type": "function_call",
            "call_id": "c1",
            "name": "f",
            "arguments": '{"a": 1}',
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ]
    assert respond(tools_api, input=items, tools=[TOOL]).status_code == 200
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert fake.calls[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments"),
        ({"mood": 1}, "mood"),
    ],
)
def test_what_is_wrong_is_named(tools_api: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = respond(tools_api, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_errors_before_and_behind_the_first_event(api: TestClient, fake: FakeClient) -> None:
    fake.answer = FastServeError("INVALID_ARG", "`max_tokens`: got 0; allowed: at least 1")
    answer = respond(api)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_output_tokens")
    fake.chunks = [Chunk([completion("a", None, (1,))], 3, None), FastServeError("INTERNAL", "lost")]
    last = events(respond(api, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["message"] == "lost"
