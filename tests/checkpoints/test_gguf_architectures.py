"""GGUF files of models that transformers' own modules compute, each against the model it was written from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from fastserve.checkpoints.gguf_architectures import ARCHITECTURES, DECODERS
from fastserve.models.model_loader import load_model
from fastserve.models.transformers_model import TransformersModel

Case = tuple[str, dict[str, Any], dict[str, Any]]
GEMMA = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
SIZES = {"hidden_size": 64, "intermediate_size": 96}
CASES: dict[str, Case] = {
    "gemma": ("gemma", GEMMA, {}),
    "gemma2": (
        "gemma2",
        GEMMA
        | {
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.sliding_window": 6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": ("phi3", SIZES | {"sliding_window": 6}, {"attention.sliding_window": 6}),
    "granite": (
        "granite",
        SIZES
        | {
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_bias": True,
        },
        {"attention.scale": 0.2, "logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 3.0},
    ),
    "smollm3": ("smollm3", SIZES | {"num_hidden_layers": 5, "tie_word_embeddings": True}, {}),
    "stablelm": (
        "stablelm",
        SIZES | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "use_qkv_bias": True},
        {"rope.dimension_count": 8, "attention.layer_norm_epsilon": 1e-5},
    ),
    "olmo2": ("olmo2", SIZES, {}),
    "starcoder2": (
        "starcoder2",
        SIZES | {"tie_word_embeddings": True, "sliding_window": None, "norm_epsilon": 1e-5},
        {"attention.layer_norm_epsilon": 1e-5},
    ),
}


def test_every_architecture_is_tried() -> None:
    assert CASES.keys() | set(DECODERS) == ARCHITECTURES.keys()


@pytest.mark.parametrize("tensor_type", [Type.F32, Type.Q8_0])
@pytest.mark.parametrize("architecture", CASES)
def test_logits_equal_those_of_the_model_that_was_written(
    architecture: str,
    tensor_type: Type,
    save_model: Callable,
    write_gguf: Callable,
    equals_transformers: Callable,
) -> None:
    model_type, config, metadata = CASES[architecture]
    _, reference = save_model(model_type, **config)
    model = load_model(str(write_gguf(reference, architecture, tensor_type, metadata)), "float32")
    assert isinstance(model, TransformersModel)
    assert model.max_position == 256
    equals_transformers(model, reference)
