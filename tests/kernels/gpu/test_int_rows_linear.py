"""Rows of 4 bits and rows of 8 by two kernels: `linear_int_rows`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastserve_kernels.formats import IntRows

BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 8), (3, 4), (5, 7)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_row_comes_where_it_belongs(
    product: Callable[..., Tensor],
    rel_rms: Callable[[Tensor, Tensor], float],
    poison: None,
    symmetric: bool,
    widths: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Where there are rows of both kinds, and of one."""
    bits = torch.tensor(widths, dtype=torch.uint8).repeat(26)[:51]
    weight = IntRows.pack(torch.randn(51, 96), bits, 32, symmetric)
    for m in (1, 3, 17):
        x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((m, 96), (51,), (m, 51)))
        wanted = x.float() @ weight.dequantize().T
        assert rel_rms(product(weight, x), wanted) < BARS[dtype]
        came = product(weight, x, bias, residual)
        assert rel_rms(came, wanted + bias.float() + residual.float()) < BARS[dtype]
