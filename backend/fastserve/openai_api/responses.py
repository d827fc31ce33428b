"""OpenAI's `/v1/responses`, stateless."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api import sse
from fastserve.openai_api.body import read_body
from fastserve.openai_api.chat_completions import chat_options
from fastserve.openai_api.chat_tools import ChatTools
from fastserve.openai_api.errors import ApiError, server_refusal
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.generation_fields import client_names
from fastserve.openai_api.http_answers import event_stream, json_response, until_gone
from fastserve.openai_api.logprobs import chat_logprobs
from fastserve.openai_api.responses_chat import NAMES, ResponsesRequest, as_chat
from fastserve.openai_api.usage import Usage
from fastserve_client import Chunk, Completion, FastServeError, Generation


async def responses(request: Request) -> Response:
    """Answers a request. Raises ApiError."""
    door: FrontDoor = request.app.state.door
    body = await read_body(request, ResponsesRequest)
    door.check_model(body.model)
    chat = as_chat(body)
    options = chat_options(chat, request.headers, door.has_keys)
    tools = ChatTools(door.tool_format, chat.tools, chat.tool_choice, chat.parallel_tool_calls is not False)
    tools.add_to(options)
    answer = _Response(body, tools, client_names(chat))
    options["request_id"] = answer.id
    headers = {"x-request-id": answer.id}
    try:
        if body.stream:
            return await event_stream(request, answer.events(door, options), headers)
        whole = await until_gone(request, door.client.generate(**options))
    except FastServeError as error:
        raise answer.refusal(error) from error
    return json_response(answer.json(whole), headers=headers)


class _Response:
    """The answer to one request, whole or in events: items, which are messages of text and calls."""

    def __init__(self, body: ResponsesRequest, tools: ChatTools, names: dict[str, str]) -> None:
        self.id = _new_id("resp")
        self._body = body
        self._names = {ours: NAMES.get(theirs, theirs) for ours, theirs in (NAMES | names).items()}
        self._created = int(time.time())
        self._calls = tools.new_calls()
        self._usage = Usage()
        self._output: list[dict[str, Any]] = []
        """The items, the last of which may be open."""
        self._is_open = False
        self._sequence_number = 0

    def refusal(self, error: FastServeError) -> ApiError:
        """The server's error, in this client's names."""
        return server_refusal(error, self._names)

    def json(self, answer: Generation) -> dict[str, Any]:
        """The whole answer: that to which the events add up."""
        for _ in self._chunk_events(answer):
            pass
        return self._object(answer.completions[0].finish_reason)

    async def events(self, door: FrontDoor, options: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first event raises FastServeError; later errors are the last event."""
        has_begun = False
        finish_reason = None
        stream = door.client.stream(**options)
        try:
            async for chunk in stream:
                if not has_begun:
                    has_begun = True
                    for kind in ("response.created", "response.in_progress"):
                        yield self._event(kind, response=self._object(None))
                for event in self._chunk_events(chunk):
                    yield event
                finish_reason = chunk.completions[0].finish_reason
            response = self._object(finish_reason)
            yield self._event(f"response.{response['status']}", response=response)
        except FastServeError as error:
            if not has_begun:
                raise
            said = self.refusal(error).body["error"]
            failed = {"status": "failed", "error": {"code": "server_error", "message": said["message"]}}
            yield self._event("response.failed", response=self._object(None) | failed)
        finally:
            await stream.close()

    def _chunk_events(self, chunk: Generation | Chunk) -> list[bytes]:
        self._usage.add(chunk)
        [completion] = chunk.completions
        is_last = completion.finish_reason is not None
        deltas: list[dict[str, Any]] = [{"content": completion.text}] if completion.text else []
        if self._calls is not None:
            deltas = self._calls.deltas(completion.text, is_last)
        logprobs = self._logprobs(completion)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        events = []
        for place, delta in enumerate(deltas):
            events += self._delta_events(delta, [] if place else logprobs)
        return events + (self._close() if is_last else [])

    def _logprobs(self, completion: Completion) -> list[dict[str, Any]]:
        if not self._body.has_logprobs:
            return []
        found = chat_logprobs(completion, self._body.top_logprobs or 0)
        return [] if found is None else list(found["content"])

    def _delta_events(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> list[bytes]:
        """Events of one of a chat's deltas: text goes on in its message, a call is an item of its own."""
        events: list[bytes] = []
        if "content" in delta:
            if not self._is_open or self._item["type"] != "message":
                events += self._close() + self._open_message()
            [part] = self._item["content"]
            part["text"] += delta["content"]
            part["logprobs"] += logprobs
            events.append(self._part_event("output_text.delta", delta=delta["content"], logprobs=logprobs))
        for call in delta.get("tool_calls", []):
            function = call["function"]
            if "id" in call:
                events += self._close() + self._open_call(call["id"], function["name"])
            if arguments := function["arguments"]:
                self._item["arguments"] += arguments
                events.append(self._item_event("function_call_arguments.delta", delta=arguments))
        return events

    @property
    def _item(self) -> dict[str, Any]:
        return self._output[-1]

    def _open_message(self) -> list[bytes]:
        item: dict[str, Any] = {
            "type": "message",
            "id": _new_id("msg"),
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        events = self._open(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events.append(self._part_event("content_part.added", item, part=part))
        item["content"] = [part]
        return events

    def _open_call(self, call_id: str, name: str) -> list[bytes]:
        item: dict[str, Any] = {
            "type": "function_call",
            "id": _new_id("fc"),
            "call_id": call_id,
            "name": name,
            "arguments": "",
        }
        return self._open(item | {"status": "in_progress"})

    def _open(self, item: dict[str, Any]) -> list[bytes]:
        self._output.append(item)
        self._is_open = True
        return [self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)]

    def _close(self) -> list[bytes]:
        """The last item is complete."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._item
        item["status"] = "completed"
        if item["type"] == "message":
            [part] = item["content"]
            done = [
                self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._part_event("content_part.done", part=part),
            ]
        else:
            fields = {"name": item["name"], "arguments": item["arguments"]}
            done = [self._item_event("function_call_arguments.done", **fields)]
        index = len(self._output) - 1
        return [*done, self._event("response.output_item.done", output_index=index, item=item)]

    def _part_event(self, kind: str, item: dict[str, Any] | None = None, **fields: Any) -> bytes:
        return self._item_event(kind, item, content_index=0, **fields)

    def _item_event(self, kind: str, item: dict[str, Any] | None = None, **fields: Any) -> bytes:
        where = {"item_id": (item or self._item)["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{kind}", **where, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return sse.event({"type": kind, "sequence_number": number} | fields, kind)

    def _object(self, finish_reason: str | None) -> dict[str, Any]:
        """The response as far as it is there; `finish_reason`: None while it goes on."""
        body = self._body
        statuses: dict[str | None, str] = {None: "in_progress", "length": "incomplete"}
        status = statuses.get(finish_reason, "completed")
        form = body.text.format if body.text is not None and body.text.format is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "background": False,
            "completed_at": None if finish_reason is None else int(time.time()),
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "max_tool_calls": body.max_tool_calls,
            "service_tier": "default",
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"} if form is None else msgspec.to_builtins(form)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [msgspec.to_builtins(tool) for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if finish_reason is None else self._usage.responses_json(),
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
