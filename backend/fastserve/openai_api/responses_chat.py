"""OpenAI's Responses API: bodies of `/v1/responses`, made into those of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from fastserve.openai_api.chat_completions import ChatRequest
from fastserve.openai_api.chat_tools import Function, Tool
from fastserve.openai_api.errors import refusal
from fastserve.openai_api.generation_fields import JsonSchema, ResponseFormat

NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
}
"""What these clients call a field, by the name that chats have for it."""
LOGPROBS = "message.output_text.logprobs"
TEXT_PARTS = ("input_text", "output_text", "text")
ITEMS = ("message", "function_call", "function_call_output")


class ResponseTool(Struct, forbid_unknown_fields=True, kw_only=True):
    """`tools[]`."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    """`text.format`."""

    type: str = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Text(Struct, forbid_unknown_fields=True, kw_only=True):
    """`text`."""

    format: TextFormat | None = None


class Reasoning(Struct, forbid_unknown_fields=True, kw_only=True):
    """`reasoning`."""

    effort: str | None = None
    """A variable of the template, as `reasoning_effort` of a chat."""
    summary: str | None = None
    """Without effect: nothing is summarized."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_obfuscation: bool = False
    """Without effect, as for chats."""


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `/v1/responses`."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: Text | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    user: str | None = None
    tenant: str | None = None
    priority: int | None = None
    deadline_ms: float | None = None
    # Without effect, as for chats.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    """Without effect: it bounds calls of tools that OpenAI runs, and there are none."""

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer is to have log-probabilities."""
        return LOGPROBS in (self.include or [])


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request in the form of a chat. Raises ApiError."""
    _check_stateless(body)
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    return ChatRequest(
        model=body.model,
        messages=system + _messages(body.input),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=body.has_logprobs or None,
        top_logprobs=body.top_logprobs,
        response_format=_response_format(body.text),
        tools=[_tool(place, tool) for place, tool in enumerate(body.tools or [])] or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        user=body.user,
        tenant=body.tenant,
        priority=body.priority,
        deadline_ms=body.deadline_ms,
    )


def _check_stateless(body: ResponsesRequest) -> None:
    """Nothing is kept of an answer once it is given."""
    if body.store:
        raise refusal("store", "got true; allowed: false, as nothing is stored")
    if body.background:
        raise refusal("background", "got true; allowed: false, as nothing is stored")
    if body.previous_response_id is not None:
        raise refusal(
            "previous_response_id", "got one; allowed: none, as nothing is stored: send the items in `input`"
        )
    if body.truncation not in (None, "disabled"):
        raise refusal("truncation", f"got {body.truncation!r}; allowed: 'disabled'")
    for place, each in enumerate(body.include or []):
        if each not in (
            LOGPROBS,
            "reasoning.encrypted_content",
        ):  # the latter adds to items that there are none of
            raise refusal(f"include[{place}]", f"got {each!r}; allowed: {LOGPROBS!r}")


def _response_format(text: Text | None) -> ResponseFormat | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    form = text.format
    if form.type not in ("json_object", "json_schema"):
        raise refusal("text.format.type", f"got {form.type!r}; allowed: text, json_object, json_schema")
    is_schema = form.type == "json_schema"
    if is_schema and form.schema is None:
        raise refusal("text.format.schema", "missing, but required")
    return ResponseFormat(form.type, JsonSchema(form.name, form.schema) if is_schema else None)


def _tool(place: int, tool: ResponseTool) -> Tool:
    if tool.type != "function":
        raise refusal(
            f"tools[{place}].type", f"got {tool.type!r}; allowed: 'function', as nothing runs tools here"
        )
    if not tool.name:
        raise refusal(f"tools[{place}].name", "missing, but required")
    return Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))


def _tool_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise refusal("tool_choice.type", f"got {choice.get('type')!r}; allowed: 'function'")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _messages(items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        path, kind = f"input[{place}]", item.get("type", "message")
        if kind == "message":
            messages.append(_message(path, item))
        elif kind == "function_call":
            _add_call(messages, path, item)
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": _name(path, "call_id", item)}
            messages.append(result | {"content": _text_of(f"{path}.output", item.get("output"))})
        else:
            raise refusal(f"{path}.type", f"got {kind!r}; allowed: {', '.join(ITEMS)}")
    return messages


def _message(path: str, item: Mapping[str, Any]) -> dict[str, Any]:
    for key in item:
        if key not in ("type", "role", "content", "id", "status", "phase"):
            raise refusal(f"{path}.{key}", "unknown field")
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise refusal(f"{path}.role", f"got {role!r}; allowed: user, assistant, system, developer")
    return {"role": role, "content": _text_of(f"{path}.content", item.get("content"))}


def _add_call(messages: list[dict[str, Any]], path: str, item: Mapping[str, Any]) -> None:
    """A call belongs to the assistant's message before it, as chats have it."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": _name(path, "name", item), "arguments": _name(path, "arguments", item)}
    call = {"id": _name(path, "call_id", item), "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _text_of(path: str, content: object) -> str:
    """A text, or parts of text, joined as the parts of a chat's message are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal(path, f"got {content!r:.80}; allowed: text, or a list of parts of text")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise refusal(
                f"{path}[{place}].type", f"got {kind!r}; allowed: {', '.join(TEXT_PARTS)}, with a `text`"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _name(path: str, key: str, item: Mapping[str, Any]) -> str:
    if not isinstance(item.get(key), str):
        raise refusal(f"{path}.{key}", f"got {item.get(key)!r:.80}; allowed: text")
    return str(item[key])
