"""Checkpoints of GPTQ and AWQ tools, packed here code by code as those tools document it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.quant_methods import open_checkpoint
from fastserve.checkpoints.transformers_config import read_transformers_config
from fastserve.models.model_loader import load_model
from fastserve_kernels.formats import Int4

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
GROUP = 32


def rewrite(
    directory: Path,
    reference: PreTrainedModel,
    quantization: dict[str, Any],
    pack: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
    bits: int,
) -> None:
    """Quantizes all linears but the head, in the files and in transformers' own model alike.

    `pack` takes codes [N, K], scales [N, K / G] and zeros [N, K / G], and gives the module's tensors.
    """
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in reference.named_parameters():
        if parameter.ndim != 2 or not name.endswith("_proj.weight"):
            continue
        rows, columns = parameter.shape
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        zeros = torch.randint(1, 2**bits, (rows, columns // GROUP), generator=generator)
        scales = (torch.rand(rows, columns // GROUP, generator=generator) * 0.2 / 2**bits).half()
        weight = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
        parameter.data = weight
        del tensors[name]
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{local}": tensor for local, tensor in pack(codes, scales, zeros).items()}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Words of 32 bits as signed numbers, the first code lowest."""
    stream = sum(code << bits * place for place, code in enumerate(codes))
    words = [stream >> 32 * index & 0xFFFFFFFF for index in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq_tensors(bits: int, less: int) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        qweight = torch.tensor([bit_stream(row, bits) for row in codes.tolist()]).T
        qzeros = torch.tensor([bit_stream(group, bits) for group in (zeros.T - less).tolist()])
        return {
            "qweight": qweight.to(torch.int32).contiguous(),
            "qzeros": qzeros.to(torch.int32),
            "scales": scales.T.contiguous(),
            "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
        }

    return pack


def awq_tensors(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    def words(matrix: Tensor) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        packed = [
            [
                bit_stream([row[start + place] for place in order], 4)[0]
                for start in range(0, len(row), len(order))
            ]
            for row in matrix.tolist()
        ]
        return torch.tensor(packed).to(torch.int32)

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}


GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
CASES: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Tensor]], int]] = {
    **{f"gptq {bits}": ({**GPTQ, "bits": bits}, gptq_tensors(bits, 1), bits) for bits in (2, 3, 4, 8)},
    **{
        f"gptq v2 {bits}": (
            {**GPTQ, "bits": bits, "checkpoint_format": "gptq_v2"},
            gptq_tensors(bits, 0),
            bits,
        )
        for bits in (3, 4)
    },
    "awq": (AWQ, awq_tensors, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(
    case: str,
    save_model: Callable,
    relative_error: Callable,
) -> None:
    directory, reference = save_model("llama", **SIZES)
    quantization, pack, bits = CASES[case]
    rewrite(directory, reference, quantization, pack, bits)
    assert relative_error(load_model(str(directory)), reference) < 1e-4


def test_biases_of_zeros_are_passed_over(
    save_model: Callable,
    relative_error: Callable,
) -> None:
    """AutoGPTQ writes one for each linear layer that it quantizes, though Llama has none."""
    directory, reference = save_model("llama", **SIZES)

    def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(4, 1)(codes, scales, zeros) | {"bias": torch.zeros(len(codes)).half()}

    rewrite(directory, reference, {**GPTQ, "bits": 4}, pack, 4)
    assert relative_error(load_model(str(directory)), reference) < 1e-4


def test_a_zero_point_of_nought_borrows_from_its_neighbour(save_model: Callable) -> None:
    """The tools subtract 1 from whole words, and add it again."""
    directory, reference = save_model("llama", **SIZES)

    def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        tensors = gptq_tensors(4, 0)(codes, scales, torch.zeros_like(zeros))
        return tensors | {"qzeros": tensors["qzeros"] - 0x11111111}

    rewrite(directory, reference, {**GPTQ, "bits": 4}, pack, 4)
    checkpoint = open_checkpoint(directory, read_transformers_config(directory))
    weight = checkpoint.read_packed("model.layers.0.mlp.down_proj.weight", exact=True)
    assert isinstance(weight, Int4)
    assert weight.zeros is not None
    assert not weight.zeros.any()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gptq 4", {"bits": 5}, "quantization_config.bits: got 5; allowed: 2, 3, 4, 8"),
        (
            "gptq 4",
            {"checkpoint_format": "marlin"},
            "got 'marlin'; allowed: gptq, gptq_v2",
        ),
        ("gptq 4", {"is_marlin_format": True}, "checkpoint_format: got 'marlin'"),
        ("awq", {"version": "gemv"}, "quantization_config.version: got 'gemv'; allowed: 'gemm'"),
        ("awq", {"bits": 8}, "quantization_config.bits: got 8; allowed: 4"),
        ("awq", {"zero_point": False}, "zero_point: got False; allowed: True"),
    ],
)
def test_other_layouts_are_refused(
    case: str, changes: dict[str, Any], message: str, save_model: Callable
) -> None:
    directory, reference = save_model("llama", **SIZES)
    quantization, pack, bits = CASES[case]
    rewrite(directory, reference, quantization | changes, pack, bits)
    with pytest.raises(ModelError, match=message):
        load_model(str(directory))


def test_groups_out_of_order_are_refused(save_model: Callable) -> None:
    directory, reference = save_model("llama", **SIZES)

    def pack(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        tensors = gptq_tensors(4, 1)(codes, scales, zeros)
        return tensors | {"g_idx": tensors["g_idx"].flip(0)}

    rewrite(directory, reference, {**GPTQ, "bits": 4}, pack, 4)
    with pytest.raises(ModelError, match=r"self_attn\.q_proj: g_idx must be in order \(desc_act false"):
        load_model(str(directory))


def test_another_quantization_is_refused_by_name(save_model: Callable) -> None:
    directory, reference = save_model("llama", **SIZES)
    quantization, pack, bits = CASES["awq"]
    rewrite(directory, reference, quantization, pack, bits)
    with pytest.raises(
        ModelError, match=r"quantization: got 'int8'; allowed for .*: auto, .* \(quant_method 'awq'\)"
    ):
        load_model(str(directory), quantization="int8")
