"""`linear_int8` and `linear_fp8`: weights of 8 bits, whole numbers or float8_e4m3fn; activations stay as they
are.

The kernel, its layout, bound and instruction counts are those of `quantized_kernel`. fp8 is decoded by
integer instructions and a product, so that an A100, which has no conversion from it, takes it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats import FP8, Int8
from fastserve_kernels.gpu.fragments import pack_codes
from fastserve_kernels.gpu.linear_call import Arguments
from fastserve_kernels.gpu.operator import Shape
from fastserve_kernels.gpu.quantized_linear import (
    QuantizedLinear,
    pack_scales,
    pack_zeros,
    random_groups,
    random_zeros,
)


def _pack_int8(weight: Int8, dtype: torch.dtype) -> Arguments:
    codes, scales = _pack_codes_and_scales(weight, dtype)
    zeros = pack_zeros(weight.zeros, weight.group_size, 8, dtype)
    return (codes, scales, zeros, weight.out_features, weight.group_size)


def _pack_fp8(weight: FP8, dtype: torch.dtype) -> Arguments:
    """Raises ValueError if a value is not a number: the kernel would read 480."""
    if bool(((weight.values.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise ValueError("FP8.values has elements that are not a number, must have none")
    return (*_pack_codes_and_scales(weight, dtype), weight.out_features, weight.group_size)


def _pack_codes_and_scales(weight: Int8 | FP8, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = pack_scales(weight.scales, weight.group_size, 8, dtype)
    return pack_codes(weight.values.view(torch.uint8), 8), scales


def _random_int8(shape: Shape, device: torch.device) -> Int8:
    values = torch.randint(-128, 128, (shape["n"], shape["k"]), dtype=torch.int8, device=device)
    zeros = random_zeros(shape, device)
    return Int8(values, random_groups(shape, device), zeros, shape["group_size"])


def _random_fp8(shape: Shape, device: torch.device) -> FP8:
    values = torch.randn(shape["n"], shape["k"], device=device).to(torch.float8_e4m3fn)
    return FP8(values, random_groups(shape, device), shape["group_size"])


linear_int8 = QuantizedLinear(
    "int8",
    ("zeros",),
    _pack_int8,
    _random_int8,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 1024, "zeros": 0},
        {"m": 16, "n": 4096, "k": 1024, "group_size": 32, "zeros": 2},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128, "zeros": 1},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024, "zeros": 0},
    ),
)
"""`reference.linear_int8` on a GPU."""
linear_fp8 = QuantizedLinear(
    "fp8",
    (),
    _pack_fp8,
    _random_fp8,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 1024},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024},
    ),
)
"""`reference.linear_fp8` on a GPU."""
OPERATORS = (linear_int8.entry, linear_fp8.entry)
