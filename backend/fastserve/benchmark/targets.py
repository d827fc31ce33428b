"""Targets of a benchmark. Each answers a job as a stream of numbers of new tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from fastserve.access.key import KEY_VARIABLE
from fastserve.benchmark.job import Job
from fastserve_client import Client
from fastserve_client.errors import server_error


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
        self._client = Client(url, protocol, retries=retries, key=os.environ.get(KEY_VARIABLE))

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


class InferTarget:
    """A running server's `fastserve_infer`, through Triton server's own client: one response a request.

    A first token is seen with the last one: times to first token are on the server's metrics page.
    """

    def __init__(self, url: str) -> None:
        self._client = grpcclient.InferenceServerClient(url)
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"authorization": f"Bearer {key}"} if key else None

    def stream(self, job: Job) -> Iterator[int]:
        """Yields the number of all tokens, once. Raises FastServeError."""
        sampling = {"temperature": 0, "max_tokens": job.max_tokens, "ignore_eos": True}
        values: list[tuple[str, str, Any]] = [
            ("prompt_token_ids", "INT64", np.array(job.prompt_token_ids, dtype=np.int64)),
            ("priority", "INT32", np.array([job.priority], dtype=np.int32)),
            ("tenant", "BYTES", np.array([job.tenant], dtype=np.object_)),
            ("sampling_parameters", "BYTES", np.array([json.dumps(sampling)], dtype=np.object_)),
            ("return_num_output_tokens", "BOOL", np.array([True])),
        ]
        inputs = []
        for name, datatype, value in values:
            inputs.append(grpcclient.InferInput(name, list(value.shape), datatype))
            inputs[-1].set_data_from_numpy(value)
        try:
            result = self._client.infer("fastserve_infer", inputs, headers=self._headers)
        except InferenceServerException as error:
            raise server_error(error.message()) from error
        yield int(result.as_numpy("num_output_tokens")[0])

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
