"""A weight packed for the kernels of one device, once, at load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastserve_kernels.cpu import linear_preparation
from fastserve_kernels.formats import Dense
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import FLOATS, Weight, name_of
from fastserve_kernels.triton_requirement import require_triton

QUANTIZES_ACTIVATIONS: tuple[type[Weight], ...] = tuple(linear_preparation.PREPARE_A8)
"""The formats that can meet activations of 8 bits."""
REGISTERED: dict[type[Weight], Callable[[Any, torch.dtype], Prepared]] = {}
"""What prepares weights of the formats that `registration` was told of, by their type."""


def prepare(
    weight: Weight,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize_activations: bool = False,
) -> Prepared:
    """Packs a weight for activations of this dtype on this device; the weight itself stays as it is.

    On a CPU (`cpu.linear_preparation`) and on a GPU of NVIDIA (`gpu.registry`) each format is packed in its
    own way, or as another which holds the same numbers; any other device multiplies by the plain tensors,
    dequantized at each call. Weights that are floats are rounded to the dtype.

    `quantize_activations`: an `Int4` or `Int8` on a CPU multiplies activations that are rounded to 8 bits, in
    groups of its own group size, 128 at most; other weights and devices take them as they are.

    Raises ValueError if the dtype is not float32, float16 or bfloat16, or the device cannot multiply by this
    weight, with the reason; ImportError if the device is a GPU and the package triton is not installed.
    """
    device = torch.device(device)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {name_of(dtype)}")
    kind = type(weight)
    if kind in REGISTERED:
        return REGISTERED[kind](weight.to(device), dtype)
    if device.type == "cpu" and quantize_activations and kind in linear_preparation.PREPARE_A8:
        return linear_preparation.PREPARE_A8[kind](weight.to(device), dtype)
    if device.type == "cpu":
        return linear_preparation.PREPARE[kind](weight.to(device), dtype)
    if isinstance(weight, Dense):  # torch's own product takes one dtype
        plain: Weight = Dense(weight.weight.to(device, dtype))
    elif device.type == "cuda":
        require_triton(weight.operator)
        from fastserve_kernels.gpu.registry import PREPARE

        return PREPARE[kind](weight, device, dtype)
    else:
        plain = weight.to(device)
    return Prepared(plain.operator, plain.arguments, plain.out_features, plain.in_features)
