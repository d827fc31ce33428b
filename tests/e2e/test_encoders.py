"""Encoders on a real server, alone and beside the default model."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from hypothesis import given
from hypothesis import strategies as st

from fastserve import Encoder
from fastserve.encoders.measure_steps import measure
from fastserve.encoders.served_encoder import EncoderSettings, ServedEncoder
from fastserve_client import AsyncClient, Client, FastServeError

from ..encoder_checkpoints import save_encoder
from .conftest import fuzzing

LABELS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}
TEXTS = ["w1 w2 w3", "w4", "w5 " * 60, "w6 w7"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An embedder, two classifiers and a cross-encoder, each tiny and random."""
    root = tmp_path_factory.mktemp("encoders")
    heads: dict[str, tuple[str | None, dict[str, Any]]] = {
        "embed": (None, {}),
        "classify": ("sequence", LABELS),
        "rerank": ("sequence", {"num_labels": 1}),
        "entities": ("token", LABELS),
    }
    for name, (head, config) in heads.items():
        save_encoder(root / name, "bert", head, **config)
    return {name: root / name for name in heads}


@pytest.fixture(scope="module")
def encoders(directories: dict[str, Path]) -> dict[str, Encoder]:
    """What the server is to answer."""
    return {name: Encoder.load(directory) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def served(directories: dict[str, Path]) -> tuple[ServedEncoder, ...]:
    return tuple(_served(name, directory) for name, directory in directories.items())


def _served(name: str, directory: Path) -> ServedEncoder:
    """As `fastserve serve --encoder NAME=PATH` has it, but measured in this process, which has torch."""
    settings = EncoderSettings(model=str(directory), num_threads=1)
    return ServedEncoder(name=name, settings=settings, profile=measure(settings, min_seconds=0.0))


@pytest.fixture(scope="module")
def server(served: tuple[ServedEncoder, ...], launch: Any) -> Iterator[Any]:
    """The four alone."""
    with launch(encoders=served, encoders_only=True, openai=True) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: Any) -> Iterator[Client]:
    urls = {"grpc": server.grpc_url, "http": server.http_url}
    with Client(urls[request.param], request.param, retries=0) as client:
        yield client


def close(came: Any, wanted: Any) -> None:
    np.testing.assert_allclose(came, wanted, atol=1e-5, rtol=1e-5)


def test_the_client_gets_what_the_embedded_encoder_gives(
    client: Client, encoders: dict[str, Encoder]
) -> None:
    embedder = encoders["embed"]
    close(client.embed(TEXTS), embedder.embed(TEXTS))
    options: dict[str, Any] = {"dimensions": 7, "normalize": True}
    close(client.embed(TEXTS, **options), embedder.embed(TEXTS, **options))
    close(client.embed(["w1 " * 600], truncate=True), embedder.embed(["w1 " * 600], truncate=True))
    classes, expected = client.classify(TEXTS), encoders["classify"].classify(TEXTS)
    assert [each.label for each in classes] == [each.label for each in expected]
    for came, wanted in zip(classes, expected, strict=True):
        close(list(came.scores.values()), list(wanted.scores.values()))
    some = client.classify(TEXTS, labels=["bad", "good"])
    assert {label for each in some for label in each.scores} == {"bad", "good"}
    ranks, wanted_ranks = client.rerank("w9 w8", TEXTS), encoders["rerank"].rerank("w9 w8", TEXTS)
    assert [each.index for each in ranks] == [each.index for each in wanted_ranks]
    close([each.score for each in ranks], [each.score for each in wanted_ranks])
    assert client.rerank("w9 w8", TEXTS, top_n=1) == ranks[:1]
    tokens, wanted_tokens = (
        client.label_tokens(TEXTS, model="entities"),
        encoders["entities"].label_tokens(TEXTS),
    )
    assert [[(t.start, t.end, t.label) for t in row] for row in tokens] == [
        [(t.start, t.end, t.label) for t in row] for row in wanted_tokens
    ]


def test_openai_s_client_gets_embeddings(server: Any, encoders: dict[str, Encoder]) -> None:
    with openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="embed", input=TEXTS)  # as base64, which this client asks for
        close([each.embedding for each in answer.data], encoders["embed"].embed(TEXTS))
        lengths = [len(each) for each in encoders["embed"].tokenize_rows(TEXTS, "text", False)]
        assert answer.usage.prompt_tokens == sum(lengths)
        short = client.embeddings.create(model="embed", input=TEXTS[0], dimensions=7, encoding_format="float")
        close(short.data[0].embedding, encoders["embed"].embed(TEXTS[:1], dimensions=7)[0])
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="embed", input="w1 " * 600)
        assert caught.value.param == "input[0]"
        with pytest.raises(openai.NotFoundError, match="encoders alone"):
            client.completions.create(model="fastserve", prompt="Hello")
        assert [model.id for model in client.models.list()] == ["embed", "classify", "rerank", "entities"]


def test_ranks_and_classes_over_http(server: Any, encoders: dict[str, Encoder]) -> None:
    base = server.openai_url.removesuffix("/v1")
    ranks = _posted(f"{base}/rerank", {"model": "rerank", "query": "w9 w8", "documents": TEXTS, "top_n": 2})
    expected = encoders["rerank"].rerank("w9 w8", TEXTS, top_n=2)
    assert [each["index"] for each in ranks["results"]] == [each.index for each in expected]
    close([each["relevance_score"] for each in ranks["results"]], [each.score for each in expected])
    classes = _posted(f"{base}/classify", {"model": "classify", "input": TEXTS})
    wanted = encoders["classify"].classify(TEXTS)
    assert [each["label"] for each in classes["data"]] == [each.label for each in wanted]
    close([each["probs"] for each in classes["data"]], [list(each.scores.values()) for each in wanted])


def _posted(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_triton_servers_own_clients_get_it_too(server: Any, encoders: dict[str, Encoder]) -> None:
    for module, url in ((triton_grpc, server.grpc_url), (triton_http, server.http_url)):
        client = module.InferenceServerClient(url)
        tensor = module.InferInput("text", [len(TEXTS), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(TEXTS, dtype=object).reshape(-1, 1))
        result = client.infer(
            "embed", [tensor], parameters={"normalize": True}, priority=3, timeout=10_000_000
        )
        close(result.as_numpy("embedding"), encoders["embed"].embed(TEXTS, normalize=True))
        client.close()


def post(server: Any, model: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/{model}/generate", data=json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def test_one_text_over_generate(server: Any, encoders: dict[str, Encoder]) -> None:
    close(post(server, "embed", {"text": "w1 w2"})["embedding"], encoders["embed"].embed(["w1 w2"])[0])
    answer = post(server, "classify", {"text": "w1 w2"})
    assert json.loads(answer["scores"])[answer["label"]] == pytest.approx(answer["score"], rel=1e-6)
    (rank,) = encoders["rerank"].rerank("w1", ["w2"])
    assert post(server, "rerank", {"query": "w1", "document": "w2"})["score"] == pytest.approx(rank.score)


def test_requests_of_many_clients_are_computed_together(server: Any, encoders: dict[str, Encoder]) -> None:
    """By Triton server's batcher, each answered with its own texts and options."""
    expected = {n: encoders["embed"].embed([f"w{n % 90} w{n % 7}"] * (1 + n % 3)) for n in range(48)}
    before = server.metrics()
    found: dict[int, np.ndarray] = {}
    begin = threading.Barrier(len(expected))

    def run(number: int) -> None:
        text = f"w{number % 90} w{number % 7}"
        begin.wait()
        dimensions = 5 if number % 2 else None
        options: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
        with Client(server.grpc_url, retries=0) as client:
            for _ in range(4):
                found[number] = client.embed([text] * (1 + number % 3), **options)

    threads = [threading.Thread(target=run, args=(number,)) for number in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, came in found.items():
        close(came, expected[number][:, : 5 if number % 2 else None])
    metrics = server.metrics()
    count, texts = (
        _of(metrics, f"fastserve_encoder_batch_texts_{kind}", "embed")
        - _of(before, f"fastserve_encoder_batch_texts_{kind}", "embed")
        for kind in ("count", "sum")
    )
    assert texts == 4 * sum(1 + number % 3 for number in expected)
    assert count < 4 * len(expected) * 3 / 4  # how many go together is a matter of time
    name = 'fastserve_encoder_requests_total{model="embed",outcome="success"}'
    assert metrics[name] - before.get(name, 0) == 4 * len(expected)


def _of(metrics: dict[str, float], name: str, model: str) -> float:
    return metrics.get(f'{name}{{model="{model}"}}', 0.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda c: c.embed(["w1", "w1 " * 600]),
            r"`text\[1\]`: got 602 tokens; allowed: 1 to 512, or more with",
        ),
        (lambda c: c.embed(["w1"], dimensions=33), "`dimensions`: got 33; allowed: an integer from 1 to 32"),
        (
            lambda c: c.embed(["w1"], prompt_name="x"),
            "`prompt_name`: got 'x'; allowed: none: it has no prompts",
        ),
        (
            lambda c: c.classify(["w1"], labels=["best"]),
            "`labels`: got 'best'; allowed: a list of some of bad",
        ),
        (
            lambda c: c.embed(["w1"], model="rerank"),
            r"expected 2 inputs|unexpected inference input|got \d input",
        ),
        (lambda c: c.embed(["w1"] * 257), "batch-size must be <= 256"),
    ],
)
def test_refusals_say_what_is_allowed(call: Callable[[Client], Any], sentence: str, client: Client) -> None:
    with pytest.raises(FastServeError, match=sentence) as raised:
        call(client)
    assert raised.value.code == "INVALID_ARG"
    assert client.embed(["w1"]).shape == (1, 32)


def test_an_unknown_parameter_is_refused_by_its_name(server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(server, "embed", {"text": "w1", "dimension": 3})
    assert (
        "`dimension`: got 3; allowed: no such parameter; there are truncate" in raised.value.read().decode()
    )


def test_malformed_requests_are_all_answered(server: Any, soak: bool) -> None:
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.lists(st.integers(), max_size=3),
    )
    names = st.sampled_from(["truncate", "dimensions", "normalize", "prompt_name", "labels", "x"])

    @given(st.dictionaries(names, values, max_size=3), values)
    def send(parameters: dict[str, Any], text: Any) -> None:
        status, answer = _answer(server, {"text": text, **parameters})
        assert status == 200 or (400 <= status <= 500 and answer["error"])

    fuzzing(1000 if soak else 60)(send)()
    assert post(server, "embed", {"text": "w1"})["embedding"]


def _answer(server: Any, body: Any) -> tuple[int, Any]:
    try:
        return 200, post(server, "embed", body)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_asynchronous_client(server: Any, encoders: dict[str, Encoder]) -> None:
    import asyncio

    async def run(url: str, protocol: Any) -> Any:
        async with AsyncClient(url, protocol, retries=0) as client:
            return await client.embed(TEXTS), await client.classify(TEXTS), await client.rerank("w1", TEXTS)

    for url, protocol in ((server.grpc_url, "grpc"), (server.http_url, "http")):
        embeddings, classes, ranks = asyncio.run(run(url, protocol))
        close(embeddings, encoders["embed"].embed(TEXTS))
        assert [each.label for each in classes] == [
            each.label for each in encoders["classify"].classify(TEXTS)
        ]
        assert [each.index for each in ranks] == [
            each.index for each in encoders["rerank"].rerank("w1", TEXTS)
        ]


def test_beside_the_default_model(
    launch: Any, served: tuple[ServedEncoder, ...], encoders: dict[str, Encoder]
) -> None:
    """Both answer."""
    with (
        launch(encoders=served[:1], max_num_seqs=4, kv_cache_bytes=1 << 27) as server,
        Client(server.grpc_url, retries=0) as client,
    ):
        answer = client.generate("Hello", max_tokens=4, temperature=0.0, ignore_eos=True)
        assert answer.num_output_tokens == 4
        close(client.embed(TEXTS), encoders["embed"].embed(TEXTS))
