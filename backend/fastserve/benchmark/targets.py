"""Targets of a benchmark. Each answers a job as a stream of numbers of new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from fastserve.benchmark.job import Job
from fastserve_client import Client

TargetName = Literal["in-process", "grpc", "http"]


class Target(Protocol):
    """Something that serves jobs; threads share one."""

    def stream(self, job: Job) -> Iterator[int]:
        """Serves a job; yields how many tokens each response brought. Raises what the target raises."""

    def close(self) -> None:
        """Frees the target."""


class ServerTarget:
    """A running server, through `fastserve_client`."""

    def __init__(self, url: str, protocol: Literal["grpc", "http"], retries: int = 2) -> None:
        """`retries`: how often a request that is refused as UNAVAILABLE is sent again."""
        self._client = Client(url, protocol, retries=retries)

    def stream(self, job: Job) -> Iterator[int]:
        """Yields how many tokens each response brought."""
        chunks = self._client.stream(
            prompt_token_ids=job.prompt_token_ids,
            priority=job.priority,
            tenant=job.tenant,
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
        )
        for chunk in chunks:
            yield chunk.num_output_tokens

    def close(self) -> None:
        """Closes the client."""
        self._client.close()


class InProcessTarget:
    """The engine inside this process, without Triton server."""

    def __init__(self, model: str, **settings: Any) -> None:
        """`settings` are those of `Model.load`."""
        from fastserve.embedded import Model, ModelServer

        self._server = ModelServer(Model.load(model, **settings)).start()

    def stream(self, job: Job) -> Iterator[int]:
        """Yields how many tokens each response brought."""
        task = self._server.submit(
            job.prompt_token_ids,
            priority=job.priority,
            tenant=job.tenant,
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
        )
        for response in task.responses():
            yield response.num_output_tokens[0]

    def close(self) -> None:
        """Stops the engine."""
        self._server.stop()
