"""The application over a client that answers as it is told and keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastserve.openai_api.app import create_app
from fastserve_client import Chunk, Completion, FastServeError, Generation, Logprob
from fastserve_client.encoder_request import EncoderRequest
from fastserve_client.generation import Outputs

MODEL = "tiny"


def completion(text: str, finish_reason: str | None = None, tokens: tuple[int, ...] = ()) -> Completion:
    """One continuation; token i has the log-probability -i and the text `<i>`."""
    logprobs = [{token: Logprob(-float(token), 1, f"<{token}>")} for token in tokens]
    return Completion(text, finish_reason, list(tokens), logprobs, None, len(tokens))


class FakeStream:
    """Chunks one after the other; an error among them is raised, and after a None nothing comes."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self.is_closed = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        for item in self._items:
            if isinstance(item, FastServeError):
                raise item
            if item is None:
                await asyncio.Event().wait()
            yield item

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeClient:
    """Stands for the server behind: what it answers is set by a test."""

    answer: Generation | FastServeError = field(
        default_factory=lambda: Generation([completion("Hi", "stop", (1, 2))], 3, None)
    )
    chunks: list[Any] = field(default_factory=list)
    is_up: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    encoder_requests: list[EncoderRequest] = field(default_factory=list)

    async def generate(self, prompt: str | None = None, **options: Any) -> Generation:
        self.calls.append({"prompt": prompt} | options)
        if isinstance(self.answer, FastServeError):
            raise self.answer
        return self.answer

    def stream(self, prompt: str | None = None, **options: Any) -> FakeStream:
        self.calls.append({"prompt": prompt} | options)
        self.streams.append(FakeStream(self.chunks))
        return self.streams[-1]

    async def infer(self, request: EncoderRequest, timeout: float | None) -> Outputs:
        """A row for each text: its own length stands for all numbers."""
        self.encoder_requests.append(request)
        if isinstance(self.answer, FastServeError):
            raise self.answer
        [*_, texts] = request.columns.values()
        for place, text in enumerate(texts):
            if text == "too long":
                raise FastServeError("INVALID_ARG", f"`text[{place}]`: got 600 tokens; allowed: at most 512")
        lengths = [len(text) for text in texts]
        counts = {"num_tokens": [[length] for length in lengths]}
        if "document" in request.columns:
            return counts | {"score": [[float(length)] for length in lengths]}
        if request.model == "classify":
            scores = json.dumps({"bad": 0.25, "good": 0.75}).encode()
            rows = len(lengths)
            return counts | {
                "label": [["good"]] * rows,
                "score": [[0.75]] * rows,
                "scores": [[scores]] * rows,
            }
        return counts | {"embedding": [[float(length), 0.5] for length in lengths]}

    async def is_ready(self, timeout: float | None = None) -> bool:
        return self.is_up

    async def close(self) -> None:
        pass


@pytest.fixture
def fake() -> FakeClient:
    return FakeClient()


@pytest.fixture
def api(fake: FakeClient) -> Iterator[TestClient]:
    app = create_app(lambda: fake, MODEL)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
