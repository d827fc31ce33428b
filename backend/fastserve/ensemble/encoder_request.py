"""A request of a served encoder: its texts, and the request parameters, each taken or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from fastserve.encoders.encoder import Encoder
from fastserve.encoders.ragged_batch import TokenSequence
from fastserve.ensemble.admitted_request import AdmittedRequest
from fastserve.errors import invalid
from fastserve.text.validation import coerce, decode_text

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "embed": ("truncate", "prompt_name", "dimensions", "normalize"),
    "classify": ("truncate", "labels"),
    "rerank": ("truncate",),
}
"""The request parameters of each task."""
OF_TRITON_SERVER = ("id", "timeout", "priority", "binary_data_output")
"""Request parameters that Triton server reads itself, and hands on."""


@dataclass(frozen=True)
class EncoderRequest:
    """A request that has been read, and tokenized."""

    sender: Any
    """Of the response."""
    texts: Sequence[str]
    sequences: Sequence[TokenSequence]
    truncate: bool
    dimensions: int | None = None
    normalize: bool | None = None
    label_rows: Sequence[int] = ()
    admitted: AdmittedRequest | None = None
    """None until it is let in."""

    @property
    def num_tokens(self) -> int:
        """Of all its texts."""
        return sum(map(len, self.sequences))


def read_request(
    encoder: Encoder, request: Any, parameters: Mapping[str, Any], sender: Any
) -> EncoderRequest:
    """Raises RequestError naming the input or the parameter."""
    options = _options(encoder.task, parameters)
    truncate = coerce("truncate", options.get("truncate", False), bool)
    if encoder.task == "rerank":
        queries, documents = _texts(request, "query"), _texts(request, "document")
        pairs = list(zip(queries, documents, strict=True))
        return EncoderRequest(sender, documents, encoder.tokenize_rows(pairs, "document", truncate), truncate)
    texts = _texts(request, "text")
    if encoder.task == "classify":
        labels = options.get("labels")
        rows = encoder.label_rows(None if labels is None else coerce("labels", labels, list[str]))
        sequences = encoder.tokenize_rows(texts, "text", truncate)
        return EncoderRequest(sender, texts, sequences, truncate, label_rows=rows)
    dimensions, normalize = options.get("dimensions"), options.get("normalize")
    if dimensions is not None:
        dimensions = encoder.check_dimensions(coerce("dimensions", dimensions, int))
    if normalize is not None:
        normalize = coerce("normalize", normalize, bool)
    prompted = encoder.with_prompt(texts, options.get("prompt_name"))
    sequences = encoder.tokenize_rows(prompted, "text", truncate)
    return EncoderRequest(sender, texts, sequences, truncate, dimensions, normalize)


def _options(task: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in parameters.items() if name not in OF_TRITON_SERVER}
    for name, value in found.items():
        if name not in OPTIONS[task]:
            raise invalid(name, value, f"no such parameter; there are {', '.join(OPTIONS[task])}")
    return found


def _texts(request: Any, name: str) -> list[str]:
    array = pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
    return [decode_text(f"{name}[{number}]", value) for number, value in enumerate(array)]
