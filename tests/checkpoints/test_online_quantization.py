"""`--quantization`: the model computes with the rounded weights, and with no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.online_quantization import quantize, quantize_head
from fastserve.models.decoder import Decoder
from fastserve.models.linear import Linear
from fastserve.models.model_loader import load_model
from fastserve_kernels import integer_products
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS, has
from fastserve_kernels.formats.prepared import Prepared

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


@pytest.mark.parametrize(
    ("wanted", "dtype", "operators"),
    [
        ("none", "bfloat16", ("linear_int4", "linear_int8")),
        ("int8", "float32", ("linear_int4_a8", "linear_int8_a8")),
        ("auto", "float32", ("linear_int4", "linear_int8")),
        ("auto", "bfloat16", ("linear_int4_a8", "linear_int8_a8")),
    ],
)
def test_activations_are_quantized_where_that_is_asked_for_or_faster(
    wanted: str,
    dtype: str,
    operators: tuple[str, str],
    save_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has(*FLOAT_PRODUCTS):
        pytest.skip("this processor lacks extensions of AVX-512")
    monkeypatch.setattr(integer_products, "integer_products_pay", lambda dtype: True)
    directory, _ = save_model("llama", **SIZES)
    model = load_model(str(directory), dtype, quantization="int4", activation_quantization=wanted)
    assert isinstance(model, Decoder)
    found = (model.weights.layers[0].down_proj, model.weights.lm_head)
    assert tuple(each.weight.operator for each in found if isinstance(each, Linear)) == operators


@pytest.mark.parametrize("pays", [True, False])
def test_whether_integer_products_pay_is_measured(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock alone, of which one of the two operators takes twice as much."""
    clock = [0.0]

    def linear(x: torch.Tensor, weight: Prepared) -> None:
        is_slow = weight.operator.endswith("_a8") != pays
        clock[0] += 2.0 if is_slow else 1.0

    monkeypatch.setattr(integer_products.ops, "linear", linear)
    monkeypatch.setattr(integer_products.time, "perf_counter", lambda: clock[0])
    integer_products.integer_products_pay.cache_clear()
    has_kernels = has(*INTEGER_PRODUCTS)
    assert integer_products.integer_products_pay(torch.bfloat16) is (pays and has_kernels)
    integer_products.integer_products_pay.cache_clear()


@pytest.mark.parametrize(
    ("model_type", "given", "message"),
    [
        ("llama", {"activation_quantization": "int4"}, "got 'int4'; allowed: auto, none, int8"),
        (
            "llama",
            {"activation_quantization": "int8", "device": "meta"},
            "got 'int8'; allowed: auto, none on meta",
        ),
        (
            "llama",
            {"activation_quantization": "int8", "quantization": "none"},
            "got 'int8'; allowed for .* with quantization 'none': auto, none",
        ),
        ("gpt_neox", {"activation_quantization": "int8"}, "got 'int8'; allowed for .*: auto, none, because"),
    ],
)
def test_activation_quantization_that_cannot_be_done_is_refused(
    model_type: str, given: dict[str, str], message: str, save_model: Callable
) -> None:
    directory, _ = save_model(model_type)
    with pytest.raises(ModelError, match=f"activation_quantization: {message}"):
        load_model(str(directory), **given)  # type: ignore[arg-type]
