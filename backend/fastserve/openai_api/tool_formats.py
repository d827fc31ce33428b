"""How models write tool calls: read from a template, told to those that know none, forced."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolFormat:
    """The form of one family of models."""

    name: str
    marker: str
    """Stands before calls; a call may also begin the answer without it where `begins_bare`."""
    end: str = ""
    """Stands after each call."""
    begins_bare: bool = False
    arguments: str = "arguments"
    """The key of a call's arguments."""
    has_special_marker: bool = False
    """The marker is a special token, which is not shown unless asked for."""
    is_prompted: bool = False
    """The model's template takes no tools: they are described in the system message."""


MAX_FORCED_CALLS = 8
"""A small model that must call knows no end."""
HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
"""Hermes, Qwen and many others: JSON objects, each in tags."""
PROMPTED = ToolFormat("prompted", "<tool_call>", "</tool_call>", is_prompted=True)
"""The same form, asked for in the system message."""
LLAMA = ToolFormat(
    "llama3_json", "<|python_tag|>", begins_bare=True, arguments="parameters", has_special_marker=True
)
"""Llama 3: the answer is a JSON object, or several, with `;` between."""
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", begins_bare=False, has_special_marker=True)
"""Mistral: a JSON list after the marker, or `NAME[ARGS]{...}`."""


def tool_format_of(template: str | None) -> ToolFormat | None:
    """The form that a chat template writes; None where it takes tools in a form that is not known here."""
    if template is None or not re.search(r"\btools\b", template):
        return PROMPTED
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters": ' in template:
        return LLAMA
    return None


def forced_grammar(form: ToolFormat, functions: Sequence[Mapping[str, Any]], is_parallel: bool) -> str:
    """The Lark grammar, for llguidance, of one call of these functions, or of several (`is_parallel`).

    Each schema has a `%json` of its own, so that what it refers to stays in its root.
    """
    rules, names = [], []
    for index, function in enumerate(functions):
        head = '{"name": ' + json.dumps(function["name"]) + f', "{form.arguments}": '
        schema = function.get("parameters") or {"type": "object"}
        rules += [
            f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}",
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
        names.append(f"call_{index}")
    call = "one"
    rules.append(f"one: {' | '.join(names)}")
    if form.end:
        rules.append(f"tagged: {json.dumps(form.marker)} {_NEWLINE} one {_NEWLINE} {json.dumps(form.end)}")
        call, separator = "tagged", _NEWLINE
    else:
        separator = json.dumps(";")
    more = f"({separator} {call}){{0,{MAX_FORCED_CALLS - 1}}}"
    start = f"{call} {more}" if is_parallel else call
    return "\n".join([f"start: {start}", *rules])


_NEWLINE = json.dumps("\n")


def with_tools_in_prompt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The chat for a template that knows no tools: they, calls and results become text."""
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions, each given by its JSON schema:\n<tools>\n{listed}\n</tools>\n"
        "To call one, answer with\n"
        '<tool_call>\n{"name": FUNCTION, "arguments": OBJECT}\n</tool_call>'
    )
    if plain and plain[0].get("role") == "system" and isinstance(plain[0].get("content"), str):
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _is_call(call: object) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(map(_is_call, calls)) or not calls:
        return dict(message)  # the server's first step says what is wrong with them
    written = [
        f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, '
        f'"arguments": {call["function"].get("arguments") or "{}"}}}\n</tool_call>'
        for call in calls
    ]
    content = "\n".join(filter(None, [message.get("content"), *written]))
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}
