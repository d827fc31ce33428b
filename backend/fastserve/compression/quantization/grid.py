"""The values that the codes of a quantized weight can stand for, and the choice of them.

Zero points are whole numbers from 0 to 2^bits - 1, as checkpoints of other tools have them: 0 is then one of
the values, so every range is widened to include it. Codes and zero points of fewer bits than the kernel's
format stand in the middle of its range: less 8 (`Int4`) or 0 (`Int8`) they are signed numbers of that many
bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8
from fastserve_kernels.formats.weight import pack_pairs, spread

RATIOS = tuple(1 - 0.025 * step for step in range(21))
"""Of the range that is kept to the range of the weights: what `search` tries."""
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
    def whole_range(
        cls, weight: Tensor, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
    ) -> Grid:
        """Of the range of each group of a weight [N, K], widened to include 0."""
        groups = weight.float().unflatten(1, (-1, group_size))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        return cls.from_ranges(low, high, bits, group_size, dtype, symmetric)

    @classmethod
    def from_ranges(
        cls, low: Tensor, high: Tensor, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
    ) -> Grid:
        """Of ranges [N, K / G] that include 0: [low, high], or [-a, a] with a the larger of the two."""
        largest = 2**bits - 1
        if symmetric:
            return cls(_stored(2 * torch.maximum(-low, high) / largest, dtype), None, bits, group_size)
        scales = _stored((high - low) / largest, dtype)
        zeros = (-low / scales.float()).round().clamp(0, largest)
        return cls(scales, zeros.to(dtype), bits, group_size)

    @classmethod
    def from_minimums(
        cls, scales: Tensor, minimums: Tensor, bits: int, group_size: int, dtype: torch.dtype
    ) -> Grid:
        """The grid code * scale + minimum, whose zero points are no whole numbers.

        A group of equal elements, whose scale is 0, has them at code 0, as the value of a scale of its own.
        Where the dtype would move a value by more than 1/32 of a step it is float32 instead.
        """
        flat = scales == 0
        stored = _stored(torch.where(flat, minimums.abs(), scales), dtype)
        zeros = -minimums / stored.double()
        if dtype != torch.float32 and (zeros.to(dtype) - zeros).abs().max() > 1 / 32:
            return cls.from_minimums(scales, minimums, bits, group_size, torch.float32)
        return cls(stored, zeros.to(dtype), bits, group_size)

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes [N, K] float32 of the values that are nearest to a weight [N, K]."""
        scales, zeros = self.columns()
        return (weight / scales + zeros).round_().clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32."""
        scales, zeros = self.columns()
        return (codes - zeros) * scales

    def columns(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of every weight, [N, K] float32."""
        scales = spread(self.scales, self.group_size)
        if self.zeros is None:
            return scales, torch.full_like(scales, 2.0 ** (self.bits - 1))
        return scales, spread(self.zeros, self.group_size)

    def with_scales(self, scales: Tensor) -> Grid:
        """The same with other scales [N, K / G], rounded to the dtype of these."""
        return replace(self, scales=_stored(scales, self.scales.dtype))

    def shifted(self, steps: int) -> Grid:
        """The same with zero points moved, as far as they may be."""
        if self.zeros is None:
            return self
        return replace(self, zeros=(self.zeros + steps).clamp(0, 2**self.bits - 1))

    def where(self, kept: Tensor, other: Grid) -> Grid:
        """Of the groups [N, K / G] that `kept` is true for this grid, of the rest another."""
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
    ratios: tuple[float, ...] = RATIOS,
) -> Grid:
    """The grid on which rounding a weight [N, K] to nearest costs each group least.

    Tried are the group's range, shrunk by each of the ratios, and zero points one step off. The cost is the
    sum of d^2 over the group, d being what rounding changes; with a `metric` [K] that of metric_k d_k^2, and
    with a `metric` [K / G, G, G] it is d^T metric d.
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
    best = whole = Grid.whole_range(weight, bits, group_size, dtype, symmetric)
    least = _costs(weight, best, metric)
    for ratio in ratios:
        for shift in (0,) if symmetric else (0, 1, -1):
            candidate = whole.with_scales(whole.scales.float() * ratio).shifted(shift)
            costs = _costs(weight, candidate, metric)
            best = best.where(costs >= least, candidate)
            least = torch.minimum(costs, least)
    return best


def _costs(weight: Tensor, grid: Grid, metric: Tensor | None) -> Tensor:
    """Of rounding each group, [N, K / G]."""
    difference = (grid.values(grid.nearest(weight)) - weight).unflatten(1, (-1, grid.group_size))
    if metric is None:
        return difference.square().sum(-1)
    if metric.dim() == 1:
        return (difference.square() * metric.view(-1, grid.group_size)).sum(-1)
    return (torch.einsum("ngk,gkl->ngl", difference, metric) * difference).sum(-1)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in a dtype, none so small that it is 0 or loses precision."""
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)
