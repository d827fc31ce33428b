"""What the handlers share: the client of the ensemble, and what the server calls its model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastserve.openai_api.errors import ApiError, unknown_model
from fastserve.openai_api.tool_formats import ToolFormat
from fastserve_client import Chunk, Generation, Options
from fastserve_client.encoder_request import EncoderRequest
from fastserve_client.generation import Outputs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Stream(Protocol):
    """The chunks of an answer."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def close(self) -> None:
        """Cancels the request unless it has ended."""


class GenerationClient(Protocol):
    """What the API needs of `fastserve_client.AsyncClient`; the methods raise FastServeError."""

    async def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Generation:
        """The whole answer."""

    def stream(self, prompt: str | None = None, **options: Unpack[Options]) -> Stream:
        """The answer as it comes."""

    async def infer(self, request: EncoderRequest, timeout: float | None) -> Outputs:
        """The output tensors of a request of an encoder."""

    async def is_ready(self, timeout: float | None = None) -> bool:
        """Whether requests can be served."""

    async def close(self) -> None:
        """Cancels what runs."""


class PromptTokenizer(Protocol):
    """The served model's tokenizer and chat template; the methods raise RequestError."""

    def text_token_ids(self, text: str, special_tokens: bool) -> list[int]:
        """Of a text; `special_tokens`: with those that the tokenizer puts around one."""

    def chat_token_ids(self, messages: object, options: Mapping[str, Any], special_tokens: bool) -> list[int]:
        """Of a chat as the model's template renders it; `options`: what comes beside `messages`."""

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to a text."""


@dataclass(frozen=True)
class FrontDoor:
    """One ensemble and its name."""

    client: GenerationClient
    model_name: str | None
    """What requests call the LLM; None: the server has encoders alone."""
    tool_format: ToolFormat | None = None
    """How the model writes tool calls; None: not known."""
    has_keys: bool = False
    """Whether the server asks for keys: these say the tenant then."""
    tokenizer: PromptTokenizer | None = None
    """None: `fastserve openai` was not told which model the server has."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """The task of each encoder that is served, by its name: embed, classify or rerank."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When this began to serve the model, in seconds since 1970."""

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) for the name of another model."""
        if self.model_name is None:
            raise ApiError(
                404,
                "invalid_request_error",
                "`model`: this server has encoders alone; allowed: embeddings, rerank and classify",
                param="model",
                code="model_not_found",
            )
        if name != self.model_name:
            raise unknown_model(name, [self.model_name])

    def check_encoder(self, name: str, task: str) -> None:
        """Raises ApiError (404) where no encoder of this task has the name."""
        served = [each for each, its_task in self.encoders.items() if its_task == task]
        if not served:
            raise ApiError(
                404,
                "invalid_request_error",
                f"`model`: this server has no encoder for {task}; `fastserve serve --encoder` adds one",
                param="model",
                code="model_not_found",
            )
        if name not in served:
            raise unknown_model(name, served)
