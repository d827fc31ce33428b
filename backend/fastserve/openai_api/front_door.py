"""What the handlers share: the client of the ensemble, and what the server calls its model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fastserve.openai_api.errors import unknown_model
from fastserve.openai_api.tool_formats import ToolFormat
from fastserve_client import Chunk, Generation, Options

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

    async def is_ready(self, timeout: float | None = None) -> bool:
        """Whether requests can be served."""

    async def close(self) -> None:
        """Cancels what runs."""


@dataclass(frozen=True)
class FrontDoor:
    """One ensemble and its name."""

    client: GenerationClient
    model_name: str
    tool_format: ToolFormat | None = None
    """How the model writes tool calls; None: not known."""
    has_keys: bool = False
    """Whether the server asks for keys: these say the tenant then."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When this began to serve the model, in seconds since 1970."""

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) for the name of another model."""
        if name != self.model_name:
            raise unknown_model(name, self.model_name)
