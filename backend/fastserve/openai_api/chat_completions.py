"""`/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api import sse
from fastserve.openai_api.body import read_body
from fastserve.openai_api.chat_tools import ChatTools, ChoiceCalls, Tool
from fastserve.openai_api.errors import refusal, server_refusal
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.generation_fields import GenerationFields, call_options, client_names
from fastserve.openai_api.http_answers import event_stream, json_response, until_gone
from fastserve.openai_api.logprobs import chat_logprobs
from fastserve.openai_api.usage import Usage, usage_of
from fastserve_client import Completion, FastServeError, Generation

CHAT_FIELDS = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class ChatRequest(GenerationFields, kw_only=True):
    """The body."""

    messages: list[dict[str, Any]]
    """FastServe's first step judges them: it knows the model's template."""
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    """A variable of the template."""
    modalities: list[str] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


async def chat_completions(request: Request) -> Response:
    """Answers a chat. Raises ApiError."""
    door: FrontDoor = request.app.state.door
    body = await read_body(request, ChatRequest)
    door.check_model(body.model)
    options = chat_options(body, request.headers, door.has_keys)
    is_parallel = body.parallel_tool_calls is not False
    tools = ChatTools(door.tool_format, body.tools, body.tool_choice, is_parallel)
    tools.add_to(options)
    answer = _ChatAnswer(body, tools)
    options["request_id"] = answer.id
    try:
        if body.stream:
            return await event_stream(request, answer.events(door, options), answer.headers)
        whole = await until_gone(request, door.client.generate(**options))
    except FastServeError as error:
        raise server_refusal(error, answer.names) from error
    return json_response(answer.json(whole), headers=answer.headers)


def chat_options(body: ChatRequest, headers: Headers, has_keys: bool) -> dict[str, Any]:
    """The options of the client's call. Raises ApiError."""
    options = call_options(body, headers, has_keys)
    options["messages"] = [_as_known_role(message) for message in body.messages]
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise refusal("max_tokens", "got `max_completion_tokens` beside it; allowed: one of them")
    # Null is as much as the context holds, which is what OpenAI does where nothing is said.
    options["max_tokens"] = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if body.modalities not in (None, ["text"]):
        raise refusal("modalities", f"got {body.modalities!r}; allowed: ['text']")
    if body.logprobs:
        options |= {"logprobs": body.top_logprobs or 0, "return_token_ids": True}
    elif body.top_logprobs:
        raise refusal("top_logprobs", f"got {body.top_logprobs}; allowed: only where `logprobs` is true")
    for name in CHAT_FIELDS:
        if (value := getattr(body, name)) is not None:
            options[name] = value
    if body.reasoning_effort is not None:
        variables = {"reasoning_effort": body.reasoning_effort} | (body.chat_template_kwargs or {})
        options["chat_template_kwargs"] = variables
    return options


def _as_known_role(message: dict[str, Any]) -> dict[str, Any]:
    """The message; `developer`, OpenAI's newer name for `system`, is in no template."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


class _ChatAnswer:
    """The answer to one request, whole or in events."""

    def __init__(self, body: ChatRequest, tools: ChatTools) -> None:
        self._body, self._tools = body, tools
        self._calls: dict[int, ChoiceCalls | None] = {}
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.headers = {"x-request-id": self.id}
        limit = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        self.names = client_names(body) | {
            "max_tokens": limit,
            "logprobs": "top_logprobs",
            "chat_template_kwargs.reasoning_effort": "reasoning_effort",
        }

    def json(self, answer: Generation) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(index, each) for index, each in enumerate(answer.completions)]
        return self._object("chat.completion", choices) | self._body.summary(usage_of([answer]))

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        calls = self._calls_of(index)
        message = {"content": completion.text} if calls is None else calls.message(completion.text)
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, "annotations": []} | message,
            "logprobs": self._logprobs(completion),
            "finish_reason": self._finish_reason(index, completion),
        }

    def _calls_of(self, index: int) -> ChoiceCalls | None:
        if index not in self._calls:
            self._calls[index] = self._tools.new_calls()
        return self._calls[index]

    def _finish_reason(self, index: int, completion: Completion) -> str | None:
        """OpenAI's: `stop`, `length`, or `tool_calls` where the model chose to call."""
        calls = self._calls_of(index)
        is_called = calls is not None and calls.is_called and not self._tools.is_named
        return "tool_calls" if is_called and completion.finish_reason == "stop" else completion.finish_reason

    async def events(self, door: FrontDoor, options: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first event raises FastServeError; later errors are the last event."""
        usage, has_begun = Usage(), False
        stream = door.client.stream(**options)
        try:
            async for chunk in stream:
                usage.add(chunk)
                if not has_begun:
                    for index in range(len(chunk.completions)):
                        yield self._event(index, {"role": "assistant", "content": ""})
                has_begun = True
                for index, completion in enumerate(chunk.completions):
                    for event in self._completion_events(index, completion):
                        yield event
            if (summary := self._body.last_summary(usage)) is not None:
                yield sse.event(self._object("chat.completion.chunk", []) | summary)
        except FastServeError as error:
            if not has_begun:
                raise
            yield sse.event(server_refusal(error, self.names).body)
        finally:
            await stream.close()
        yield sse.DONE

    def _completion_events(self, index: int, completion: Completion) -> list[bytes]:
        logprobs, calls = self._logprobs(completion), self._calls_of(index)
        deltas = [{"content": completion.text}] if completion.text else []
        if calls is not None:
            deltas = calls.deltas(completion.text, completion.finish_reason is not None)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        events = [self._event(index, each, None if place else logprobs) for place, each in enumerate(deltas)]
        if completion.finish_reason is not None:
            events.append(self._event(index, {}, finish_reason=self._finish_reason(index, completion)))
        return events

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._body.include_usage else {}
        return sse.event(self._object("chat.completion.chunk", [choice]) | usage)

    def _logprobs(self, completion: Completion) -> dict[str, Any] | None:
        return chat_logprobs(completion, self._body.top_logprobs or 0) if self._body.logprobs else None

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
        }
