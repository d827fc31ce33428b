"""How hidden states become embeddings, as sentence-transformers' files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastserve import Encoder
from fastserve.checkpoints.model_error import ModelError
from fastserve.errors import RequestError

POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda states: states[0],
    "max": lambda states: states.max(0).values,
    "mean": lambda states: states.mean(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean": lambda states: (
        (states * torch.arange(1, len(states) + 1)[:, None]).sum(0) / sum(range(len(states) + 1))
    ),
    "lasttoken": lambda states: states[-1],
}
OLD_FIELDS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def close(came: Any, wanted: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(came), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.fixture
def bert(
    save_encoder: Callable, hidden_states: Callable, words: Callable
) -> tuple[Path, list[str], list[Tensor]]:
    """A directory, texts, and the hidden states of each."""
    directory, model = save_encoder("bert")
    texts = [words(length) for length in (3, 1, 60)]
    return directory, texts, hidden_states(directory, model, texts)


@pytest.mark.parametrize("mode", POOLED)
def test_pooling(mode: str, bert: Any, sentence_transformer: Callable) -> None:
    directory, texts, states = bert
    expected = torch.stack([POOLED[mode](each) for each in states])
    for config in ({OLD_FIELDS[mode]: True}, {"pooling_mode": mode}):
        sentence_transformer(directory, config)
        close(Encoder.load(directory).embed(texts), expected)


def test_several_poolings_lie_one_behind_the_other_and_are_normed_together(
    bert: Any, sentence_transformer: Callable
) -> None:
    directory, texts, states = bert
    sentence_transformer(
        directory, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, normalize=True
    )
    encoder = Encoder.load(directory)
    assert encoder.dimensions == 64
    both = torch.stack([torch.cat((each[0], each.mean(0))) for each in states])
    close(encoder.embed(texts), both / both.norm(dim=1, keepdim=True))
    close(encoder.embed(texts, normalize=False), both)
    first = both[:, :5]
    close(encoder.embed(texts, dimensions=5), first / first.norm(dim=1, keepdim=True))


def test_prompts_are_written_before_a_text(bert: Any, sentence_transformer: Callable) -> None:
    directory, texts, _ = bert
    plain = Encoder.load(directory)
    sentence_transformer(
        directory,
        {"pooling_mode_mean_tokens": True},
        prompts={"query": "w7 w8 ", "document": ""},
        default_prompt_name="query",
    )
    encoder = Encoder.load(directory)
    asked = plain.embed([f"w7 w8 {text}" for text in texts])
    close(encoder.embed(texts), asked)
    close(encoder.embed(texts, prompt_name="query"), asked)
    close(encoder.embed(texts, prompt_name="document"), plain.embed(texts))
    with pytest.raises(RequestError, match="`prompt_name`: got 'other'; allowed: one of query, document"):
        encoder.embed(texts, prompt_name="other")
    with pytest.raises(RequestError, match="`prompt_name`: got 'query'; allowed: none: it has no prompts"):
        plain.embed(texts, prompt_name="query")


def test_a_dense_module_stands_behind_the_pooling(
    bert: Any, sentence_transformer: Callable, write_json: Callable
) -> None:
    directory, texts, states = bert
    sentence_transformer(directory, {"pooling_mode_mean_tokens": True})
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    write_json(directory / "modules.json", modules)
    config = {"in_features": 32, "out_features": 8, "bias": True}
    write_json(
        directory / "2_Dense" / "config.json",
        config | {"activation_function": "torch.nn.modules.activation.Tanh"},
    )
    weight, bias = torch.randn(8, 32), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, directory / "2_Dense" / "model.safetensors")
    encoder = Encoder.load(directory)
    assert encoder.dimensions == 8
    expected = torch.tanh(torch.stack([each.mean(0) for each in states]) @ weight.T + bias)
    close(encoder.embed(texts), expected / expected.norm(dim=1, keepdim=True))


def test_lower_case_and_the_longest_text_are_those_of_the_files(
    bert: Any, sentence_transformer: Callable, words: Callable
) -> None:
    directory, _, _ = bert
    plain = Encoder.load(directory)
    sentence_transformer(directory, {"pooling_mode_mean_tokens": True}, do_lower_case=True, max_seq_length=10)
    encoder = Encoder.load(directory)
    assert encoder.max_length == 10
    close(encoder.embed(["W7 W8"]), plain.embed(["w7 w8"]))
    long = words(30)
    sentence = r"`texts\[1\]`: got 32 tokens; allowed: 1 to 10, or more with `truncate: true`"
    with pytest.raises(RequestError, match=sentence):
        encoder.embed(["w1", long])
    close(encoder.embed([long], truncate=True), plain.embed([" ".join(long.split()[:8])]))
    assert Encoder.load(directory, max_length=40).embed([long]).shape == (1, 32)


@pytest.mark.parametrize(
    ("pooling", "sentence"),
    [
        ({}, "pooling_mode: got None; allowed: cls, max, mean"),
        ({"pooling_mode": "median"}, "pooling_mode: got 'median'; allowed: cls, max, mean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt: got False; allowed: True"),
    ],
)
def test_files_that_are_not_followed_are_refused_by_their_field(
    pooling: dict[str, Any], sentence: str, bert: Any, sentence_transformer: Callable
) -> None:
    directory, _, _ = bert
    sentence_transformer(directory, pooling)
    with pytest.raises(ModelError, match=sentence):
        Encoder.load(directory)


def test_an_unknown_module_is_refused(bert: Any, write_json: Callable) -> None:
    directory, _, _ = bert
    write_json(directory / "modules.json", [{"path": "", "type": "sentence_transformers.models.WordWeights"}])
    with pytest.raises(ModelError, match="got a module 'WordWeights'; allowed: Transformer, Pooling"):
        Encoder.load(directory)


def test_a_decoder_embeds_by_its_last_token(
    save_decoder: Callable, sentence_transformer: Callable, hidden_states: Callable, words: Callable
) -> None:
    """The shape of Qwen3-Embedding."""
    directory, model = save_decoder("qwen3")
    with pytest.raises(ModelError, match=r"a decoder \('qwen3'\) without modules\.json"):
        Encoder.load(directory)
    sentence_transformer(directory, {"pooling_mode_lasttoken": True}, normalize=True)
    texts = [words(length) for length in (40, 1, 17, 90)]
    last = torch.stack([each[-1] for each in hidden_states(directory, model, texts)])
    encoder = Encoder.load(directory)
    close(encoder.embed(texts), last / last.norm(dim=1, keepdim=True))
    close(encoder.embed(texts[1:2]), encoder.embed(texts)[1:2])


def test_minilm_embeds_as_transformers_does(minilm: Path, hidden_states: Callable) -> None:
    from transformers import AutoModel

    encoder = Encoder.load(minilm)
    assert encoder.max_length == 256
    texts = ["", "A man is eating food.", "The girl is carrying a baby.", "word " * 250]
    pooled = torch.stack(
        [states.mean(0) for states in hidden_states(minilm, AutoModel.from_pretrained(minilm), texts)]
    )
    close(encoder.embed(texts), pooled / pooled.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("options", "cosine"), [({"quantization": "w8a8"}, 0.999), ({"dtype": "bfloat16"}, 0.9995)]
)
def test_minilm_in_fewer_bits_embeds_nearly_the_same(
    options: dict[str, Any], cosine: float, minilm: Path, sentence_pairs: list[tuple[str, str]]
) -> None:
    """Also the order of pairs by their similarity: Spearman's rank correlation."""
    texts = [text for pair in sentence_pairs for text in pair]
    exact, rounded = Encoder.load(minilm).embed(texts), Encoder.load(minilm, **options).embed(texts)
    assert (exact * rounded).sum(1).min() >= cosine
    ranks = [
        (each[::2] * each[1::2]).sum(1).argsort().argsort().astype(np.float64) for each in (exact, rounded)
    ]
    assert np.corrcoef(*ranks)[0, 1] >= 0.998
