"""`--quantization`: the model computes with the rounded weights, and with no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.online_quantization import quantize, quantize_head
from fastserve.models.decoder import Decoder
from fastserve.models.linear import Linear
from fastserve.models.model_loader import load_model

SIZES = {"hidden_size": 64, "intermediate_size": 96}
OPERATORS = {
    "none": ("linear", "linear"),
    "int4": ("linear_int4", "linear_int8"),
    "nf4": ("linear_nf4", "linear_int8"),
    "int8": ("linear_int8", "linear_int8"),
    "fp8": ("linear_fp8", "linear_int8"),
    "w8a8": ("linear_w8a8", "linear_int8"),
}
"""Of the layers and of the head."""


def round_weights(model: PreTrainedModel, quantization: str) -> None:
    """Rounds the matrices of transformers' own model as loading does."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name:
            rounding = quantize_head if "lm_head" in name else quantize
            parameter.data = rounding(name, parameter.data, quantization).dequantize()


@pytest.mark.parametrize("quantization", OPERATORS)
def test_logits_are_those_of_the_rounded_weights(
    quantization: str,
    save_model: Callable,
    relative_error: Callable,
) -> None:
    directory, reference = save_model("llama", **SIZES)
    model = load_model(str(directory), "float32", quantization=quantization)
    assert isinstance(model, Decoder)
    down, head = model.weights.layers[0].down_proj, model.weights.lm_head
    assert isinstance(down, Linear)
    assert isinstance(head, Linear)
    assert (down.weight.operator, head.weight.operator) == OPERATORS[quantization]
    round_weights(reference, quantization)
    # The activations of w8a8 are rounded too, which transformers does not do.
    tolerance = 0.03 if quantization == "w8a8" else 1e-5
    assert relative_error(model, reference) < tolerance


def test_rows_without_whole_groups_are_refused(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    with pytest.raises(ModelError, match=r"q_proj\.weight: rows of 48 .* multiples of 32"):
        load_model(str(directory), quantization="int4")
    layer = load_model(str(directory), "float32", quantization="int8").weights.layers[0]  # type: ignore[attr-defined]
    assert layer.qkv_proj.weight.arguments[-1] == 48  # one scale for a whole row


def test_unknown_quantization_is_refused(save_model: Callable) -> None:
    directory, _ = save_model("llama")
    with pytest.raises(ModelError, match=r"quantization: got .int3.; allowed: auto, none, int4"):
        load_model(str(directory), quantization="int3")


def test_models_of_transformers_own_code_are_not_quantized(save_model: Callable) -> None:
    directory, _ = save_model("gpt_neox")
    with pytest.raises(ModelError, match=r"got .int8.; allowed for .*: auto, none"):
        load_model(str(directory), quantization="int8")
