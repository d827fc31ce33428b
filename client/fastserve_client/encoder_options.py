"""What `embed`, `classify` and `rerank` take beside their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fastserve_client.encoder_request import EncoderRequest, encoder_request


class EncoderOptions(TypedDict, total=False):
    """Of all three."""

    model: str
    """The name under which the encoder is served; by default that of the call."""
    truncate: bool
    """Texts that are too long are cut; without it they are refused."""
    priority_level: int
    """Triton server's: 1 is the most urgent, 0 the model's default. Where the server's priorities go up to
    HIGH (10), one of FastServe's p is the level HIGH - p + 1."""
    timeout: float
    """Seconds for the whole call."""
    headers: Mapping[str, str] | None
    """Of this call, beside those of the client."""


class EmbedOptions(EncoderOptions, total=False):
    """Of `embed`."""

    prompt_name: str
    """One of the model's prompts, which is written before each text."""
    dimensions: int
    """Only the first of them, of models that were trained for it."""
    normalize: bool
    """Whether embeddings have length 1; by default as the model's files say."""


class ClassifyOptions(EncoderOptions, total=False):
    """Of `classify`."""

    labels: Sequence[str]
    """The only ones to choose from."""


class RerankOptions(EncoderOptions, total=False):
    """Of `rerank`."""

    top_n: int
    """How many documents are answered; by default all."""


def embed_request(texts: Sequence[str], options: EmbedOptions) -> tuple[EncoderRequest, float | None]:
    """The request, and the seconds that it has."""
    parameters = {name: options.get(name) for name in ("prompt_name", "dimensions", "normalize")}
    return _request("embed", {"text": texts}, options, parameters)


def classify_request(texts: Sequence[str], options: ClassifyOptions) -> tuple[EncoderRequest, float | None]:
    """The request, and the seconds that it has."""
    labels = options.get("labels")
    parameters = {"labels": None if labels is None else json.dumps(list(labels))}
    return _request("classify", {"text": texts}, options, parameters)


def rerank_request(
    query: str, documents: Sequence[str], options: RerankOptions
) -> tuple[EncoderRequest, float | None]:
    """The request, and the seconds that it has."""
    columns = {"query": [query] * len(documents), "document": documents}
    return _request("rerank", columns, options, {})


def _request(
    task: str,
    columns: Mapping[str, Sequence[str]],
    options: EncoderOptions,
    parameters: Mapping[str, Any],
) -> tuple[EncoderRequest, float | None]:
    request = encoder_request(
        options.get("model", task),
        columns,
        options.get("priority_level", 0),
        options.get("headers"),
        truncate=options.get("truncate"),
        **parameters,
    )
    return request, options.get("timeout")
