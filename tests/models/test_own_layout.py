"""Checkpoints in FastServe's own layout, `quant_method: "fastserve"`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.models.decoder import Decoder
from fastserve.models.linear import LinearRows
from fastserve.models.loading import load_model
from fastserve.models.own_layout import VERSION
from fastserve_kernels.formats import Int4, IntRows, Weight
from fastserve_kernels.weight_tensors import weight_tensors

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def quantise(directory: Path, packs: dict[str, Callable[[Tensor], Weight]]) -> dict[str, Tensor]:
    """Packs the linears of a saved model by their last name; returns what they stand for, by full name."""
    tensors, entries, dequantised = load_file(directory / "model.safetensors"), {}, {}
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        pack = packs.get(module.rpartition(".")[2])
        if pack is not None and name.endswith(".weight"):
            weight = pack(tensors.pop(name))
            fields, entry = weight_tensors(weight)
            tensors |= {f"{module}.{field}": tensor for field, tensor in fields.items()}
            entries[module] = {**entry, "shape": [weight.out_features, weight.in_features]}
            dequantised[name] = weight.dequantize()
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fastserve", "version": VERSION, "weights": entries}
    (directory / "config.json").write_text(json.dumps(config))
    return dequantised


def test_rows_of_several_widths_keep_their_places_and_biases(
    save_model: Callable,
    sequences: list[list[int]],
    logits_over_paged_cache: Callable,
    transformers_logits: Callable,
) -> None:
    directory, reference = save_model("qwen2", **SIZES)  # has biases

    def rows(weight: Tensor) -> Weight:
        return IntRows.pack(weight, (3 + torch.arange(len(weight)) % 4).byte(), 32, symmetric=False)

    packs = dict.fromkeys(("q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"), rows)
    dequantised = quantise(directory, {**packs, "k_proj": lambda w: Int4.pack(w, 32, symmetric=False)})
    for name, weight in dequantised.items():
        reference.get_parameter(name).data = weight
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    layer = model.weights.layers[0]
    assert isinstance(layer.qkv, LinearRows)
    assert len(layer.qkv.parts) == 2
    found = torch.cat(logits_over_paged_cache(model, sequences))
    expected = torch.cat(transformers_logits(reference, sequences))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
