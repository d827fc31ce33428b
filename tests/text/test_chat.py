"""Chats: nothing that a client says is lost on the way to the model, and what would be is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.config import Config
from fastserve.errors import RequestError
from fastserve.text.input_processor import InputProcessor
from fastserve.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.reasoning_content %}<{{ message.reasoning_content }}>{% endif %}"
    "{% generation %}{{ message.content }}{% endgeneration %}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}<>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "hello"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture
def input_processor(save_tokenizer: Callable[..., Path]) -> InputProcessor:
    """For a model whose template knows tools, reasoning and a variable."""
    tokenizer = Tokenizer(save_tokenizer(chat_template=TEMPLATE))
    return InputProcessor(Config(), tokenizer, 512, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> InputProcessor:
    """For a model whose template writes role and content, and nothing else."""
    return InputProcessor(Config(), tokenizer, 512, tokenizer.vocab_size)


def prompt(input_processor: InputProcessor, messages: list[Any], **options: Any) -> str:
    inputs = {"messages": json.dumps(messages), "sampling_parameters": json.dumps(options)}
    return input_processor.check_guide(input_processor.parse(inputs, {}, now=0.0)).prompt


def refusal(input_processor: InputProcessor, messages: Any, **options: Any) -> str:
    with pytest.raises(RequestError) as raised:
        prompt(input_processor, messages, **options)
    return str(raised.value)


def test_parts_of_text_are_joined(plain: InputProcessor) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt(plain, [{"role": "user", "content": parts}]) == prompt(
        plain, [{"role": "user", "content": "one\ntwo"}]
    )


def test_what_openais_client_writes_into_an_answer_is_taken(plain: InputProcessor) -> None:
    answer = {"role": "assistant", "content": "hi"}
    empty = dict.fromkeys(["refusal", "audio", "function_call", "tool_calls", "name"])
    assert prompt(plain, [USER, answer | empty | {"annotations": []}]) == prompt(plain, [USER, answer])


@pytest.mark.parametrize(
    ("message", "place", "allowed"),
    [
        ("hello", "messages[1]", "an object with a `role`"),
        ({"content": "a"}, "messages[1].role", "text"),
        ({"role": 5, "content": "a"}, "messages[1].role", "text"),
        ({"role": "", "content": "a"}, "messages[1].role", "text"),
        ({"role": "user"}, "messages[1].content", "text, or a list of parts"),
        ({"role": "user", "content": None}, "messages[1].content", "text, or a list of parts"),
        ({"role": "user", "content": 5}, "messages[1].content", "text, or a list of parts"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]", '"type": "text"'),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[1].content[0].type", "'text'"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0].type",
            "'text'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text", "text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "txt": "b"}]},
            "messages[1].content[0].txt",
            "text, type",
        ),
        ({"role": "user", "contnet": "a"}, "messages[1].contnet", "did you mean `content`?"),
        ({"role": "user", "content": "a", "weight": 1}, "messages[1].weight", "tool_call_id, tool_calls"),
        ({"role": "user", "content": "a", "audio": {"id": "x"}}, "messages[1].audio", "null"),
        ({"role": "user", "content": "a", "name": "Ann"}, "messages[1].name", "does not use it"),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            "messages[1].reasoning_content",
            "does not use it",
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[1].tool_calls", "does not use it"),
        ({"role": "tool", "content": "a", "tool_call_id": 1}, "messages[1].tool_call_id", "text"),
    ],
    ids=str,
)
def test_messages_that_are_refused(plain: InputProcessor, message: Any, place: str, allowed: str) -> None:
    said = refusal(plain, [USER, message])
    assert said.startswith(f"`{place}`: ")
    assert allowed in said
    assert len(said) < 1000


def test_tools_and_their_calls(input_processor: InputProcessor) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "1", "name": "add"},
    ]
    said = prompt(input_processor, messages, tools=[TOOL])
    assert said.startswith("[tools]" + json.dumps([TOOL]))
    assert said.endswith('[user]hello[assistant]add({"a": 1})[tool]1[assistant]')


@pytest.mark.parametrize(
    ("options", "place", "allowed"),
    [
        ({"tools": {}}, "tools", "a list of tools"),
        ({"tools": [1]}, "tools[0]", '"type": "function"'),
        ({"tools": [{"name": "add"}]}, "tools[0]", '"type": "function"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "a `name`"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
            "tools[0].function.parameters",
            "a JSON schema",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
        (
            {"chat_template_kwargs": {"enable_thinkin": 1}},
            "chat_template_kwargs.enable_thinkin",
            "did you mean `enable_thinking`?",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "enable_thinking"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "enable_thinking"),
        ({"add_generation_prompt": "maybe"}, "add_generation_prompt", "true or false"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
            "false where `continue_final_message` is true",
        ),
    ],
    ids=str,
)
def test_options_that_are_refused(
    input_processor: InputProcessor, options: dict[str, Any], place: str, allowed: str
) -> None:
    said = refusal(input_processor, [USER], **options)
    assert said.startswith(f"`{place}`: ")
    assert allowed in said


@pytest.mark.parametrize("arguments", ["[1]", "{", 5])
def test_arguments_of_a_call_that_are_refused(input_processor: InputProcessor, arguments: Any) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    said = refusal(input_processor, [USER, {"role": "assistant", "tool_calls": [call]}])
    assert said.startswith("`messages[1].tool_calls[0].function.arguments`: ")


def test_tools_of_a_template_that_knows_none(plain: InputProcessor) -> None:
    assert "does not use them" in refusal(plain, [USER], tools=[TOOL])


def test_variables_of_the_template(input_processor: InputProcessor) -> None:
    assert prompt(input_processor, [USER]) == "[user]hello[assistant]"
    said = prompt(input_processor, [USER], chat_template_kwargs={"enable_thinking": False})
    assert said == "[user]hello[assistant]<>"


def test_reasoning(input_processor: InputProcessor) -> None:
    answer = {"role": "assistant", "content": "4", "reasoning": "2 + 2"}
    assert prompt(input_processor, [answer]) == "[assistant]<2 + 2>4[assistant]"


def test_the_last_message_goes_on(input_processor: InputProcessor) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer "}]
    assert (
        prompt(input_processor, messages, continue_final_message=True) == "[user]hello[assistant]The answer "
    )
    assert prompt(input_processor, messages, add_generation_prompt=False).endswith("The answer ")


def test_options_as_request_parameters(input_processor: InputProcessor) -> None:
    request = input_processor.check_guide(
        input_processor.parse(
            {"messages": [USER]},
            {
                "tools": json.dumps([TOOL]),
                "chat_template_kwargs": '{"enable_thinking": false}',
                "add_generation_prompt": "true",
                "continue_final_message": "false",
            },
            now=0.0,
        )
    )
    assert request.prompt == f"[tools]{json.dumps([TOOL])}[user]hello[assistant]<>"


@pytest.mark.parametrize(
    "name", ["tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"]
)
def test_options_without_a_chat_are_refused(input_processor: InputProcessor, name: str) -> None:
    with pytest.raises(RequestError, match=f"`{name}`: .*only beside `messages`"):
        input_processor.check_guide(input_processor.parse({"text_input": "a"}, {name: "[]"}, now=0.0))


KEYS = st.sampled_from(
    ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "refusal", "type", "text"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["text", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_any_chat_is_served_or_refused_by_name(input_processor: InputProcessor) -> None:
    @settings(max_examples=300, deadline=None)
    @given(
        messages=st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=3),
        tools=VALUES,
        variables=VALUES,
    )
    def check(messages: list[Any], tools: Any, variables: Any) -> None:
        options = {"tools": tools, "chat_template_kwargs": variables}
        refused = ""
        try:
            input_processor.check_guide(
                input_processor.parse({"messages": messages, "sampling_parameters": options}, {}, now=0.0)
            )
        except RequestError as error:
            refused = str(error)
        assert refused.startswith(("`messages", "`tools", "`chat_template_kwargs")) or not refused

    check()
