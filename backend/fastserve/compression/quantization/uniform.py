"""Linear quantization by the formula, x_int = round((x - x_min) / (x_max - x_min) (2^n - 1)).

The range [x_min, x_max] is that of the elements that share it: of a group of columns, of a row (a channel),
or of the whole tensor. Symmetric, it is [-a, a] with a = max|x|. The result is x_int (x_max - x_min) / (2^n -
1) + x_min, off by at most half a step. `grid.py` has the same with zero points that are whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastserve.compression.quantization.grid import Grid

GroupSize = Literal[32, 64, 128, "tensor"] | None
"""Columns of a row that share a range; None: all of them (per channel); "tensor": all rows do too."""


@dataclass(frozen=True, eq=False)
class Uniform:
    """x = code * scale + minimum."""

    codes: Tensor
    """[N, K] uint8, from 0 to 2^bits - 1."""
    scales: Tensor
    """[N, K / G] float64, or [1, 1] of a whole tensor: (x_max - x_min) / (2^bits - 1)."""
    minimums: Tensor
    """The same of x_min."""
    bits: int

    def dequantize(self) -> Tensor:
        """[N, K] float64."""
        shape = self.codes.shape
        groups = self.codes.double().view(*_grouped(shape, self.scales.shape))
        return (groups * self.scales[..., None] + self.minimums[..., None]).view(shape)

    def grid(self, dtype: torch.dtype) -> Grid:
        """The values that the codes can stand for, with the scales and offsets rounded to a dtype."""
        rows, columns = self.codes.shape
        per_row = (self.scales.expand(rows, -1), self.minimums.expand(rows, -1))
        return Grid.from_minimums(*per_row, self.bits, columns // self.scales.shape[1], dtype)


def quantize(x: Tensor, bits: int, symmetric: bool = False, group_size: GroupSize = None) -> Uniform:
    """The codes of a float tensor [N, K], computed in float64.

    Where all elements that share a range are equal the codes are 0, and x comes back as it was. Raises
    ValueError if `bits` is not from 2 to 8, x is no finite matrix, or its columns have no whole groups.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, not {bits}")
    if x.dim() != 2 or not x.isfinite().all():
        raise ValueError(
            f"x must be a finite matrix, not of shape {list(x.shape)} with infinite elements or NaN"
        )
    groups = _groups(x.double(), group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    span = (high - low)[..., None]
    fractions = torch.where(span > 0, (groups - low[..., None]) / span, 0)
    largest = 2**bits - 1
    codes = (fractions * largest).round().to(torch.uint8)
    return Uniform(codes.view(x.shape), (high - low) / largest, low, bits)


def _groups(x: Tensor, group_size: GroupSize) -> Tensor:
    """[N, K / G, G], or [1, 1, N K] of a whole tensor."""
    if group_size == "tensor":
        return x.reshape(1, 1, -1)
    size = x.shape[1] if group_size is None else group_size
    if x.shape[1] % size:
        raise ValueError(f"group_size must divide the {x.shape[1]} columns, but is {size}")
    return x.unflatten(1, (-1, size))


def _grouped(shape: torch.Size, groups: torch.Size) -> tuple[int, int, int]:
    return (*groups, shape.numel() // groups.numel())
