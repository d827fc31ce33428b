"""`linear_int8` and `linear_fp8`: weights of 8 bits, whole numbers or float8_e4m3fn; activations stay as they
are.

The kernel, its layout, bound and instruction counts are those of `quantized_kernel`. fp8 is decoded by
integer instructions and a product, so that an A100, which has no conversion from it, takes it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve_kernels.formats import FP8, Int8, Weight
from fastserve_kernels.formats.prepared import Prepared
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
    """An `Int8` or `FP8` as the kernel reads it.

    Raises ValueError if the GPU is too old, or if a value of `FP8` is not a number: the kernel would read
    480.
    """
    check_device(weight.operator, device)
    if isinstance(weight, FP8) and bool(((weight.values.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise ValueError("FP8.values has elements that are not a number, must have none")
    arguments = _arranged(weight.to(device), dtype)
    return Prepared(weight.operator, arguments, weight.out_features, weight.in_features)


def _arranged(weight: Weight, dtype: torch.dtype) -> tuple[Tensor | int | None, ...]:
    assert isinstance(weight, Int8 | FP8)
    codes = arrange_codes(weight.values.view(torch.uint8), 8)
    scales = arrange_scales(weight.scales, weight.group_size, 8, dtype)
    sizes = (weight.out_features, weight.group_size)
    if isinstance(weight, FP8):
        return (codes, scales, *sizes)
    return (codes, scales, arrange_zeros(weight.zeros, weight.group_size, 8, dtype), *sizes)


def linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    planes = 0 if zeros is None else zeros.shape[0]
    shape = {"n": out_features, "k": x.shape[1], "group_size": group_size, "zeros": planes}
    return run(INT8_LINEAR, shape, x, (values, scales, zeros, out_features, group_size), bias, residual)


def plan_int8(
    x: Tensor,
    values: Tensor,
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
    return plan("int8", x, values, scales, zeros, None, out_features, bias, residual, y, config)


def linear_fp8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    shape = {"n": out_features, "k": x.shape[1], "group_size": group_size}
    return run(FP8_LINEAR, shape, x, (values, scales, out_features, group_size), bias, residual)


def plan_fp8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    config: Config,
) -> list[Launch]:
    return plan("fp8", x, values, scales, None, None, out_features, bias, residual, y, config)


def _random_int8(shape: Shape, device: torch.device) -> Int8:
    values = torch.randint(-128, 128, (shape["n"], shape["k"]), dtype=torch.int8, device=device)
    zeros = None
    if shape["zeros"]:
        zeros = random_groups(shape, device) * 8
        zeros = zeros.round() if shape["zeros"] == 1 else zeros
    return Int8(values, random_groups(shape, device), zeros, shape["group_size"])


def _random_fp8(shape: Shape, device: torch.device) -> FP8:
    values = torch.randn(shape["n"], shape["k"], device=device).to(torch.float8_e4m3fn)
    return FP8(values, random_groups(shape, device), shape["group_size"])


INT8_LINEAR = quantized_operator(
    "linear_int8",
    plan_int8,
    _random_int8,
    _arranged,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 1024, "zeros": 0},
        {"m": 16, "n": 4096, "k": 1024, "group_size": 32, "zeros": 2},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128, "zeros": 1},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024, "zeros": 0},
    ),
)
FP8_LINEAR = quantized_operator(
    "linear_fp8",
    plan_fp8,
    _random_fp8,
    _arranged,
    (
        {"m": 1, "n": 4096, "k": 1024, "group_size": 1024},
        {"m": 64, "n": 4096, "k": 1024, "group_size": 128},
        {"m": 256, "n": 4096, "k": 1024, "group_size": 1024},
    ),
)
OPERATORS = (INT8_LINEAR, FP8_LINEAR)
