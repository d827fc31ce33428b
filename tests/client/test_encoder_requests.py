"""Requests of encoders on the wire, and what comes back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastserve_client import Classification, FastServeError, RankedDocument, TokenLabel
from fastserve_client.encoder_options import classify_request, embed_request, rerank_request
from fastserve_client.encoder_request import (
    classes_of,
    embeddings_of,
    infer_outputs,
    ranks_of,
    token_labels_of,
)
from fastserve_client.http_messages import body_of, path_of


def test_texts_are_rows_over_both_protocols() -> None:
    request, timeout = embed_request(["a", "é"], {"dimensions": 3, "truncate": True, "priority_level": 2})
    assert timeout is None
    assert path_of(request) == "/v2/models/embed/infer"
    parameters = {"dimensions": 3, "truncate": True, "priority": 2}
    assert json.loads(request.to_json(None)) == {
        "id": "",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "é"]}],
        "parameters": parameters,
    }
    message = request.to_grpc(1.5)
    (tensor,) = message.inputs
    assert (tensor.name, list(tensor.shape), tensor.datatype) == ("text", [2, 1], "BYTES")
    assert list(tensor.contents.bytes_contents) == [b"a", "é".encode()]
    came = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in message.parameters.items()
    }
    assert came == parameters | {"timeout": 1_500_000}
    assert message.parameters["truncate"].WhichOneof("parameter_choice") == "bool_param"


def test_a_query_stands_beside_each_document() -> None:
    request, timeout = rerank_request("q", ["a", "b"], {"model": "mine", "timeout": 2.0, "top_n": 1})
    assert (request.model, timeout, dict(request.parameters)) == ("mine", 2.0, {})
    assert request.columns == {"query": ["q", "q"], "document": ["a", "b"]}


def test_labels_travel_as_json() -> None:
    request, _ = classify_request(["a"], {"labels": ["x", "y"]})
    assert request.parameters == {"labels": '["x", "y"]'}


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [("a", "`text`: got 'a'; allowed: a list of str"), ([], "`text`: got none"), ([1], r"`text`: got \[1\]")],
)
def test_what_is_no_list_of_texts_is_refused(texts: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        embed_request(texts, {})


def test_answers() -> None:
    embeddings = embeddings_of({"embedding": [[1.0, 2.0], [3.0, 4.0]]})
    assert embeddings.dtype == np.float32
    assert embeddings.tolist() == [[1, 2], [3, 4]]
    classes = classes_of(
        {"label": [["x"], [b"y"]], "score": [[0.75], [0.5]], "scores": [['{"x": 0.75}'], [b'{"y": 0.5}']]}
    )
    assert classes == [Classification("x", 0.75, {"x": 0.75}), Classification("y", 0.5, {"y": 0.5})]
    tokens = token_labels_of({"tokens": [['[{"start": 0, "end": 2, "label": "x", "score": 0.5}]'], [b"[]"]]})
    assert tokens == [[TokenLabel(0, 2, "x", 0.5)], []]
    scores = {"score": [[0.25], [0.75], [0.25]]}
    assert ranks_of(scores, None) == [
        RankedDocument(1, 0.75),
        RankedDocument(0, 0.25),
        RankedDocument(2, 0.25),
    ]
    assert ranks_of(scores, 1) == [RankedDocument(1, 0.75)]
    with pytest.raises(FastServeError, match="the answer has no output `embedding`, but score"):
        embeddings_of(scores)


def test_a_body_is_read_when_it_has_ended() -> None:
    outputs = [{"name": "embedding", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]
    content = json.dumps({"outputs": outputs}).encode()
    assert infer_outputs(content) == {"embedding": [[1, 2], [3, 4]]}
    body = body_of(embed_request(["a"], {})[0])
    for byte in range(0, len(content), 7):
        body.feed(content[byte : byte + 7])
        assert body.next_outputs() is None
    assert body.end() == {"embedding": [[1, 2], [3, 4]]}
    assert body.end() is None
