"""Perplexity, KL and agreement, against transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import fastserve.evaluation.evaluation as evaluation
from fastserve.evaluation.evaluation import evaluate
from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model

SaveTiny = Callable[..., Path]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 128, (5, 37), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def log_probabilities(directory: Path, windows: Tensor) -> Tensor:
    """Of transformers, for every predicted token: [samples, length - 1, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(windows).logits[:, :-1].log_softmax(-1)


def test_perplexity_is_that_of_transformers(save_tiny: SaveTiny, windows: Tensor) -> None:
    directory = save_tiny()
    quality = evaluate(load_model(str(directory)), None, windows)
    loss = F.nll_loss(log_probabilities(directory, windows).flatten(0, 1), windows[:, 1:].flatten())
    assert quality.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert quality.tokens == 5 * 36
    assert quality.kl is None
    assert quality.top1_agreement is None


def test_kl_and_agreement_are_those_of_transformers_distributions(
    save_tiny: SaveTiny, windows: Tensor
) -> None:
    directory, other = save_tiny(), save_tiny("qwen2")
    quality = evaluate(load_model(str(other)), load_model(str(directory)), windows)
    log_p, log_q = log_probabilities(directory, windows), log_probabilities(other, windows)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert quality.kl == pytest.approx(float(kl), rel=1e-3)
    assert quality.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
    )


def test_a_model_is_its_own_reference_without_any_distance(save_tiny: SaveTiny, windows: Tensor) -> None:
    model = load_model(str(save_tiny()))
    quality = evaluate(model, model, windows)
    assert quality.kl == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1
    assert quality.reference_perplexity == pytest.approx(quality.perplexity)


def test_how_many_logits_are_held_at_once_does_not_matter(
    save_tiny: SaveTiny, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = load_model(str(save_tiny())), load_model(str(save_tiny("qwen2")))
    whole = evaluate(model, reference, windows)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 7 * 128)
    in_chunks = evaluate(model, reference, windows)
    assert in_chunks.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert in_chunks.kl == pytest.approx(whole.kl, rel=1e-6)
    assert in_chunks.top1_agreement == whole.top1_agreement


@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_layers_may_be_loaded_one_at_a_time(
    save_tiny: SaveTiny, windows: Tensor, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for as many windows as may wait for each other."""
    directory, reference = str(save_tiny()), load_model(str(save_tiny("qwen2")))
    whole = evaluate(load_model(directory, quantization=quantization), reference, windows)
    model = load_model(directory, quantization=quantization, one_layer_at_a_time=True)
    assert isinstance(model, Decoder)
    read: list[int] = []
    layers = type(model.weights.layers)
    take = layers.__getitem__

    def watched(self: Any, index: int) -> Any:
        read.append(index)
        return take(self, index)

    monkeypatch.setattr(layers, "__getitem__", watched)
    for at_once, sweeps in ((5, 1), (2, 3), (1, 5)):
        monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", at_once * windows.shape[1])
        read.clear()
        found = evaluate(model, reference, windows)
        assert (found.perplexity, found.kl) == (pytest.approx(whole.perplexity), pytest.approx(whole.kl))
        assert [index for index in read if index < 3] == [0, 1, 2] * sweeps


def test_windows_longer_than_the_model_serves_are_refused(save_tiny: SaveTiny) -> None:
    with pytest.raises(ValueError, match="length: got 129; allowed for this model: at most 128"):
        evaluate(load_model(str(save_tiny())), None, torch.zeros(1, 129, dtype=torch.int64))


def test_a_reference_of_another_vocabulary_is_refused(save_tiny: SaveTiny, windows: Tensor) -> None:
    model, reference = load_model(str(save_tiny())), load_model(str(save_tiny("qwen2", vocab_size=99)))
    with pytest.raises(ValueError, match="reference: its vocabulary has 99 tokens, not 128"):
        evaluate(model, reference, windows)
