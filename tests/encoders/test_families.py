"""Every family and head against transformers, on texts of all lengths, in batches and alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve import Encoder
from fastserve.checkpoints.model_error import ModelError

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert"]
HEADED = ["bert", "roberta", "distilbert", "mpnet", "modernbert"]
LABELS: dict[str, Any] = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}


def close(came: Any, wanted: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(came), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_transformers(
    family: str, save_encoder: Callable, hidden_states: Callable, texts: list[str]
) -> None:
    directory, model = save_encoder(family)
    expected = [states.mean(0) for states in hidden_states(directory, model, texts)]
    encoder = Encoder.load(directory)
    assert encoder.task == "embed"
    came = encoder.embed(texts)
    assert came.dtype == np.float32
    close(came, torch.stack(expected))
    close(encoder.embed(texts[::-1])[::-1].copy(), came)
    close(encoder.embed(texts[2:3])[0], came[2])


@pytest.mark.parametrize("family", HEADED)
def test_classes_are_those_of_transformers(
    family: str, save_encoder: Callable, reference_inputs: Callable, texts: list[str]
) -> None:
    """softmax(h W^T + b)."""
    directory, model = save_encoder(family, "sequence", **LABELS)
    with torch.inference_mode():
        logits = torch.cat([model(**reference_inputs(directory, text)).logits for text in texts])
    encoder = Encoder.load(directory)
    assert encoder.task == "classify"
    found = encoder.classify(texts)
    close([list(each.scores.values()) for each in found], logits.softmax(-1))
    assert [each.label for each in found] == [LABELS["id2label"][int(row)] for row in logits.argmax(-1)]
    assert [each.score for each in found] == [max(each.scores.values()) for each in found]


@pytest.mark.parametrize("family", HEADED)
def test_labels_of_tokens_are_those_of_transformers(
    family: str, save_encoder: Callable, reference_inputs: Callable, texts: list[str]
) -> None:
    directory, model = save_encoder(family, "token", **LABELS)
    encoder = Encoder.load(directory)
    found = encoder.label_tokens(texts)
    for text, labels in zip(texts, found, strict=True):
        with torch.inference_mode():
            scores = model(**reference_inputs(directory, text)).logits[0, 1:-1].softmax(-1)
        assert [text[label.start : label.end] for label in labels] == text.split()
        close([label.score for label in labels], scores.amax(-1).tolist())
        assert [label.label for label in labels] == [
            LABELS["id2label"][int(row)] for row in scores.argmax(-1)
        ]


@pytest.mark.parametrize("family", HEADED)
@pytest.mark.parametrize("activation", [None, "Identity"])
def test_pairs_are_scored_as_by_transformers(
    family: str, activation: str | None, save_encoder: Callable, reference_inputs: Callable, words: Callable
) -> None:
    written = {"activation_fn": f"torch.nn.modules.linear.{activation}"}
    config: dict[str, Any] = {"num_labels": 1} | ({"sentence_transformers": written} if activation else {})
    directory, model = save_encoder(family, "sequence", **config)
    query, documents = words(5), [words(length) for length in (3, 200, 40, 1)]
    with torch.inference_mode():
        logits = torch.cat(
            [model(**reference_inputs(directory, (query, document))).logits[0] for document in documents]
        )
    expected = logits if activation else logits.sigmoid()
    encoder = Encoder.load(directory)
    assert encoder.task == "rerank"
    found = encoder.rerank(query, documents)
    assert [each.index for each in found] == expected.argsort(descending=True).tolist()
    close([each.score for each in found], expected.sort(descending=True).values)
    assert encoder.rerank(query, documents, top_n=2) == found[:2]


def test_several_labels_at_once_have_a_sigmoid_each(save_encoder: Callable, words: Callable) -> None:
    config = LABELS | {"problem_type": "multi_label_classification"}
    directory, model = save_encoder("bert", "sequence", **config)
    encoder = Encoder.load(directory)
    (found,) = encoder.classify([words(9)])
    ids = encoder.parts.tokenizer.encode([words(9)], 99, False, "texts")[0].token_ids
    with torch.inference_mode():
        close(list(found.scores.values()), model(torch.tensor([ids])).logits[0].sigmoid())


def test_a_padding_token_in_a_text_has_the_padding_s_position(
    save_encoder: Callable, hidden_states: Callable
) -> None:
    """As transformers counts RoBERTa's positions, in a batch too."""
    directory, model = save_encoder("roberta")
    texts = ["w1 [PAD] w2 w3", "w4", "[PAD] [PAD] w5"]
    ids = [[0, 5, 1, 6, 7, 2], [0, 8, 2], [0, 1, 1, 9, 2]]
    with torch.inference_mode():
        expected = [
            model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).last_hidden_state[0].mean(0)
            for row in ids
        ]
    encoder = Encoder.load(directory)
    sequences = encoder.parts.tokenizer.encode(texts, 99, False, "texts")
    assert [sequence.token_ids for sequence in sequences] == ids
    close(encoder.compute(sequences), torch.stack(expected))


@pytest.mark.parametrize("family", ["albert", "electra"])
def test_another_encoder_is_computed_by_transformers(
    family: str, tmp_path: Path, reference_inputs: Callable, save_other: Callable, words: Callable
) -> None:
    directory, model = save_other(family)
    texts = [words(length) for length in (3, 90, 1)]
    with torch.inference_mode():
        expected = [model(**reference_inputs(directory, text)).last_hidden_state[0].mean(0) for text in texts]
    close(Encoder.load(directory).embed(texts), torch.stack(expected))
    with pytest.raises(ModelError, match=r"quantization: got 'w8a8'; allowed for .*: auto, none"):
        Encoder.load(directory, quantization="w8a8")


def test_old_names_of_norms_and_a_body_without_a_prefix_are_read(
    save_encoder: Callable, words: Callable
) -> None:
    directory, _ = save_encoder("bert", "sequence", **LABELS)
    expected = Encoder.load(directory).classify([words(7)])
    file = directory / "model.safetensors"
    tensors = {_old(name): tensor for name, tensor in load_file(file).items()}
    assert any(name.endswith("LayerNorm.gamma") for name in tensors)
    save_file(tensors, file)
    assert Encoder.load(directory).classify([words(7)]) == expected
    save_file({name.removeprefix("bert."): tensor for name, tensor in tensors.items()}, file)
    assert Encoder.load(directory).classify([words(7)]) == expected


def _old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_a_checkpoint_that_does_not_fit_is_refused_by_the_names_of_its_tensors(
    save_encoder: Callable,
) -> None:
    directory, _ = save_encoder("bert", "sequence", **LABELS)
    file = directory / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "classifier.bias"}, file)
    with pytest.raises(ModelError, match=r"missing tensors: classifier\.bias"):
        Encoder.load(directory)
    save_file(tensors | {"bert.embeddings.LayerNorm.weight": torch.ones(31)}, file)
    with pytest.raises(ModelError, match=r"misshapen tensors: embeddings\.LayerNorm\.weight \[31\]"):
        Encoder.load(directory)
    save_file(tensors | {"bert.encoder.layer.0.adapter.weight": torch.ones(3)}, file)
    with pytest.raises(ModelError, match=r"unexpected tensors: encoder\.layer\.0\.adapter\.weight"):
        Encoder.load(directory)


@pytest.mark.parametrize(
    ("family", "config", "sentence"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act: got 'mish'; allowed: 'gelu'"),
        ("bert", {"is_decoder": True}, "is_decoder: got True; allowed: False"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets: got 16"),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_its_field(
    family: str, config: dict[str, Any], sentence: str, save_encoder: Callable
) -> None:
    directory, _ = save_encoder(family, **config)
    with pytest.raises(ModelError, match=sentence):
        Encoder.load(directory)
