"""Which module of a compressed-tensors checkpoint has which scheme, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve.models.decoder import Decoder
from fastserve.models.linear import Linear, MixedFormatLinear
from fastserve.models.model_loader import load_model
from fastserve_kernels.formats import FP8, W8A8, Int4, Int8, Weight
from fastserve_kernels.formats.bitpacking import unpack_codes
from fastserve_kernels.formats.compressed_tensors import (
    CompressedTensors,
    from_compressed_tensors,
    to_compressed_tensors,
)
from fastserve_kernels.formats.weight import pack_pairs

SIZES = {"hidden_size": 64, "intermediate_size": 96}
Pack = Callable[[Tensor], Weight]
Quantize = Callable[..., dict[str, Tensor]]


def store(weight: Weight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored = to_compressed_tensors(weight)
    return dict(stored.tensors), {**stored.scheme, "format": stored.format}


def groups(
    targets: Mapping[str, list[str]] = {}, **changes: Any
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The configuration, with a group for each last name of the modules, named by `targets` or else by a
    pattern."""

    def configure(entries: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for module, entry in entries.items():
            last = module.rpartition(".")[2]
            named = targets.get(last, [f"re:.*\\.{last}$"])
            found[f"group_{last}"] = {**entry, "targets": named}
        quantization = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "mixed-precision",
            "config_groups": found,
            "ignore": ["lm_head"],
        }
        return quantization | changes

    return configure


def test_each_layer_and_each_part_of_a_fused_one_in_its_own_format(
    save_model: Callable,
    quantize: Quantize,
    relative_error: Callable,
) -> None:
    directory, reference = save_model("qwen2", **SIZES)  # has biases
    packs: dict[str, Pack] = {
        "q_proj": lambda w: Int4.pack(w, 32, symmetric=False),
        "k_proj": lambda w: Int4.pack(w, 64, symmetric=False),
        "v_proj": lambda w: Int8.pack(w),
        "gate_proj": lambda w: Int4.pack(w, 32),
        "up_proj": lambda w: Int4.pack(w, 32),
        "down_proj": lambda w: FP8.pack(w),
    }
    dequantized = quantize(directory, packs, store, groups())
    for name, weight in dequantized.items():
        reference.get_parameter(name).data = weight
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    layer = model.weights.layers[0]
    assert isinstance(layer.qkv_proj, MixedFormatLinear)
    assert len(layer.qkv_proj.parts) == 3
    assert isinstance(layer.gate_up_proj, Linear)
    assert relative_error(model, reference) < 1e-4


def round_to(bits: int, weight: Tensor) -> Weight:
    """A symmetric weight of so many bits in groups of 32."""
    groups, middle = weight.unflatten(1, (-1, 32)), 2 ** (bits - 1)
    scales = groups.abs().amax(-1, keepdim=True) / middle
    codes = (groups / scales).round().clamp(-middle, middle - 1).flatten(1).to(torch.int8)
    if bits > 4:
        return Int8(codes, scales[..., 0], None, 32)
    return Int4(pack_pairs(codes + 8), scales[..., 0], None, 32)


def begin_words_anew(stored: CompressedTensors, bits: int) -> dict[str, Tensor]:
    """The tensors with codes packed as compressed-tensors up to 0.17 does: none begins in one word and ends
    in the next, so that some bits of each word stay empty."""
    _, columns = stored.tensors["weight_shape"].tolist()
    codes = unpack_codes(stored.tensors["weight_packed"], bits, columns).long()
    of_a_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -columns % of_a_word)).unflatten(1, (-1, of_a_word))
    words = (padded << bits * torch.arange(of_a_word)).sum(-1)
    return {**stored.tensors, "weight_packed": words.to(torch.int32)}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_both_layouts_of_odd_bits_under_the_one_name(
    bits: int,
    old: bool,
    save_model: Callable,
    quantize: Quantize,
    relative_error: Callable,
) -> None:
    """compressed-tensors 0.18 changed how `pack-quantized` lays out bits that do not divide 32. No field of a
    checkpoint tells which of the two it has, only the number of words does, and there are both."""
    directory, reference = save_model("llama", **SIZES)

    def store_either(weight: Weight) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored = to_compressed_tensors(weight)
        assert stored.scheme["weights"]["num_bits"] == bits
        tensors = begin_words_anew(stored, bits) if old else dict(stored.tensors)
        return tensors, {**stored.scheme, "format": stored.format}

    packs = {name: partial(round_to, bits) for name in ("q_proj", "up_proj", "down_proj")}
    for name, weight in quantize(directory, packs, store_either, groups()).items():
        reference.get_parameter(name).data = weight
    assert relative_error(load_model(str(directory)), reference) < 1e-4


@pytest.mark.parametrize(
    "targets",
    [["Linear"], ["re:.*down_proj"], [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]],
)
def test_targets_are_classes_patterns_and_names(
    targets: list[str], save_model: Callable, quantize: Quantize
) -> None:
    directory, _ = save_model("llama", **SIZES)
    ignore = [
        "lm_head",
        "re:.*self_attn.*",
        *(f"model.layers.{i}.mlp.{n}_proj" for i in range(3) for n in ("gate", "up")),
    ]
    quantize(directory, {"down_proj": W8A8.pack}, store, groups({"down_proj": targets}, ignore=ignore))
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    for layer in model.weights.layers:
        assert isinstance(layer.down_proj, Linear)
        assert layer.down_proj.weight.operator in (
            "linear_w8a8",
            "linear",
        )  # the latter where a processor has none


def test_a_name_goes_before_a_pattern_and_that_before_a_class(
    save_model: Callable, quantize: Quantize
) -> None:
    directory, _ = save_model("llama", **SIZES)
    quantize(
        directory,
        {"gate_proj": lambda w: Int4.pack(w, 32), "up_proj": lambda w: Int8.pack(w)},
        store,
        groups(
            {"gate_proj": ["re:.*mlp.*"], "up_proj": [f"model.layers.{i}.mlp.up_proj" for i in range(3)]},
            ignore=["lm_head", "re:.*self_attn.*", "re:.*down_proj"],
        ),
    )
    model = load_model(str(directory))
    assert isinstance(model, Decoder)
    assert isinstance(model.weights.layers[0].gate_up_proj, MixedFormatLinear)


def test_scales_of_the_cache_are_no_part_of_the_decoder(save_model: Callable) -> None:
    directory, _ = save_model("llama", **SIZES)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.ones(1)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors")
    assert isinstance(load_model(str(directory)), Decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_status": "frozen"}, "quantization_status: got 'frozen'; allowed: 'compressed'"),
        ({"transform_config": {"config_groups": {}}}, "transform_config: got .*; allowed: {}"),
        (
            {"config_groups": {"W4A16": ["Linear"]}},
            r"config_groups\.W4A16: got \['Linear'\]; allowed: a scheme",
        ),
        (
            {"config_groups": {"a": {"targets": ["Linear"], "format": "marlin-24"}}},
            r"config_groups\.a\.format: got 'marlin-24' \(it is the order in which one kernel reads",
        ),
        (
            {"config_groups": {"a": {"targets": ["Linear"], "format": "nvfp4-pack-quantized"}}},
            "got 'nvfp4-pack-quantized'; allowed: pack-quantized, int-quantized",
        ),
        ({"sparsity_config": {"format": "marlin-24"}}, r"sparsity_config\.format: got 'marlin-24'"),
        ({"config_groups": {}}, "unexpected tensors: .*down_proj.weight_packed"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, save_model: Callable, quantize: Quantize) -> None:
    directory, _ = save_model("llama", **SIZES)
    quantize(directory, {"down_proj": lambda w: Int4.pack(w, 32)}, store, groups(**changes))
    with pytest.raises(ModelError, match=message):
        load_model(str(directory))


def test_a_weight_that_no_format_of_ours_holds_is_named(save_model: Callable, quantize: Quantize) -> None:
    directory, _ = save_model("llama", **SIZES)
    packs: dict[str, Pack] = {"down_proj": lambda w: Int4.pack(w, 32)}
    quantize(directory, packs, store, groups({"down_proj": ["Linear"]}))
    message = r"model\.layers\.0\.self_attn\.q_proj: weight_shape is missing; found weight"
    with pytest.raises(ModelError, match=message):
        load_model(str(directory))


def test_old_sparse_layouts_with_codes(save_model: Callable) -> None:
    """What is not zero is `compressed`, and a bitmask says where it belongs."""
    _, reference = save_model("llama", **SIZES)
    weight = reference.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    stored = to_compressed_tensors(W8A8.pack(weight * (torch.rand_like(weight) < 0.5)))
    values = stored.tensors["weight"]
    bits = (values != 0).unflatten(1, (-1, 8)).to(torch.uint8)
    bitmask = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    tensors = {
        "compressed": values[values != 0],
        "bitmask": bitmask,
        "shape": torch.tensor(values.shape),
        "row_offsets": torch.zeros(len(values), dtype=torch.int64),
        "weight_scale": stored.tensors["weight_scale"],
    }
    read = from_compressed_tensors(CompressedTensors("int-quantized", tensors, stored.scheme))
    assert torch.equal(read.dequantize(), values.float() * stored.tensors["weight_scale"])
