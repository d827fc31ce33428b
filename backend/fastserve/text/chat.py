"""A chat as a client sends it: messages, tools, and what a model's chat template can be told besides.

Nothing of a client's text may be lost on its way to the model: what is unknown, and what the model's template
would drop, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from fastserve.errors import RequestError, invalid
from fastserve.text.validation import coerce, decode_json, unknown_name

CHAT_OPTIONS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
"""Options that may come beside `messages`, among the sampling parameters or as request parameters."""

_MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Three names of one thing: transformers gives a template each of them."""
_EMPTY_KEYS = ("annotations", "audio", "function_call", "refusal")
"""OpenAI's client writes them into every answer, empty."""
_RESERVED_VARIABLES = frozenset(
    ["messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"]
    + [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
)
"""Template variables that FastServe and transformers fill in."""


@dataclass(frozen=True)
class TemplateNames:
    """The names in a chat template: what it does not mention, it would drop without a word."""

    variables: frozenset[str]
    """Variables that it takes from outside, such as `messages`, `tools`, `enable_thinking`."""
    members: frozenset[str]
    """Names that it may look up in a message: its attributes and strings."""


@cache
def template_names(source: str) -> TemplateNames:
    """The names in a template. Raises RequestError if it cannot be read."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    try:
        tree = environment.parse(source)
    except TemplateError as error:
        raise RequestError(f"`messages`: the model's chat template cannot be read: {error}") from error
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateNames(frozenset(meta.find_undeclared_variables(tree)), frozenset(attributes | texts))


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, with which transformers marks an assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class Chat:
    """A chat that a template can be given."""

    messages: list[dict[str, Any]]
    """Each with a `role`, and a `content` that is text; the arguments of tool calls are objects."""
    tools: list[Any] | None = None
    """Each a JSON object."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    add_generation_prompt: bool = True
    """End where the assistant's answer begins."""
    continue_final_message: bool = False
    """End within the last message, which the answer continues."""


def parse_chat(
    messages: object, options: Mapping[str, Any], names_for: Callable[[Any], TemplateNames]
) -> Chat:
    """The chat of these `messages` (decoded JSON) and CHAT_OPTIONS, each as itself or as a string.

    `names_for`: the names in the template that is taken with such tools. Raises RequestError.
    """
    tools = _parse_tools(options.get("tools"))
    names = names_for(tools)
    if tools is not None and "tools" not in names.variables:
        raise RequestError("`tools`: got some; allowed: none, as the model's chat template does not use them")
    continues = _flag("continue_final_message", options, False)
    adds_prompt = _flag("add_generation_prompt", options, not continues)
    if continues and adds_prompt:
        raise invalid("add_generation_prompt", True, "false where `continue_final_message` is true")
    return Chat(
        messages=_parse_messages(messages, names),
        tools=tools,
        template_kwargs=_parse_template_kwargs(options.get("chat_template_kwargs"), names),
        add_generation_prompt=adds_prompt,
        continue_final_message=continues,
    )


def _flag(name: str, options: Mapping[str, Any], default: bool) -> bool:
    value = options.get(name)
    return default if value is None else coerce(name, value, bool)


def _parse_template_kwargs(value: object, names: TemplateNames) -> dict[str, Any]:
    name = "chat_template_kwargs"
    if value is None:
        return {}
    variables = decode_json(name, value)
    if not isinstance(variables, Mapping):
        raise invalid(name, variables, "an object")
    allowed = names.variables - _RESERVED_VARIABLES
    for key in variables:
        if key not in allowed:
            raise unknown_name("variable of the model's chat template", key, allowed, f"{name}.")
    return dict(variables)


def _parse_tools(value: object) -> list[Any] | None:
    if value is None:
        return None
    tools = decode_json("tools", value)
    if not isinstance(tools, list | tuple):
        raise invalid("tools", tools, "a list of tools")
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise invalid(path, tool, 'an object with "type": "function" and a `function`')
        _check_function(f"{path}.function", tool.get("function"))
    return [dict(tool) for tool in tools] or None


def _check_function(path: str, function: object) -> None:
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid(path, function, "an object with a `name`, a `description` and `parameters`")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise invalid(f"{path}.parameters", function["parameters"], "a JSON schema: an object")


def _parse_messages(messages: object, names: TemplateNames) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise invalid(
            "messages", messages, "a JSON list of one or more objects, each with a `role` and a `content`"
        )
    return [_parse_message(f"messages[{index}]", message, names) for index, message in enumerate(messages)]


def _parse_message(path: str, message: object, names: TemplateNames) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise invalid(path, message, "an object with a `role` and a `content`")
    for key, value in message.items():
        _check_key(path, message, key, value, names)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{path}.role", role, "text, such as system, user, assistant, tool")
    parsed = {key: value for key, value in message.items() if value is not None and key in _MESSAGE_KEYS}
    if "tool_calls" in parsed:
        parsed["tool_calls"] = _parse_tool_calls(f"{path}.tool_calls", parsed["tool_calls"])
    parsed["content"] = _parse_content(f"{path}.content", message.get("content"), parsed)
    for key in ("name", "tool_call_id", *_REASONING_KEYS):
        if not isinstance(parsed.get(key, ""), str):
            raise invalid(f"{path}.{key}", parsed[key], "text")
    return parsed


def _check_key(path: str, message: Mapping[str, Any], key: str, value: object, names: TemplateNames) -> None:
    """Raises RequestError for a key that nobody knows, and for one whose value the template would drop."""
    if key in _EMPTY_KEYS:
        if value not in (None, [], {}, ""):
            raise invalid(f"{path}.{key}", value, "null")
    elif key not in _MESSAGE_KEYS:
        raise unknown_name("key of a message", key, _MESSAGE_KEYS, f"{path}.")
    elif key == "tool_call_id" or (key == "name" and message.get("role") == "tool"):
        return  # which call a result belongs to; many templates go by the order
    elif value and key not in ("role", "content"):
        aliases = _REASONING_KEYS if key in _REASONING_KEYS else (key,)
        if not names.members.intersection(aliases):
            raise invalid(f"{path}.{key}", value, "not given, as the model's chat template does not use it")


def _parse_content(path: str, content: object, message: Mapping[str, Any]) -> str:
    """The text of a message. Parts are joined by line breaks, as vLLM joins them."""
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise invalid(path, content, "text, or a list of parts of text")
    return "\n".join(_part_text(f"{path}[{index}]", part) for index, part in enumerate(content))


def _part_text(path: str, part: object) -> str:
    if not isinstance(part, Mapping):
        raise invalid(path, part, 'an object: {"type": "text", "text": ...}')
    if part.get("type") != "text":
        raise invalid(f"{path}.type", part.get("type"), "'text'")
    for key in part:
        if key not in ("type", "text"):
            raise unknown_name("key of a part", key, ("type", "text"), f"{path}.")
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"{path}.text", text, "text")
    return text


def _parse_tool_calls(path: str, calls: object) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as templates expect them; OpenAI's API has them as text."""
    if not isinstance(calls, list | tuple):
        raise invalid(path, calls, "a list of tool calls")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise invalid(f"{path}[{index}]", call, "an object with a `function` that has a `name`")
        at = f"{path}[{index}].function.arguments"
        arguments = decode_json(at, function.get("arguments") or {})
        if not isinstance(arguments, Mapping):
            raise invalid(at, arguments, "a JSON object, or a string of one")
        parsed.append({**call, "function": {**function, "arguments": dict(arguments)}})
    return parsed
