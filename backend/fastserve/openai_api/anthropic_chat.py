"""Anthropic's form of a chat: bodies of `/v1/messages`, made into those of `/v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from fastserve.openai_api.chat_completions import ChatRequest
from fastserve.openai_api.chat_tools import Function, Tool
from fastserve.openai_api.errors import refusal
from fastserve.openai_api.generation_fields import JsonSchema, ResponseFormat

NAMES = {
    "stop": "stop_sequences",
    "tenant": "metadata.user_id",
    "user": "metadata.user_id",
    "timeout": "deadline_ms",
    "max_completion_tokens": "max_tokens",
    "structured_outputs.json": "output_config.format.schema",
    "structured_outputs": "output_config.format",
    "chat_template_kwargs.reasoning_effort": "output_config.effort",
}
"""What these clients call a field, by OpenAI's name or FastServe's."""
WITHOUT_EFFECT = ("cache_control", "citations", "caller")
"""Keys of a block: prefixes are cached for all, nothing is cited, and the model alone calls."""
Block = Mapping[str, Any]


class AnthropicTool(Struct, forbid_unknown_fields=True, kw_only=True):
    """`tools[]`."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str = "custom"
    cache_control: dict[str, Any] | None = None
    """Without effect."""


class Metadata(Struct, forbid_unknown_fields=True):
    """`metadata`."""

    user_id: str | None = None
    """The tenant, as OpenAI's `user`."""


class OutputFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """`output_config.format`."""

    type: str
    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: str | None = None
    """A variable of the template, as `reasoning_effort` of a chat."""


class MessagesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `/v1/messages`; `/v1/messages/count_tokens` needs no `max_tokens`."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | UnsetType = UNSET
    system: str | list[dict[str, Any]] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    metadata: Metadata | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig = OutputConfig()
    cache_control: dict[str, Any] | None = None
    """Without effect, as in blocks."""
    service_tier: str | None = None
    """Without effect: there is one tier."""
    priority: int | None = None
    tenant: str | None = None
    deadline_ms: float | None = None


def as_chat(body: MessagesRequest) -> ChatRequest:
    """The same chat in OpenAI's form. Raises ApiError."""
    if (body.thinking or {"type": "disabled"}).get("type") != "disabled":
        raise refusal("thinking.type", f"got {body.thinking!r:.80}; allowed: 'disabled'")
    choice, is_parallel = _tool_choice(body.tool_choice)
    system = [] if body.system is None else [{"role": "system", "content": _text_of("system", body.system)}]
    messages = [each for place, message in enumerate(body.messages) for each in _messages(place, message)]
    return ChatRequest(
        model=body.model,
        messages=system + messages,
        max_tokens=None if body.max_tokens is UNSET else body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences or None,
        tools=[_tool(place, tool) for place, tool in enumerate(body.tools or [])] or None,
        tool_choice=choice,
        response_format=_response_format(body.output_config.format),
        reasoning_effort=body.output_config.effort,
        parallel_tool_calls=is_parallel,
        user=None if body.metadata is None else body.metadata.user_id,
        tenant=body.tenant,
        priority=body.priority,
        deadline_ms=body.deadline_ms,
    )


def _response_format(form: OutputFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    if form.type != "json_schema":
        raise refusal("output_config.format.type", f"got {form.type!r}; allowed: 'json_schema'")
    return ResponseFormat("json_schema", JsonSchema("answer", form.schema))


def _tool(place: int, tool: AnthropicTool) -> Tool:
    if tool.type != "custom":
        raise refusal(
            f"tools[{place}].type", f"got {tool.type!r}; allowed: 'custom', as nothing runs tools here"
        )
    return Tool("function", Function(tool.name, tool.description, tool.input_schema))


def _tool_choice(choice: Mapping[str, Any] | None) -> tuple[Any, bool | None]:
    """OpenAI's `tool_choice` and `parallel_tool_calls`."""
    if choice is None:
        return None, None
    kind = choice.get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise refusal("tool_choice.type", f"got {kind!r}; allowed: auto, any, tool, none")
    is_parallel = False if choice.get("disable_parallel_tool_use") else None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, is_parallel
    return {"any": "required"}.get(kind, kind), is_parallel


def _messages(place: int, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One of Anthropic's messages is several of OpenAI's: each result of a tool is one."""
    path, role, content = f"messages[{place}]", message.get("role"), message.get("content")
    for key in message:
        if key not in ("role", "content"):
            raise refusal(f"{path}.{key}", "unknown field")
    if role not in ("user", "assistant"):
        raise refusal(f"{path}.role", f"got {role!r}; allowed: user, assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise refusal(f"{path}.content", f"got {content!r:.80}; allowed: text, or a list of blocks")
    kinds = {"text": _text} | ({"tool_result": _result} if role == "user" else {"tool_use": _call})
    parts = [_part(f"{path}.content[{index}]", block, kinds) for index, block in enumerate(content)]
    texts = [part for part in parts if isinstance(part, str)]
    others = [part for part in parts if not isinstance(part, str)]
    if role == "user":
        return others + ([{"role": role, "content": "\n".join(texts)}] if texts or not others else [])
    calls = {"tool_calls": others} if others else {}
    return [{"role": role, "content": "\n".join(texts)} | calls]


def _part(path: str, block: object, kinds: Mapping[str, Callable[[str, Block], Any]]) -> Any:
    kind = block.get("type") if isinstance(block, Mapping) else None
    read = kinds.get(kind) if isinstance(kind, str) else None
    if not isinstance(block, Mapping) or read is None:
        raise refusal(f"{path}.type", f"got {kind!r}; allowed here: {', '.join(kinds)}")
    return read(path, block)


def _text(path: str, block: Block) -> str:
    _check_keys(path, block, ("text",))
    text = block.get("text")
    if not isinstance(text, str):
        raise refusal(f"{path}.text", f"got {text!r:.80}; allowed: text")
    return text


def _result(path: str, block: Block) -> dict[str, Any]:
    """The result of a call. The templates know no flag of an error: the text has to say it."""
    _check_keys(path, block, ("tool_use_id", "content", "is_error"))
    content = _text_of(f"{path}.content", block.get("content") or "")
    return {"role": "tool", "tool_call_id": _name(path, "tool_use_id", block), "content": content}


def _call(path: str, block: Block) -> dict[str, Any]:
    _check_keys(path, block, ("id", "name", "input"))
    if not isinstance(block.get("input"), Mapping):
        raise refusal(f"{path}.input", f"got {block.get('input')!r:.80}; allowed: an object")
    function = {
        "name": _name(path, "name", block),
        "arguments": json.dumps(block["input"], ensure_ascii=False),
    }
    return {"id": _name(path, "id", block), "type": "function", "function": function}


def _text_of(path: str, content: object) -> str:
    """A text, or blocks of text, joined as the parts of a chat's message are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal(path, f"got {content!r:.80}; allowed: text, or a list of blocks of text")
    return "\n".join(_part(f"{path}[{index}]", block, {"text": _text}) for index, block in enumerate(content))


def _name(path: str, key: str, block: Block) -> str:
    if not isinstance(block.get(key), str):
        raise refusal(f"{path}.{key}", f"got {block.get(key)!r:.80}; allowed: text")
    return str(block[key])


def _check_keys(path: str, block: Block, known: tuple[str, ...]) -> None:
    for key in block:
        if key not in ("type", *known, *WITHOUT_EFFECT):
            raise refusal(f"{path}.{key}", f"unknown field; there are {', '.join(known)}")


def as_input(arguments: str) -> Any:
    """The arguments of a call as an object; as text where the model wrote no JSON."""
    try:
        return msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {"arguments": arguments}
