"""The values that the codes of a quantised weight can stand for, and the choice of them.

Zero points are whole numbers from 0 to 2^bits - 1, as checkpoints of other tools have them: 0 is then one of the
values, so every range is widened to include it. Codes and zero points of fewer bits than the kernel's format
stand in the middle of its range: less 8 (`Int4`) or 0 (`Int8`) they are signed numbers of that many bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve_kernels.formats import Int4, Int8
from fastserve_kernels.weight import pack_pairs, spread, unpack_pairs

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
        """
        flat = scales == 0
        stored = torch.where(flat, minimums.abs(), scales)
        stored = _stored(stored, dtype)
        return cls(stored, (-minimums / stored.double()).to(dtype), bits, group_size)

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


def bits_of(weight: Int4 | Int8) -> int:
    """The fewest bits, 2 to 8, that hold its codes as signed numbers."""
    codes = unpack_pairs(weight.codes).to(torch.int8) - 8 if isinstance(weight, Int4) else weight.values
    # -8 needs as many bits as 7: ~x is -x - 1.
    largest = int(torch.where(codes < 0, ~codes, codes).max())
    return max(2, 1 + largest.bit_length())
