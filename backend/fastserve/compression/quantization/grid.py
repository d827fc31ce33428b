"""Quantization grids: the values that a group's codes stand for, and the search for the best ones.

Linear quantization is x_int = round((x - x_min) / (x_max - x_min) (2^n - 1)), its value x_int scale + x_min
with scale = (x_max - x_min) / (2^n - 1): off by at most half a step. The range [x_min, x_max] is that of the
weights that share it: a group of columns, a row (channel), or the whole tensor; symmetric, it is [-a, a] with
a = max|x|. Checkpoints of other tools have whole zero points, -x_min / scale rounded: 0 is then one of the
values, and every range is widened to include it. `Grid.exact` does not round them.

Codes and zero points of fewer bits than the kernel's format stand in the middle of its range: less 8 (`Int4`)
or 0 (`Int8`) they are signed numbers of that many bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8
from fastserve_kernels.formats.quantized import representable, scales_and_zeros
from fastserve_kernels.formats.weight import pack_pairs, spread

CLIP_RATIOS = tuple(1 - 0.025 * step for step in range(21))
"""Parts of the range of the weights that `search` tries."""
ELEMENTS_AT_A_TIME = 1 << 20
"""Weights whose grids are searched together, so that the candidates stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Grid:
    """w = (code - zero) * scale, with codes from 0 to 2^bits - 1."""

    scales: Tensor
    """[N, K / G] of the dtype in which they will be stored."""
    zeros: Tensor | None
    """[N, K / G] of the same dtype; None: 2^(bits - 1) everywhere (symmetric)."""
    bits: int
    group_size: int

    @classmethod
    def min_max(cls, weight: Tensor, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool) -> Grid:
        """The grid of the whole range of each group of a weight [N, K], with whole zero points."""
        return cls.from_ranges(*group_ranges(weight, group_size), bits, group_size, dtype, symmetric)

    @classmethod
    def from_ranges(
        cls, low: Tensor, high: Tensor, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
    ) -> Grid:
        """The grid of ranges [N, K / G], widened to include 0, with whole zero points."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        return cls(*scales_and_zeros(low, high, bits, symmetric, dtype), bits, group_size)

    @classmethod
    def exact(
        cls, low: Tensor, high: Tensor, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
    ) -> Grid:
        """The grid of ranges [N, K / G] as they are, whose zero points are no whole numbers.

        A group of equal weights has them at code 0, as the value of a scale of its own. Where the dtype would
        move a value by more than 1/32 of a step it is float32 instead.
        """
        low, high = low.double(), high.double()
        if symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        steps = (high - low) / (2**bits - 1)
        stored = representable(torch.where(steps == 0, low.abs(), steps), dtype)
        zeros = -low / stored.double()
        if dtype != torch.float32 and (zeros.to(dtype) - zeros).abs().max() > 1 / 32:
            return cls.exact(low, high, bits, group_size, torch.float32, symmetric)
        return cls(stored, zeros.to(dtype), bits, group_size)

    def quantize(self, weight: Tensor) -> Tensor:
        """The codes [N, K] float32 of the values that are nearest to a weight [N, K]."""
        scales, zeros = self.per_weight()
        return (weight / scales + zeros).round_().clamp_(0, 2**self.bits - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values [N, K] float32 of codes [N, K]."""
        scales, zeros = self.per_weight()
        return (codes - zeros) * scales

    def per_weight(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of every weight, [N, K] float32 each."""
        scales = spread(self.scales, self.group_size)
        if self.zeros is None:
            return scales, torch.full_like(scales, 2.0 ** (self.bits - 1))
        return scales, spread(self.zeros, self.group_size)

    def with_scales(self, scales: Tensor) -> Grid:
        """This grid with other scales [N, K / G], rounded to the dtype of these."""
        return replace(self, scales=representable(scales, self.scales.dtype))

    def shifted(self, steps: int) -> Grid:
        """This grid with zero points moved by whole steps, as far as the codes reach."""
        if self.zeros is None:
            return self
        return replace(self, zeros=(self.zeros + steps).clamp(0, 2**self.bits - 1))

    def where(self, kept: Tensor, other: Grid) -> Grid:
        """This grid for the groups that `kept` [N, K / G] bool is true of, another for the rest."""
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = torch.where(kept, self.zeros, other.zeros)
        return replace(self, scales=torch.where(kept, self.scales, other.scales), zeros=zeros)

    def pack(self, codes: Tensor) -> Int4 | Int8:
        """Codes [N, K] in the kernels' format: `Int4` for up to 4 bits, else `Int8`."""
        middle = 2 ** (self.bits - 1)
        signed = codes - middle
        zeros = None if self.zeros is None else self.zeros - middle
        if self.bits > 4:
            return Int8(signed.to(torch.int8), self.scales, zeros, self.group_size)
        return Int4(
            pack_pairs(signed + 8), self.scales, None if zeros is None else zeros + 8, self.group_size
        )


def search(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    metric: Tensor | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> Grid:
    """The grid on which rounding a weight [N, K] to nearest costs each group least.

    Tried are the min-max range clipped to each of the ratios, and zero points one step off. The cost is the
    sum of d^2 over the group, with d the rounding error; with a `metric` [K] that of metric_k d_k^2, and with
    one of [K / G, G, G] it is d^T metric d.
    """
    rows = max(1, ELEMENTS_AT_A_TIME // weight.shape[1])
    grids = [
        _search(part, bits, group_size, symmetric, dtype, metric, ratios)
        for part in weight.float().split(rows)
    ]
    zeros = None if symmetric else torch.cat([grid.zeros for grid in grids if grid.zeros is not None])
    return Grid(torch.cat([grid.scales for grid in grids]), zeros, bits, group_size)


def _search(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    metric: Tensor | None,
    ratios: tuple[float, ...],
) -> Grid:
    best = whole = Grid.min_max(weight, bits, group_size, dtype, symmetric)
    least = _costs(weight, best, metric)
    for ratio in ratios:
        for shift in (0,) if symmetric else (0, 1, -1):
            candidate = whole.with_scales(whole.scales.float() * ratio).shifted(shift)
            costs = _costs(weight, candidate, metric)
            best = best.where(costs >= least, candidate)
            least = torch.minimum(costs, least)
    return best


def _costs(weight: Tensor, grid: Grid, metric: Tensor | None) -> Tensor:
    """The cost of rounding each group, [N, K / G]."""
    difference = (grid.dequantize(grid.quantize(weight)) - weight).unflatten(1, (-1, grid.group_size))
    if metric is None:
        return difference.square().sum(-1)
    if metric.dim() == 1:
        return (difference.square() * metric.view(-1, grid.group_size)).sum(-1)
    return (torch.einsum("ngk,gkl->ngl", difference, metric) * difference).sum(-1)


def group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group of a weight [N, K]: [N, K / G] float32 each."""
    groups = weight.float().unflatten(1, (-1, group_size))
    return groups.amin(-1), groups.amax(-1)
