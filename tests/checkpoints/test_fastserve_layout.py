"""Checkpoints in FastServe's own layout, `quant_method: "fastserve"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoints.fastserve_layout import VERSION
from fastserve.models.decoder import Decoder
from fastserve.models.linear import Linear, MixedFormatLinear
from fastserve.models.model_loader import load_model
from fastserve_kernels.formats import Int4, IntRows, Weight
from fastserve_kernels.formats.weight_io import weight_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def store(weight: Weight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    fields, entry = weight_tensors(weight)
    return fields, {**entry, "shape": [weight.out_features, weight.in_features]}


def configure(entries: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "fastserve", "version": VERSION, "weights": entries}


def test_rows_of_several_widths_keep_their_places_and_biases(
    save_model: Callable,
    quantize: Callable,
    relative_error: Callable,
) -> None:
    directory, reference = save_model("qwen2", **SIZES)  # has biases

    def rows(weight: Tensor) -> Weight:
        return IntRows.pack(weight, (3 + torch.arange(len(weight)) % 4).byte(), 32, symmetric=False)

    packs: dict[str, Callable[[Tensor], Weight]] = {
        **dict.fromkeys(("q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"), rows),
        "k_proj": lambda w: Int4.pack(w, 32, symmetric=False),
    }
    dequantized = quantize(directory, packs, store, configure)
    for name, weight in dequantized.items():
        reference.get_parameter(name).data = weight
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    layer = model.weights.layers[0]
    assert isinstance(layer.qkv_proj, MixedFormatLinear)
    assert len(layer.qkv_proj.parts) == 3
    assert isinstance(layer.gate_up_proj, Linear)  # of two that are alike
    assert relative_error(model, reference) < 1e-4
