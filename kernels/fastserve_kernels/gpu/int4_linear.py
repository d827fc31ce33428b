"""`linear_int4` and `linear_nf4`: weights of 4-bit codes, whole numbers or entries of a codebook.

The kernel, its layout, bound and instruction counts are those of `quantized_kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats import NF4, Int4
from fastserve_kernels.formats.quantized import NORMAL_FLOAT_4
from fastserve_kernels.formats.weight import unpack_pairs
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


def _pack_int4(weight: Int4, dtype: torch.dtype) -> Arguments:
    codes, scales = _pack_codes_and_scales(weight, dtype)
    zeros = pack_zeros(weight.zeros, weight.group_size, 4, dtype)
    return (codes, scales, zeros, weight.out_features, weight.group_size)


def _pack_nf4(weight: NF4, dtype: torch.dtype) -> Arguments:
    codes, scales = _pack_codes_and_scales(weight, dtype)
    codebook = pack_codebook(weight.codebook, dtype)
    return (codes, scales, codebook, weight.out_features, weight.group_size)


def _pack_codes_and_scales(weight: Int4 | NF4, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = pack_scales(weight.scales, weight.group_size, 4, dtype)
    return pack_codes(unpack_pairs(weight.codes), 4), scales


def pack_codebook(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """[24] float32: the entries, then their low and their high bytes in a 16-bit dtype, 16 and 16."""
    short = codebook.to(torch.bfloat16 if dtype == torch.float32 else dtype)
    planes = short.view(torch.uint8).view(16, 2).T.contiguous().view(torch.float32).flatten()
    return torch.cat((codebook.float(), planes))


def _random_codes(shape: Shape, device: torch.device) -> Tensor:
    return torch.randint(256, (shape["n"], shape["k"] // 2), dtype=torch.uint8, device=device)


def _random_int4(shape: Shape, device: torch.device) -> Int4:
    zeros = random_zeros(shape, device)
    return Int4(_random_codes(shape, device), random_groups(shape, device), zeros, shape["group_size"])


def _random_nf4(shape: Shape, device: torch.device) -> NF4:
    codebook = torch.tensor(NORMAL_FLOAT_4, device=device)
    return NF4(_random_codes(shape, device), random_groups(shape, device), codebook, shape["group_size"])


linear_int4 = QuantizedLinear(
    "int4",
    ("zeros",),
    _pack_int4,
    _random_int4,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 128, "zeros": 0},
        {"m": 1, "n": 576, "k": 288, "group_size": 32, "zeros": 1},
        {"m": 1, "n": 4096, "k": 1024, "group_size": 64, "zeros": 2},
        {"m": 16, "n": 4096, "k": 1024, "group_size": 128, "zeros": 0},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 1024, "zeros": 1},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128, "zeros": 0},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 128, "zeros": 1},
    ),
)
"""`reference.linear_int4` on a GPU."""
linear_nf4 = QuantizedLinear(
    "nf4",
    ("codebook",),
    _pack_nf4,
    _random_nf4,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 64},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024},
    ),
)
"""`reference.linear_nf4` on a GPU."""
OPERATORS = (linear_int4.entry, linear_nf4.entry)
