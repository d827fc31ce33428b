"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api import sse
from fastserve.openai_api.anthropic_chat import NAMES, MessagesRequest, as_chat, as_input
from fastserve.openai_api.body import read_body
from fastserve.openai_api.chat_completions import chat_options
from fastserve.openai_api.chat_tools import ChatTools
from fastserve.openai_api.errors import refusal, server_refusal
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.http_answers import event_stream, json_response, until_gone
from fastserve.openai_api.stop_sequences import StopSequences
from fastserve.openai_api.tokenization import CHAT_FIELDS, tokenized
from fastserve.openai_api.usage import Usage
from fastserve_client import Chunk, Completion, FastServeError, Generation


async def messages(request: Request) -> Response:
    """Answers a chat. Raises ApiError."""
    door: FrontDoor = request.app.state.door
    body = await read_body(request, MessagesRequest)
    if body.max_tokens is UNSET:
        raise refusal("max_tokens", "missing, but required")
    options, tools = _call_of(request, body)
    answer = _Message(body, tools)
    options["request_id"] = answer.id
    headers = {"request-id": answer.id}
    try:
        if body.stream:
            return await event_stream(request, answer.events(door, options), headers)
        whole = await until_gone(request, door.client.generate(**options))
    except FastServeError as error:
        raise server_refusal(error, NAMES) from error
    return json_response(answer.json(whole), headers=headers)


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a chat has. Raises ApiError."""
    body = await read_body(request, MessagesRequest)
    options, _ = _call_of(request, body)
    chat = {name: options[name] for name in CHAT_FIELDS if name in options}
    ids = await tokenized(
        request.app.state.door, lambda tokenizer: tokenizer.chat_token_ids(options["messages"], chat, False)
    )
    return json_response({"input_tokens": len(ids)})


def _call_of(request: Request, body: MessagesRequest) -> tuple[dict[str, Any], ChatTools]:
    """The options of the client's call, and the tools. Raises ApiError."""
    door: FrontDoor = request.app.state.door
    door.check_model(body.model)
    chat = as_chat(body)
    options = chat_options(chat, request.headers, door.has_keys)
    tools = ChatTools(door.tool_format, chat.tools, chat.tool_choice, chat.parallel_tool_calls is not False)
    tools.add_to(options)
    if body.stop_sequences:
        options["include_stop_str_in_output"] = True
    return options, tools


class _Message:
    """The answer to one request, whole or in events: blocks of text and of calls."""

    def __init__(self, body: MessagesRequest, tools: ChatTools) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = body.model
        self._calls = tools.new_calls()
        self._stops = StopSequences(body.stop_sequences or [])
        self._index = -1
        self._is_open = False
        self._usage = Usage()

    def json(self, answer: Generation) -> dict[str, Any]:
        """The whole answer."""
        [completion] = answer.completions
        text = self._stops.push(completion.text, True, completion.finish_reason == "stop")
        message: dict[str, Any] = {"content": text} if self._calls is None else self._calls.message(text)
        content: list[dict[str, Any]] = [_text_block(message["content"])] if message["content"] else []
        for call in message.get("tool_calls", []):
            function = call["function"]
            content.append(_call_block(call["id"], function["name"], as_input(function["arguments"])))
        self._usage.add(answer)
        return self._object(content, _usage(self._usage)) | self._stop(completion)

    async def events(self, door: FrontDoor, options: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first event raises FastServeError; later errors are the last event."""
        has_begun = False
        stream = door.client.stream(**options)
        try:
            async for chunk in stream:
                if not has_begun:
                    has_begun = True
                    begun = Usage()  # what the cache had of the prompt is told with the last chunk
                    begun.add(chunk)
                    yield _event("message_start", message=self._object([], _usage(begun)))
                    yield _event("ping")
                for event in self._chunk_events(chunk):
                    yield event
            yield _event("message_stop")
        except FastServeError as error:
            if not has_begun:
                raise
            yield _event("error", error=server_refusal(error, NAMES).anthropic_error)
        finally:
            await stream.close()

    def _chunk_events(self, chunk: Chunk) -> list[bytes]:
        [completion] = chunk.completions
        self._usage.add(chunk)
        is_last = completion.finish_reason is not None
        text = self._stops.push(completion.text, is_last, completion.finish_reason == "stop")
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        if self._calls is not None:
            deltas = self._calls.deltas(text, is_last)
        events = [event for delta in deltas for event in self._delta_events(delta)]
        if is_last:
            usage = _usage(self._usage)
            events += [*self._close(), _event("message_delta", delta=self._stop(completion), usage=usage)]
        return events

    def _delta_events(self, delta: dict[str, Any]) -> list[bytes]:
        """Events of one of OpenAI's deltas: text goes on in its block, a call opens one of its own."""
        events = []
        if text := delta.get("content"):
            if not self._is_open:
                events += self._open(_text_block(""))
            events.append(self._block_delta({"type": "text_delta", "text": text}))
        for call in delta.get("tool_calls", []):
            function = call["function"]
            if "id" in call:
                events += self._close()
                events += self._open(_call_block(call["id"], function["name"], {}))
            if arguments := function["arguments"]:
                events.append(self._block_delta({"type": "input_json_delta", "partial_json": arguments}))
        return events

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        self._index, self._is_open = self._index + 1, True
        return [_event("content_block_start", index=self._index, content_block=block)]

    def _block_delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> list[bytes]:
        was_open, self._is_open = self._is_open, False
        return [_event("content_block_stop", index=self._index)] if was_open else []

    def _stop(self, completion: Completion) -> dict[str, Any]:
        """Why it ended."""
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif self._stops.found is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._calls is not None and self._calls.is_called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": self._stops.found}

    def _object(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": usage,
        }


# What Anthropic's reference requires and has no meaning here is null.


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


def _call_block(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    block = {"type": "tool_use", "id": call_id, "name": name, "input": arguments}
    return block | {"caller": {"type": "direct"}}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic's, in which input tokens are those that no cache had."""
    counts, num_cached = usage.json(), usage.cached_tokens
    return {
        "input_tokens": counts["prompt_tokens"] - num_cached,
        "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0,
        "cache_creation": None,
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": None,
        "server_tool_use": None,
        "service_tier": None,
        "inference_geo": None,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event({"type": kind} | fields, kind)
