"""`linear` against torch's, packed and not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels import ops
from fastserve_kernels.formats import Dense

SHAPES = [(960, 576), (576, 1536), (1, 1), (33, 7), (100, 72)]
# With bias and residual three roundings add up.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_product_in_double(
    out_features: int,
    in_features: int,
    rows: int,
    extras: bool,
    dtype: torch.dtype,
    rel_rms: Callable[[Tensor, Tensor], float],
) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    x = torch.randn(rows, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if extras else None
    residual = torch.randn(rows, out_features).to(dtype) if extras else None
    wanted = x.double() @ weight.double().T
    if bias is not None and residual is not None:
        wanted = wanted + bias.double() + residual.double()
    came = ops.linear(x, Dense.pack(weight), bias, residual)
    assert came.dtype == dtype
    assert rel_rms(came, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_strided_inputs_and_leaves_them_as_they_were(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    x = torch.randn(64, 10).to(dtype).T[::2]
    residual = torch.randn(5, 80).to(dtype)[:, ::2]
    before = residual.clone()
    packed = Dense.pack(weight.T.contiguous().T)
    assert torch.equal(
        ops.linear(x, packed, residual=residual),
        ops.linear(x.contiguous(), packed, residual=residual.contiguous()),
    )
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(960, 576), (576, 1536), (3072, 576), (2048, 4096)]
)
def test_a_row_does_not_depend_on_the_others(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    weight = Dense.pack(torch.randn(out_features, in_features).to(dtype))
    x = torch.randn(130, in_features).to(dtype)
    together = ops.linear(x, weight)
    for rows in (1, 2, 3, 5, 16, 31, 64):
        assert torch.equal(ops.linear(x[:rows].clone(), weight), together[:rows])
        assert torch.equal(ops.linear(x[-rows:].clone(), weight), together[-rows:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packing_keeps_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    packed = Dense.pack(weight)
    assert torch.equal(packed.dequantize(), weight)
    assert (packed.out_features, packed.in_features) == (40, 64)
    assert packed.nbytes == 40 * 64 * weight.element_size()
