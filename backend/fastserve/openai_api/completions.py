"""`/v1/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api import sse
from fastserve.openai_api.body import read_body
from fastserve.openai_api.errors import refusal, server_refusal
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.generation_fields import GenerationFields, call_options, client_names
from fastserve.openai_api.http_answers import event_stream, json_response, until_gone
from fastserve.openai_api.logprobs import CompletionLogprobs
from fastserve.openai_api.merged_streams import merged
from fastserve.openai_api.usage import Usage, usage_of
from fastserve_client import Completion, FastServeError, Generation

MAX_PROMPTS = 256


class CompletionRequest(GenerationFields, kw_only=True):
    """The body."""

    prompt: str | list[str | int | list[int]]
    """A text, token ids, or a list of either."""
    max_tokens: int | None = None
    """16 unless given."""
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


Prompt = str | list[int]


async def completions(request: Request) -> Response:
    """Continues one or more prompts. Raises ApiError."""
    door: FrontDoor = request.app.state.door
    body = await read_body(request, CompletionRequest)
    door.check_model(body.model)
    prompts = prompts_of(body)
    options = call_options(body, request.headers, door.has_keys) | _options(body, prompts)
    answer = _CompletionAnswer(door, body, prompts, options)
    try:
        if body.stream:
            return await event_stream(request, answer.events(), answer.headers)
        content = await until_gone(request, answer.json())
    except FastServeError as error:
        raise server_refusal(error, answer.names) from error
    return json_response(content, headers=answer.headers)


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """The prompts. Raises ApiError."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [given]  # type: ignore[list-item]
    if not given or any(isinstance(each, int) for each in given):
        raise refusal("prompt", "got none, or token ids among texts; allowed: a text, token ids, or a list")
    if len(given) > MAX_PROMPTS:
        raise refusal("prompt", f"got {len(given)} prompts; allowed: at most {MAX_PROMPTS}")
    return given  # type: ignore[return-value]


def _options(body: CompletionRequest, prompts: list[Prompt]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if body.max_tokens is not None:
        options["max_tokens"] = body.max_tokens
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refusal("best_of", f"got {body.best_of}; allowed: `n`, which is {body.n or 1}")
    if body.logprobs is not None:
        options |= {"logprobs": body.logprobs, "return_token_ids": True}
        if body.echo:
            options["prompt_logprobs"] = body.logprobs
    if body.echo and not all(isinstance(each, str) for each in prompts):
        raise refusal("echo", "got true; allowed: false where `prompt` is token ids")
    return options


class _CompletionAnswer:
    """The answer to one request, whole or in events. Each prompt is a request to the ensemble."""

    def __init__(
        self, door: FrontDoor, body: CompletionRequest, prompts: list[Prompt], options: dict[str, Any]
    ) -> None:
        self._door, self._body, self._prompts, self._options = door, body, prompts, options
        self._n = body.n or 1
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self.headers = {"x-request-id": self._id}
        self.names = client_names(body) | {
            "text_input": "prompt",
            "prompt_token_ids": "prompt",
            "prompt_logprobs": "logprobs",
        }

    def _call(self, prompt: Prompt) -> dict[str, Any]:
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        return self._options | {key: prompt, "request_id": self._id}

    async def json(self) -> dict[str, Any]:
        """The whole answer. One that fails ends the others."""
        generate = self._door.client.generate
        calls = [asyncio.ensure_future(generate(**self._call(each))) for each in self._prompts]
        try:
            answers = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
        choices = [
            self._choice(prompt * self._n + index, each, answer, begins=True)
            for prompt, answer in enumerate(answers)
            for index, each in enumerate(answer.completions)
        ]
        return self._object(choices) | self._body.summary(usage_of(answers))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as it comes. The first event raises FastServeError; later errors are the last event."""
        usage, begun = Usage(len(self._prompts)), set()
        chunks = merged([self._door.client.stream(**self._call(each)) for each in self._prompts])
        try:
            async for prompt, chunk in chunks:
                usage.add(chunk, prompt)
                begins = prompt not in begun
                begun.add(prompt)
                for index, each in enumerate(chunk.completions):
                    if begins or each.text or each.token_ids or each.finish_reason is not None:
                        choice = self._choice(prompt * self._n + index, each, chunk, begins)
                        null = {"usage": None} if self._body.include_usage else {}
                        yield sse.event(self._object([choice]) | null)
            if (summary := self._body.last_summary(usage)) is not None:
                yield sse.event(self._object([]) | summary)
        except FastServeError as error:
            if not begun:
                raise
            yield sse.event(server_refusal(error, self.names).body)
        finally:
            await chunks.aclose()
        yield sse.DONE

    def _choice(self, index: int, completion: Completion, answer: Generation, begins: bool) -> dict[str, Any]:
        prompt = self._prompts[index // self._n]
        echoed = prompt if begins and self._body.echo and isinstance(prompt, str) else ""
        return {
            "index": index,
            "text": echoed + completion.text,
            "logprobs": self._logprobs_json(index, completion, answer, echoed),
            "finish_reason": completion.finish_reason,
        }

    def _logprobs_json(
        self, index: int, completion: Completion, answer: Generation, echoed: str
    ) -> dict[str, Any] | None:
        count = self._body.logprobs
        if count is None or completion.token_ids is None or completion.logprobs is None:
            return None
        shape = self._logprobs.setdefault(index, CompletionLogprobs(count))
        parts = []
        if echoed and answer.prompt_logprobs is not None:
            parts.append(shape.of_prompt(answer.prompt_logprobs, echoed))
        parts.append(shape.json(completion.token_ids, completion.logprobs))
        return {key: [item for part in parts for item in part[key]] for key in parts[0]}

    def _object(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
        }
