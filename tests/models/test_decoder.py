"""Our decoder against transformers' models of the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastserve.models.decoder import Decoder
from fastserve.models.model_loader import load_model

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 6, "head_dim": 12}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(
    family: str,
    save_model: Callable,
    equals_transformers: Callable,
) -> None:
    model_type, config = FAMILIES[family]
    directory, reference = save_model(model_type, **config)
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    assert model.dtype == torch.float32
    equals_transformers(model, reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision(
    dtype: str,
    tolerance: float,
    save_model: Callable,
    sequences: list[list[int]],
    logits_over_paged_cache: Callable,
    relative_error: Callable,
) -> None:
    directory, reference = save_model("llama")
    model = load_model(str(directory), dtype)
    assert model.dtype == getattr(torch, dtype)
    assert logits_over_paged_cache(model, sequences[:1])[0].dtype == torch.float32
    assert relative_error(model, reference) < tolerance


def test_sizes(save_model: Callable) -> None:
    directory, _ = save_model("llama", head_dim=32)
    model = load_model(str(directory))
    assert model.vocab_size == 199
    assert model.max_position == 256
    assert model.kv_cache_shapes(5, 16) == [((5, 16, 2, 32), (5, 16, 2, 32))] * 3
