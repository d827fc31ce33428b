"""A request: the input tensors of a model, and their two forms on the wire."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2

from fastserve_client.options import Options

MODEL = "fastserve"
INFER_MODEL = "fastserve_infer"
"""It answers once, and takes cancellations: `fastserve` itself is an ensemble, and streams."""

InputValue = bool | int | str | list[int]
"""A BOOL [1], INT32 [1], STRING [1] or INT64 [-1] tensor."""


@dataclass(frozen=True)
class Request:
    """What is sent. Inputs that are not in `inputs` have the server's default."""

    model: str
    inputs: Mapping[str, InputValue]
    request_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Of this call, beside the client's; over gRPC they are metadata."""

    @property
    def http_endpoint(self) -> str:
        """The last part of the path of the HTTP call."""
        return "generate_stream"

    def to_json(self, timeout: float | None, authorization: str | None = None) -> bytes:
        """The body of HTTP `generate_stream`. `timeout`, in seconds, travels in microseconds."""
        body: dict[str, Any] = dict(self.inputs)
        if self.request_id:
            body["id"] = self.request_id
        if timeout is not None:
            body["timeout"] = round(timeout * 1e6)
        if authorization:
            body["authorization"] = authorization
        return json.dumps(body).encode()

    def to_grpc(self, timeout: float | None) -> service_pb2.ModelInferRequest:
        """The message of gRPC `ModelStreamInfer`. `timeout`, in seconds, travels in microseconds."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.request_id)
        for name, value in self.inputs.items():
            _add_input(message, name, value)
        if timeout is not None:
            message.parameters["timeout"].int64_param = round(timeout * 1e6)
        return message


def _add_input(message: service_pb2.ModelInferRequest, name: str, value: InputValue) -> None:
    shape = [len(value)] if isinstance(value, list) else [1]
    tensor = message.inputs.add(name=name, shape=shape)
    match value:
        case bool():
            tensor.datatype = "BOOL"
            tensor.contents.bool_contents.append(value)
        case int():
            tensor.datatype = "INT32"
            tensor.contents.int_contents.append(value)
        case str():
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.append(value.encode())
        case _:
            tensor.datatype = "INT64"
            tensor.contents.int64_contents.extend(value)


def generation_request(prompt: str | None, stream: bool, options: Options) -> Request:
    """The request to continue a prompt. The server wants exactly one of its three kinds.

    The finish reason and the token counts are always asked for: they cost next to nothing, and the counts say
    which of the token ids belong to which of `n` sequences.
    """
    sampling: dict[str, Any] = dict(options)
    inputs: dict[str, InputValue] = {
        "stream": stream,
        "exclude_input_in_output": sampling.pop("exclude_input_in_output", True),
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_token_ids": sampling.pop("return_token_ids", False),
        "return_logprobs": sampling.pop("return_logprobs", sampling.get("logprobs") is not None),
        "return_cumulative_logprob": sampling.pop("return_cumulative_logprob", False),
        "priority": sampling.pop("priority", 0),
    }
    if sampling.pop("return_timing", False):
        inputs["return_timing"] = True
    if prompt is not None:
        inputs["text_input"] = prompt
    if (messages := sampling.pop("messages", None)) is not None:
        inputs["messages"] = json.dumps(list(messages))
    if (prompt_token_ids := sampling.pop("prompt_token_ids", None)) is not None:
        inputs["prompt_token_ids"] = [int(token_id) for token_id in prompt_token_ids]
    for name in ("tenant", "expected_output_tokens"):
        if (value := sampling.pop(name, None)) is not None:
            inputs[name] = value
    request_id = sampling.pop("request_id", None) or uuid.uuid4().hex
    headers = sampling.pop("headers", None) or {}
    sampling.pop("timeout", None)
    if sampling:
        inputs["sampling_parameters"] = json.dumps(sampling)
    return Request(MODEL, inputs, request_id, headers=headers)


def cancellation_request(request_id: str) -> Request:
    """The request to stop others, of that id."""
    return Request(INFER_MODEL, {"cancel": request_id})
