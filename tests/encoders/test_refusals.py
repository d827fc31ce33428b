"""What cannot be answered is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastserve import Encoder
from fastserve.checkpoints.model_error import ModelError
from fastserve.errors import RequestError

LABELS = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}}


@pytest.fixture
def embedder(save_encoder: Callable) -> Encoder:
    return Encoder.load(save_encoder("bert")[0])


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], r"`texts`: got \[\]; allowed: at least one text"),
        ("w1", "`texts`: got 'w1'; allowed: a list of str"),
        (3, "`texts`: got 3; allowed: a list of str"),
        (["w1", 3], r"`texts\[1\]`: got 3; allowed: a str"),
        (["w1 " * 511], r"`texts\[0\]`: got 513 tokens; allowed: 1 to 512"),
    ],
)
def test_texts(texts: Any, sentence: str, embedder: Encoder) -> None:
    with pytest.raises(RequestError, match=sentence):
        embedder.embed(texts)


@pytest.mark.parametrize("dimensions", [0, 33, -1, True, "4", 2.0])
def test_dimensions(dimensions: Any, embedder: Encoder) -> None:
    with pytest.raises(RequestError, match=r"`dimensions`: got .*; allowed: an integer from 1 to 32"):
        embedder.embed(["w1"], dimensions=dimensions)


def test_another_task(embedder: Encoder) -> None:
    with pytest.raises(RequestError, match="the model's task is `embed`; it does not classify"):
        embedder.classify(["w1"])
    with pytest.raises(RequestError, match="the model's task is `embed`; it does not rerank"):
        embedder.rerank("w1", ["w2"])


def test_labels(save_encoder: Callable) -> None:
    encoder = Encoder.load(save_encoder("bert", "sequence", **LABELS)[0])
    (found,) = encoder.classify(["w1"], labels=["yes"])
    assert found.label == "yes"
    assert list(found.scores) == ["yes"]
    with pytest.raises(RequestError, match="the model has labels of texts; it does not label_tokens"):
        encoder.label_tokens(["w1"])
    for labels, came in ((["maybe"], "'maybe'"), ([], r"\[\]"), ("yes", "'yes'")):
        with pytest.raises(RequestError, match=f"`labels`: got {came}; allowed: a list of some of no, yes"):
            encoder.classify(["w1"], labels=labels)


def test_pairs(save_encoder: Callable) -> None:
    encoder = Encoder.load(save_encoder("bert", "sequence", num_labels=1)[0])
    for query, documents, sentence in (
        (3, ["w1"], "`query`: got a value of the type int; allowed: a str"),
        ("w1", [], r"`documents`: got \[\]; allowed: at least one text"),
        ("w1", [None], r"`documents\[0\]`: got None; allowed: a str"),
        ("w1", ["w1", "w2 " * 600], r"`documents\[1\]`: got 604 tokens; allowed: 1 to 512"),
    ):
        with pytest.raises(RequestError, match=sentence):
            encoder.rerank(query, documents)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="`top_n`: got 0; allowed: an integer from 1 on"):
        encoder.rerank("w1", ["w2"], top_n=0)
    assert len(encoder.rerank("w1", ["w1", "w2 " * 600], truncate=True)) == 2


def test_options(save_encoder: Callable) -> None:
    directory, _ = save_encoder("bert")
    tried: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "float64"}, "dtype: got 'float64'; allowed: auto, bfloat16"),
        ({"quantization": "int3"}, "quantization: got 'int3'; allowed: auto, none"),
        ({"max_length": 513}, "max_length: got 513; allowed: at most 512"),
    ]
    for options, sentence in tried:
        with pytest.raises(ModelError, match=sentence):
            Encoder.load(directory, **options)
    with pytest.raises(ModelError, match="not a directory"):
        Encoder.load(directory / "config.json")
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer could be read from"):
        Encoder.load(directory)
