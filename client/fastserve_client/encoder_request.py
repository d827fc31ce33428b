"""Requests of embeddings, classes and ranks: their forms on the wire, and what is answered.

They go to models that batch: each tensor has a row for each text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from fastserve_client.errors import FastServeError
from fastserve_client.generation import Outputs
from fastserve_client.request import Request

ParameterValue = bool | int | str


@dataclass(frozen=True)
class Classification:
    """The label of a text."""

    label: str
    """The one of the highest score."""
    score: float
    """From 0 to 1."""
    scores: Mapping[str, float]
    """Of every label, or of those that were asked for."""


@dataclass(frozen=True)
class TokenLabel:
    """The label of a token of a text."""

    start: int
    """Of the token in the text, in characters."""
    end: int
    label: str
    score: float
    """From 0 to 1."""


@dataclass(frozen=True)
class RankedDocument:
    """A document's place among those of a query."""

    index: int
    """Of the document in the request."""
    score: float
    """The higher, the more relevant."""


@dataclass(frozen=True)
class EncoderRequest(Request):
    """STRING [n, 1] tensors, and the request's parameters."""

    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The tensors by name, of n texts each."""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    priority_level: int = 0
    """Triton server's: 1 is the most urgent, 0 the model's default."""

    @property
    def http_endpoint(self) -> str:
        """The last part of the path of the HTTP call."""
        return "infer"

    def to_json(self, timeout: float | None, authorization: str | None = None) -> bytes:
        """The body of HTTP `infer`. `timeout`, in seconds, travels in microseconds."""
        inputs = [
            {"name": name, "datatype": "BYTES", "shape": [len(texts), 1], "data": list(texts)}
            for name, texts in self.columns.items()
        ]
        parameters = self._all_parameters(timeout)
        if authorization:
            parameters["authorization"] = authorization
        body = {"id": self.request_id, "inputs": inputs, "parameters": parameters}
        return json.dumps(body).encode()

    def to_grpc(self, timeout: float | None) -> service_pb2.ModelInferRequest:
        """The message of gRPC `ModelStreamInfer`. `timeout`, in seconds, travels in microseconds."""
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.request_id)
        for name, texts in self.columns.items():
            tensor = message.inputs.add(name=name, shape=[len(texts), 1], datatype="BYTES")
            tensor.contents.bytes_contents.extend(text.encode() for text in texts)
        for name, value in self._all_parameters(timeout).items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
            if name == "priority":
                kind = "uint64_param"
            setattr(message.parameters[name], kind, value)
        return message

    def _all_parameters(self, timeout: float | None) -> dict[str, ParameterValue]:
        found = dict(self.parameters)
        if self.priority_level:
            found["priority"] = self.priority_level
        if timeout is not None:
            found["timeout"] = round(timeout * 1e6)
        return found


def encoder_request(
    model: str,
    columns: Mapping[str, Sequence[str]],
    priority: int,
    headers: Mapping[str, str] | None = None,
    **parameters: Any,
) -> EncoderRequest:
    """The request; parameters that are None are left to the server.

    Raises ValueError for columns that are no lists of str, are empty, or differ in length.
    """
    for name, texts in columns.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}`: got {texts!r:.80}; allowed: a list of str")
        if not texts:
            raise ValueError(f"`{name}`: got none; allowed: at least one text")
    given = {name: value for name, value in parameters.items() if value is not None}
    return EncoderRequest(model, {}, "", columns, given, priority, headers=headers or {})


def infer_outputs(body: bytes) -> Outputs:
    """The output tensors of the body of HTTP `infer`, as lists of rows."""
    return {
        tensor["name"]: np.array(tensor["data"], dtype=object).reshape(tensor["shape"]).tolist()
        for tensor in json.loads(body)["outputs"]
    }


def embeddings_of(outputs: Outputs) -> np.ndarray:
    """[n, dimensions] float32."""
    return np.asarray(_output(outputs, "embedding"), dtype=np.float32)


def token_labels_of(outputs: Outputs) -> list[list[TokenLabel]]:
    """The labels of each text's tokens."""
    rows = _texts(_output(outputs, "tokens"))
    return [[TokenLabel(**token) for token in json.loads(row)] for (row,) in rows]


def classes_of(outputs: Outputs) -> list[Classification]:
    """The labels of texts."""
    labels, scores = _texts(_output(outputs, "label")), _output(outputs, "score")
    by_label = _texts(_output(outputs, "scores"))
    return [
        Classification(label, float(score), json.loads(each))
        for (label,), (score,), (each,) in zip(labels, scores, by_label, strict=True)
    ]


def ranks_of(outputs: Outputs, top_n: int | None) -> list[RankedDocument]:
    """The documents, best first; equal ones in their order."""
    scores = [float(score) for (score,) in _output(outputs, "score")]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [RankedDocument(index, scores[index]) for index in order[:top_n]]


def num_tokens_of(outputs: Outputs) -> int:
    """Tokens of all the texts, those around them that the model's tokenizer adds included."""
    return sum(int(count) for (count,) in _output(outputs, "num_tokens"))


def _output(outputs: Outputs, name: str) -> list[Any]:
    if name not in outputs:
        raise FastServeError("INTERNAL", f"the answer has no output `{name}`, but {', '.join(outputs)}")
    return outputs[name]


def _texts(rows: list[Any]) -> list[list[str]]:
    return [[each.decode() if isinstance(each, bytes) else each for each in row] for row in rows]
