"""Weights of 8 bits under activations that stay as they are: `linear_int8` and `linear_fp8`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels.formats import FP8, Int8
from fastserve_kernels.gpu.int8_linear import linear_fp8

Product = Callable[..., Tensor]
RelRms = Callable[[Tensor, Tensor], float]
BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 64])
def test_any_number_of_tokens(
    product: Product, rel_rms: RelRms, poison: None, m: int, dtype: torch.dtype
) -> None:
    for weight in (Int8.pack(torch.randn(51, 75)), FP8.pack(torch.randn(51, 75))):
        x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((m, 75), (51,), (m, 51)))
        wanted = x.float() @ weight.dequantize().T + bias.float() + residual.float()
        assert rel_rms(product(weight, x, bias, residual), wanted) < BARS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", ["none", "whole", "fractional"])
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (192, 64), (256, 128), (50, 50)])
def test_int8_groups_and_zeros(
    product: Product, rel_rms: RelRms, k: int, group_size: int, zeros: str, dtype: torch.dtype
) -> None:
    weight = Int8.pack(torch.randn(20, k) + 0.5, group_size, symmetric=zeros == "none")
    if zeros == "fractional":
        assert weight.zeros is not None
        weight = dataclasses.replace(weight, zeros=weight.zeros + torch.rand_like(weight.zeros) - 0.5)
    for m in (3, 20):
        x = torch.randn(m, k).to(dtype)
        wanted = x.float() @ weight.dequantize().T
        assert rel_rms(product(weight, x), wanted) < BARS[dtype]


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_fp8_groups(product: Product, rel_rms: RelRms, group_size: int, dtype: torch.dtype) -> None:
    weight = FP8.pack(torch.randn(20, 256), group_size)
    x = torch.randn(5, 256).to(dtype)
    assert rel_rms(product(weight, x), x.float() @ weight.dequantize().T) < BARS[dtype]


@pytest.mark.parametrize("dtype", BARS)
def test_every_value_of_a_byte(product: Product, dtype: torch.dtype) -> None:
    """Exactly, subnormal ones included: x picks one column at a time."""
    codes = torch.arange(256).to(torch.uint8).view(16, 16)
    int8 = Int8(codes.view(torch.int8), torch.ones(16, 1), None, 16)
    finite = torch.where((codes & 127) == 127, codes - 1, codes).view(torch.float8_e4m3fn)
    for weight in (int8, FP8(finite, torch.ones(16, 1), 16)):
        x = torch.eye(16, dtype=dtype)
        assert torch.equal(product(weight, x).float(), weight.dequantize().T)


def test_fp8_values_that_are_not_numbers(device: torch.device) -> None:
    values = torch.randn(16, 32).to(torch.float8_e4m3fn)
    values[3, 5] = float("nan")
    weight = FP8(values, torch.ones(16, 1), 32)
    with pytest.raises(ValueError, match=r"FP8.values has elements that are not a number"):
        linear_fp8.prepare(weight, device, torch.bfloat16)
