"""Embeddings, ranks and classes over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.openai_api.conftest import MODEL, FakeClient

from fastserve.openai_api.app import create_app

ENCODERS = {"minilm": "embed", "classify": "classify", "ranker": "rerank"}


@pytest.fixture
def encoders(fake: FakeClient) -> Iterator[TestClient]:
    with TestClient(
        create_app(lambda: fake, MODEL, encoders=ENCODERS), raise_server_exceptions=False
    ) as client:
        yield client


def embed(api: TestClient, **fields: Any) -> Any:
    return api.post("/v1/embeddings", json={"model": "minilm"} | fields)


def test_embeddings_of_a_list(encoders: TestClient, fake: FakeClient) -> None:
    answer = embed(encoders, input=["a", "bcd"], dimensions=2, normalize=False, truncate=True).json()
    assert [(each["index"], each["embedding"]) for each in answer["data"]] == [
        (0, [1.0, 0.5]),
        (1, [3.0, 0.5]),
    ]
    assert (answer["object"], answer["model"]) == ("list", "minilm")
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    [request] = fake.encoder_requests
    assert request.model == "minilm"
    assert request.parameters == {"dimensions": 2, "normalize": False, "truncate": True}


def test_embeddings_as_bytes(encoders: TestClient) -> None:
    [each] = embed(encoders, input="abc", encoding_format="base64").json()["data"]
    assert np.frombuffer(base64.b64decode(each["embedding"]), "<f4").tolist() == [3.0, 0.5]


def test_many_texts_are_several_requests_in_order(encoders: TestClient, fake: FakeClient) -> None:
    texts = ["x" * (1 + place % 7) for place in range(600)]
    answer = embed(encoders, input=texts).json()
    assert [each["embedding"][0] for each in answer["data"]] == [len(text) for text in texts]
    assert [len(request.columns["text"]) for request in fake.encoder_requests] == [256, 256, 88]


def test_the_most_relevant_document_is_first(encoders: TestClient, fake: FakeClient) -> None:
    body = {"model": "ranker", "query": "q", "documents": ["a", {"text": "bcd"}, "ef"], "top_n": 2}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = encoders.post(path, json=body).json()
        found = [
            (each["index"], each["relevance_score"], each["document"]["text"]) for each in answer["results"]
        ]
        assert found == [(1, 3.0, "bcd"), (2, 2.0, "ef")]
        assert answer["usage"]["total_tokens"] == 6
    answer = encoders.post("/rerank", json=body | {"return_documents": False}).json()
    assert answer["results"][0] == {"index": 1, "relevance_score": 3.0}
    assert fake.encoder_requests[0].columns == {"query": ["q"] * 3, "document": ["a", "bcd", "ef"]}


def test_classes_of_texts(encoders: TestClient, fake: FakeClient) -> None:
    body = {"model": "classify", "input": ["a", "b"], "labels": ["good", "bad"]}
    answer = encoders.post("/classify", json=body).json()
    expected = {"label": "good", "probs": [0.25, 0.75], "num_classes": 2}
    assert answer["data"] == [{"index": 0} | expected, {"index": 1} | expected]
    assert fake.encoder_requests[0].parameters == {"labels": '["good", "bad"]'}


def test_encoders_are_among_the_models(encoders: TestClient) -> None:
    assert [each["id"] for each in encoders.get("/v1/models").json()["data"]] == [MODEL, *ENCODERS]
    assert encoders.get("/v1/models/ranker").json()["id"] == "ranker"


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"input": []}, "input", 400),
        ({"input": ["a"] * 2049}, "input", 400),
        ({"input": [1, 2]}, "input", 400),
        ({"input": ["a", None]}, "input[1]", 400),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", 400),
        ({"input": "a", "priority_level": 0}, "priority_level", 400),
        ({"input": "a", "colour": 1}, "colour", 400),
        ({"input": "a", "model": "ranker"}, "model", 404),
    ],
)
def test_what_is_wrong_is_named(
    encoders: TestClient, fields: dict[str, Any], param: str, status: int
) -> None:
    answer = embed(encoders, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_server_without_encoders_says_so(api: TestClient) -> None:
    answer = embed(api, input="a")
    assert answer.status_code == 404
    assert "no encoder for embed" in answer.json()["error"]["message"]


@pytest.mark.parametrize("place", [0, 300])
def test_the_servers_refusal_names_the_clients_field(encoders: TestClient, place: int) -> None:
    answer = embed(encoders, input=["a"] * place + ["too long"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"input[{place}]")
