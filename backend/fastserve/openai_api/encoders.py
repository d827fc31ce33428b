"""`/v1/embeddings`, `/rerank` and `/classify`: answers of encoders in the shapes that clients have."""

from __future__ import annotations

import asyncio
import base64
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from fastserve.openai_api.body import read_body
from fastserve.openai_api.errors import refusal, server_refusal
from fastserve.openai_api.front_door import FrontDoor
from fastserve.openai_api.generation_fields import forwarded_headers
from fastserve.openai_api.http_answers import json_response, until_gone
from fastserve_client import FastServeError
from fastserve_client.encoder_options import classify_request, embed_request, rerank_request
from fastserve_client.encoder_request import (
    EncoderRequest,
    classes_of,
    embeddings_of,
    num_tokens_of,
    ranks_of,
)
from fastserve_client.generation import Outputs

MAX_TEXTS = 2048
"""Of a request, as in OpenAI's reference."""
TEXTS_AT_ONCE = 256
"""That a request to Triton server takes; more texts are several requests, which its batcher may join."""
ENCODING_FORMATS = ("float", "base64")
_INDEX = re.compile(r"^(`\w+\[)(\d+)")
NAMES = {"text": "input", "document": "documents"}
"""What a client calls an input of the model."""


class EncoderFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What all three bodies have."""

    model: str
    truncate: bool | None = None
    """Texts that are too long are cut; without it they are refused."""
    priority_level: int | None = None
    """Triton server's own: 1 is the most urgent."""
    user: str | None = None
    """Without effect: encoders know no tenants but those of keys."""


class EmbeddingsRequest(EncoderFields, kw_only=True):
    """The body of `/v1/embeddings`."""

    input: str | list[Any]
    encoding_format: str = "float"
    dimensions: int | None = None
    prompt_name: str | None = None
    normalize: bool | None = None


class RerankRequest(EncoderFields, kw_only=True):
    """The body of `/rerank`, as Cohere and Jina have it."""

    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool = True


class ClassifyRequest(EncoderFields, kw_only=True):
    """The body of `/classify`, as vLLM has it."""

    input: str | list[Any]
    labels: list[str] | None = None
    """The only ones to choose from."""


async def embeddings(request: Request) -> Response:
    """The embeddings of one text or several. Raises ApiError."""
    body = await read_body(request, EmbeddingsRequest)
    if body.encoding_format not in ENCODING_FORMATS:
        raise refusal(
            "encoding_format", f"got {body.encoding_format!r}; allowed: {', '.join(ENCODING_FORMATS)}"
        )
    options = _options(request, body, "embed")
    for name in ("dimensions", "prompt_name", "normalize"):
        options[name] = getattr(body, name)
    answers = await _inferred(request, _texts(body.input), lambda texts: embed_request(texts, options))
    vectors = [vector for answer in answers for vector in embeddings_of(answer)]
    shape = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
    data = [
        {"object": "embedding", "index": index, "embedding": shape(vector)}
        for index, vector in enumerate(vectors)
    ]
    return json_response({"object": "list", "model": body.model, "data": data, "usage": _usage(answers)})


async def rerank(request: Request) -> Response:
    """The documents, the most relevant to the query first. Raises ApiError."""
    body = await read_body(request, RerankRequest)
    if body.top_n is not None and body.top_n < 1:
        raise refusal("top_n", f"got {body.top_n}; allowed: at least 1")
    options = _options(request, body, "rerank")
    texts = _checked("documents", [_document(place, each) for place, each in enumerate(body.documents)])
    answers = await _inferred(request, texts, lambda some: rerank_request(body.query, some, options))
    scores = {"score": [score for answer in answers for score in answer["score"]]}
    results = [
        {"index": each.index, "relevance_score": each.score}
        | ({"document": {"text": texts[each.index]}} if body.return_documents else {})
        for each in ranks_of(scores, body.top_n)
    ]
    return json_response(
        {"id": _new_id("rerank"), "model": body.model, "results": results, "usage": _usage(answers)}
    )


async def classify(request: Request) -> Response:
    """The label of one text or several. Raises ApiError."""
    body = await read_body(request, ClassifyRequest)
    options = _options(request, body, "classify") | {"labels": body.labels}
    answers = await _inferred(request, _texts(body.input), lambda texts: classify_request(texts, options))
    if any("tokens" in answer for answer in answers):
        raise refusal("model", f"got {body.model!r}, which labels tokens; allowed: one that labels texts")
    found = [each for answer in answers for each in classes_of(answer)]
    data = [
        {
            "index": index,
            "label": each.label,
            "probs": list(each.scores.values()),
            "num_classes": len(each.scores),
        }
        for index, each in enumerate(found)
    ]
    return json_response(
        {
            "id": _new_id("classify"),
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": _usage(answers),
        }
    )


def _options(request: Request, body: EncoderFields, task: str) -> Any:
    door: FrontDoor = request.app.state.door
    door.check_encoder(body.model, task)
    options: dict[str, Any] = {"model": body.model, "headers": forwarded_headers(request.headers)}
    if body.truncate is not None:
        options["truncate"] = body.truncate
    if body.priority_level is not None:
        if body.priority_level < 1:
            raise refusal("priority_level", f"got {body.priority_level}; allowed: from 1, the most urgent")
        options["priority_level"] = body.priority_level
    return options


def _texts(given: str | list[Any]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if any(isinstance(each, int | list) for each in texts):
        raise refusal(
            "input", "got token ids; allowed: a text or a list of texts, which the model's tokenizer reads"
        )
    for place, each in enumerate(texts):
        if not isinstance(each, str):
            raise refusal(f"input[{place}]", f"got {each!r:.80}; allowed: a text")
    return _checked("input", texts)


def _checked(name: str, texts: list[str]) -> list[str]:
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise refusal(name, f"got {len(texts)} texts; allowed: from 1 to {MAX_TEXTS}")
    return texts


def _document(place: int, document: str | dict[str, Any]) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise refusal(f"documents[{place}]", 'got no text; allowed: a text, or an object {"text": ...}')
    return text


async def _inferred(
    request: Request,
    texts: Sequence[str],
    request_of: Callable[[Sequence[str]], tuple[EncoderRequest, float | None]],
) -> list[Outputs]:
    """The answers for all texts, in order. Raises ApiError."""
    client = request.app.state.door.client

    async def infer(first: int) -> Outputs:
        """The answer for the texts from this one on."""
        try:
            return await client.infer(*request_of(texts[first : first + TEXTS_AT_ONCE]))
        except FastServeError as error:
            message = _INDEX.sub(lambda found: f"{found[1]}{int(found[2]) + first}", error.message)
            raise FastServeError(error.code, message) from error

    work = asyncio.gather(*map(infer, range(0, len(texts), TEXTS_AT_ONCE)))
    try:
        return list(await until_gone(request, work))
    except FastServeError as error:
        raise server_refusal(error, NAMES) from error


def _base64(vector: np.ndarray) -> str:
    """As OpenAI's clients ask for it: the bytes of its float32 numbers, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _usage(answers: Sequence[Outputs]) -> dict[str, int]:
    num_tokens = sum(map(num_tokens_of, answers))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
