"""Each field of OpenAI's and Anthropic's references is taken, or refused by name as `docs/openai.md` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from fastserve.openai_api.anthropic_chat import MessagesRequest
from fastserve.openai_api.chat_completions import ChatRequest
from fastserve.openai_api.completions import CompletionRequest
from fastserve.openai_api.encoders import EmbeddingsRequest
from fastserve.openai_api.responses_chat import ResponsesRequest

DOCUMENT = Path(__file__).parents[2] / "docs/openai.md"
REFUSED = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| refused by name \|$", re.MULTILINE)


@pytest.mark.parametrize(
    ("reference", "body"),
    [
        (ChatParams, ChatRequest),
        (CompletionCreateParamsBase, CompletionRequest),
        (ResponseCreateParamsBase, ResponsesRequest),
        (EmbeddingCreateParams, EmbeddingsRequest),
        (MessageCreateParamsBase, MessagesRequest),
    ],
)
def test_each_field_is_taken_or_refused_by_name(reference: Any, body: Any) -> None:
    """By the types of the clients that are installed: a newer one may have fields that nobody knows yet."""
    text = DOCUMENT.read_text()
    refused = {name for row in REFUSED.findall(text) for name in re.findall(r"\w+", row)}
    taken = {field.name for field in msgspec.structs.fields(body)}
    assert set(reference.__annotations__) - taken - refused == set()
    for name in sorted(taken):
        assert f"`{name}`" in text or f"`{name}." in text, f"{name} is not in docs/openai.md"
