"""Tool calls in an answer's text, in each family's form and in any pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.openai_api.tool_call_parser import Arguments, Call, Content, ToolCallParser
from fastserve.openai_api.tool_formats import HERMES, LLAMA, MISTRAL, PROMPTED, ToolFormat, tool_format_of

Found = tuple[str, list[tuple[str, str]]]


def parsed(form: ToolFormat, pieces: list[str]) -> Found:
    """The text, and each call's name and arguments."""
    parser, text = ToolCallParser(form), ""
    calls: list[tuple[str, str]] = []
    for events in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        for event in events:
            match event:
                case Content(more):
                    text += more
                case Call(name):
                    calls.append((name, ""))
                case Arguments(more):
                    calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


CASES: list[tuple[ToolFormat, str, Found]] = [
    (
        HERMES,
        'A <b> c\n<tool_call>\n{"name": "f", "arguments": {"x": "}<"}}\n</tool_call>',
        ("A <b> c", [("f", '{"x": "}<"}')]),
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name":"g","arguments":{"a":[1]}}</tool_call>',
        ("", [("f", "{}"), ("g", '{"a":[1]}')]),
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", [("f", '{"a": 1}')])),
    (HERMES, '<tool_call>[{"name": "f", "arguments": "{}"}]</tool_call>', ("", [("f", "{}")])),
    (HERMES, "Only text, and a <tool", ("Only text, and a <tool", [])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut', ("", [("f", '{"a": "cut')])),
    (
        LLAMA,
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        ("", [("f", '{"a": 1}'), ("g", "{}")]),
    ),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', ("", [("f", "{}")])),
    (LLAMA, '{"city": "Paris"}', ('{"city": "Paris"}', [])),
    (LLAMA, 'Hello {"name": 1}', ('Hello {"name": 1}', [])),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        ("", [("f", '{"a": 1}'), ("g", "{}")]),
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": 2}',
        ("", [("f", '{"a": 1}'), ("g", '{"b": 2}')]),
    ),
]


@pytest.mark.parametrize(("form", "text", "found"), CASES)
def test_whole_and_letter_by_letter(form: ToolFormat, text: str, found: Found) -> None:
    assert parsed(form, [text]) == found
    assert parsed(form, list(text)) == found


@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL]),
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), min_size=1, max_size=3),
    st.data(),
)
def test_any_arguments_in_any_pieces(
    form: ToolFormat, arguments: list[dict[str, str]], data: st.DataObject
) -> None:
    calls = [json.dumps({"name": "f", form.arguments: each}, ensure_ascii=False) for each in arguments]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
        "llama3_json": ";".join(calls),
        "mistral": f"[TOOL_CALLS][{','.join(calls)}]",
    }[form.name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, made = parsed(form, pieces)
    assert found == ""
    assert [json.loads(each) for _, each in made] == arguments


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, PROMPTED),
        ("{{ messages }}", PROMPTED),
        ("{% if tools %}<tool_call>", HERMES),
        ("{% if tools %}[TOOL_CALLS]", MISTRAL),
        ('{% if tools %}{"name": f, "parameters": x}', LLAMA),
        ("{% if tools %}<function=", None),
    ],
)
def test_the_form_is_read_from_the_template(template: str | None, form: ToolFormat | None) -> None:
    assert tool_format_of(template) is form
