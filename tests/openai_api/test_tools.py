"""Tools of a chat: what the model is told, and calls in the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient, completion
from tests.openai_api.test_answers import events
from tests.openai_api.test_requests import chat

from fastserve.openai_api.app import create_app
from fastserve.openai_api.tool_formats import HERMES, LLAMA, MISTRAL, PROMPTED, ToolFormat
from fastserve_client import Chunk, Generation

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g"}}
NAMED = {"type": "function", "function": {"name": "f"}}
CALLS = 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' * 2


@pytest.fixture(params=[HERMES])
def tool_api(request: pytest.FixtureRequest, fake: FakeClient) -> Iterator[TestClient]:
    with TestClient(create_app(lambda: fake, MODEL, request.param), raise_server_exceptions=False) as client:
        yield client


def test_calls_of_an_answer(tool_api: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion(CALLS, "stop")], 3, None)
    [choice] = chat(tool_api, tools=[TOOL]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well.Well."
    called = [call["function"] for call in choice["message"]["tool_calls"]]
    assert called == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    assert fake.calls[0]["tools"][0]["function"]["name"] == "f"
    [choice] = chat(tool_api, tools=[TOOL], parallel_tool_calls=False).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_calls_of_a_stream_come_in_pieces(tool_api: TestClient, fake: FakeClient) -> None:
    pieces = [CALLS[place : place + 5] for place in range(0, len(CALLS), 5)]
    fake.chunks = [Chunk([completion(piece, None)], 3, None) for piece in pieces]
    fake.chunks.append(Chunk([completion("", "stop")], 3, None))
    choices = [each["choices"][0] for each in events(chat(tool_api, tools=[TOOL], stream=True))]
    parts = [part for choice in choices for part in choice["delta"].get("tool_calls", [])]
    begun = [(part["index"], part["function"]["name"]) for part in parts if "id" in part]
    assert begun == [(0, "f"), (1, "f")]
    for index in (0, 1):
        text = "".join(part["function"]["arguments"] for part in parts if part["index"] == index)
        assert json.loads(text) == {"a": 1}
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("tool_api", [HERMES, LLAMA, MISTRAL, PROMPTED], indirect=True)
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_is_guided(tool_api: TestClient, fake: FakeClient, choice: Any) -> None:
    from llguidance import LLMatcher

    fake.answer = Generation([completion("", "stop")], 3, None)
    assert chat(tool_api, tools=[TOOL, OTHER], tool_choice=choice).status_code == 200
    grammar = fake.calls[0]["structured_outputs"]["grammar"]
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar))
    assert ('\\"g\\"' in grammar) == (choice == "required")


@pytest.mark.parametrize("tool_api", [HERMES, LLAMA, MISTRAL, PROMPTED], indirect=True)
def test_what_is_forced_is_a_call_in_every_form(
    tool_api: TestClient, fake: FakeClient, request: pytest.FixtureRequest
) -> None:
    """The grammar of a form that ends no call has no marker before the first one either."""
    form: ToolFormat = request.node.callspec.params["tool_api"]
    call = json.dumps({"name": "f", form.arguments: {"a": 1}})
    text = f"{form.marker}\n{call}\n{form.end}" if form.end else call
    fake.answer = Generation([completion(text, "stop")], 3, None)
    [choice] = chat(tool_api, tools=[TOOL], tool_choice="required").json()["choices"]
    [made] = choice["message"]["tool_calls"]
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("f", {"a": 1})
    assert choice["message"]["content"] is None


def test_without_a_choice_nothing_is_shown(tool_api: TestClient, fake: FakeClient) -> None:
    fake.answer = Generation([completion(CALLS, "stop")], 3, None)
    [choice] = chat(tool_api, tools=[TOOL], tool_choice="none").json()["choices"]
    assert "tools" not in fake.calls[0]
    assert choice["message"]["content"] == CALLS


@pytest.mark.parametrize("tool_api", [PROMPTED], indirect=True)
def test_a_template_without_tools_is_told_of_them(tool_api: TestClient, fake: FakeClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    chat(tool_api, tools=[TOOL], messages=history)
    sent = fake.calls[0]
    assert "tools" not in sent
    system, called, result = sent["messages"]
    assert system["content"].startswith("Be brief.")
    assert '"name": "f"' in system["content"]
    assert called == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\n42\n</tool_response>"}


@pytest.mark.parametrize("tool_api", [HERMES, None], indirect=True)
def test_what_is_wrong_is_named(
    tool_api: TestClient, fake: FakeClient, request: pytest.FixtureRequest
) -> None:
    form: ToolFormat | None = request.node.callspec.params["tool_api"]
    cases: list[tuple[dict[str, Any], str]] = [({"tools": [TOOL]}, "tools")]
    if form is not None:
        cases = [
            ({"tools": [OTHER], "tool_choice": NAMED}, "tool_choice"),
            ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tools": [TOOL | {"type": "x"}]}, "tools[0].type"),
            (
                {"tools": [TOOL], "tool_choice": NAMED, "response_format": {"type": "json_object"}},
                "tool_choice",
            ),
        ]
    for fields, param in cases:
        answer = chat(tool_api, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert fake.calls == []


@pytest.mark.parametrize("tool_api", [PROMPTED], indirect=True)
@pytest.mark.parametrize("calls", [[{}], [{"function": {}}], ["f"], "f"])
def test_malformed_calls_are_left_for_the_server_to_refuse(
    tool_api: TestClient, fake: FakeClient, calls: Any
) -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": calls}
    assert chat(tool_api, messages=[message], tools=[TOOL]).status_code == 200
    assert message in fake.calls[0]["messages"]
