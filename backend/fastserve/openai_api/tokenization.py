"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from fastserve.errors import RequestError
from fastserve.openai_api.body import read_body
from fastserve.openai_api.errors import ApiError, refusal, request_refusal
from fastserve.openai_api.front_door import FrontDoor, PromptTokenizer
from fastserve.openai_api.http_answers import json_response

CHAT_FIELDS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
Result = TypeVar("Result")


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `/tokenize`: a `prompt`, or the `messages` of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    """Those that the tokenizer puts around a text; unless given, for a prompt. A template writes its own."""
    return_token_strs: bool | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def chat_options(self) -> dict[str, Any]:
        """Those of CHAT_FIELDS that were given."""
        return {name: value for name in CHAT_FIELDS if (value := getattr(self, name)) is not None}

    def answer(self, tokenizer: PromptTokenizer) -> dict[str, Any]:
        """The tokens of the prompt or the chat. Raises RequestError."""
        if self.prompt is not None:
            found = tokenizer.text_token_ids(self.prompt, self.add_special_tokens is not False)
        else:
            special_tokens = bool(self.add_special_tokens)
            found = tokenizer.chat_token_ids(self.messages, self.chat_options, special_tokens)
        texts = tokenizer.token_texts(found) if self.return_token_strs else None
        return {"count": len(found), "tokens": found, "token_strs": texts}


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


async def tokenize(request: Request) -> Response:
    """The token ids of a prompt, as the served model gets them. Raises ApiError."""
    body = await read_body(request, TokenizeRequest)
    door: FrontDoor = request.app.state.door
    _check_model(door, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refusal("prompt", "give one of `prompt` and `messages`")
    if body.chat_options and body.messages is None:
        raise refusal(next(iter(body.chat_options)), "got some; allowed: only beside `messages`")
    return json_response(await tokenized(door, body.answer))


async def detokenize(request: Request) -> Response:
    """The text of token ids. Raises ApiError."""
    body = await read_body(request, DetokenizeRequest)
    door: FrontDoor = request.app.state.door
    _check_model(door, body.model)
    return json_response({"prompt": await tokenized(door, lambda tokenizer: tokenizer.text(body.tokens))})


async def tokenized(door: FrontDoor, work: Callable[[PromptTokenizer], Result]) -> Result:
    """What `work` makes of the tokenizer, in a thread: a long prompt takes a while. Raises ApiError."""
    if door.tokenizer is None:
        raise ApiError(
            404, "not_found_error", "the model's tokenizer is not known here: give `fastserve openai` --model"
        )
    try:
        return await asyncio.to_thread(work, door.tokenizer)
    except RequestError as error:
        raise request_refusal(error) from error


def _check_model(door: FrontDoor, name: str | None) -> None:
    if name is not None:
        door.check_model(name)
