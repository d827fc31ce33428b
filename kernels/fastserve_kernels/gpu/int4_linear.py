"""`linear_int4` and `linear_nf4`: weights of 4-bit codes, whole numbers or entries of a codebook.

The kernel, its layout, bound and instruction counts are those of `quantized_kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats import NF4, Int4, Weight
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.quantized import NORMAL_FLOAT_4
from fastserve_kernels.formats.weight import unpack_pairs
from fastserve_kernels.gpu.fragments import arrange_codes
from fastserve_kernels.gpu.launch import Config, Launch
from fastserve_kernels.gpu.operator import Shape
from fastserve_kernels.gpu.quantized_linear import (
    arrange_scales,
    arrange_zeros,
    check_device,
    plan,
    quantized_operator,
    random_groups,
    run,
)


def prepare(weight: Weight, device: torch.device, dtype: torch.dtype) -> Prepared:
    """An `Int4` or `NF4` as the kernel reads it. Raises ValueError if the GPU is too old."""
    check_device(weight.operator, device)
    arguments = _arranged(weight.to(device), dtype)
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def _arranged(weight: Weight, dtype: torch.dtype) -> tuple[Tensor | int | None, ...]:
    assert isinstance(weight, Int4 | NF4)
    codes = arrange_codes(unpack_pairs(weight.codes), 4)
    scales = arrange_scales(weight.scales, weight.group_size, 4, dtype)
    if isinstance(weight, Int4):
        other = arrange_zeros(weight.zeros, weight.group_size, 4, dtype)
    else:
        other = arrange_codebook(weight.codebook, dtype)
    return (codes, scales, other, weight.out_features, weight.group_size)


def arrange_codebook(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """[24] float32: the entries, then their low and their high bytes in a 16-bit dtype, 16 and 16."""
    short = codebook.to(torch.bfloat16 if dtype == torch.float32 else dtype)
    planes = short.view(torch.uint8).view(16, 2).T.contiguous().view(torch.float32).flatten()
    return torch.cat((codebook.float(), planes))


def linear_int4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    planes = 0 if zeros is None else zeros.shape[0]
    shape = {"n": out_features, "k": x.shape[1], "group_size": group_size, "zeros": planes}
    return run(INT4_LINEAR, shape, x, (codes, scales, zeros, out_features, group_size), bias, residual)


def plan_int4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    return plan("int4", x, codes, scales, zeros, None, out_features, bias, residual, y, config)


def linear_nf4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    shape = {"n": out_features, "k": x.shape[1], "group_size": group_size}
    return run(NF4_LINEAR, shape, x, (codes, scales, codebook, out_features, group_size), bias, residual)


def plan_nf4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    return plan("nf4", x, codes, scales, None, codebook, out_features, bias, residual, y, config)


def _random_codes(shape: Shape, device: torch.device) -> Tensor:
    return torch.randint(256, (shape["n"], shape["k"] // 2), dtype=torch.uint8, device=device)


def _random_int4(shape: Shape, device: torch.device) -> Int4:
    zeros = None
    if shape["zeros"]:
        zeros = random_groups(shape, device) * 8
        zeros = zeros.round() if shape["zeros"] == 1 else zeros
    return Int4(_random_codes(shape, device), random_groups(shape, device), zeros, shape["group_size"])


def _random_nf4(shape: Shape, device: torch.device) -> NF4:
    codebook = torch.tensor(NORMAL_FLOAT_4, device=device)
    return NF4(_random_codes(shape, device), random_groups(shape, device), codebook, shape["group_size"])


INT4_LINEAR = quantized_operator(
    "linear_int4",
    plan_int4,
    _random_int4,
    _arranged,
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
NF4_LINEAR = quantized_operator(
    "linear_nf4",
    plan_nf4,
    _random_nf4,
    _arranged,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 64},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024},
    ),
)
OPERATORS = (INT4_LINEAR, NF4_LINEAR)
