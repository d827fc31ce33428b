"""Integers of as many bits as each row needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastserve_kernels.formats.bitpacking import pack_codes, unpack_codes, words_of
from fastserve_kernels.formats.quantized import Int4, Int8, round_to_integers
from fastserve_kernels.formats.weight import (
    FLOATS,
    Weight,
    check_group_size,
    check_tensor,
    check_weight,
    pack_pairs,
)

PANEL_ROWS = 32
"""Rows that kernels take together."""


@dataclass(frozen=True, eq=False)
class IntRows(Weight):
    """w = (code - zero) * scale, with codes of 2 to 8 bits, the same for all of a row.

    The operator multiplies by an `Int4` and an `Int8` that hold the same numbers (`parts`).
    """

    words: Tensor
    """[words] int32: all rows of the fewest bits, then those of the next, each time in whole words
    (`code_words`). A row has its K codes and, if there are any, its K / G zero points of as many bits, which
    are whole numbers."""
    bits: Tensor
    """[N] uint8 of a code of each row."""
    scales: Tensor
    """[N, K / G] float32, float16 or bfloat16."""
    group_size: int
    """32, 64, 128, or K: one group per row."""
    symmetric: bool
    """No zero points are stored: they are 2^(bits - 1)."""

    operator: ClassVar[str] = "linear_int_rows"

    @classmethod
    def pack(
        cls, weight: Tensor, bits: Tensor, group_size: int | None = None, symmetric: bool = True
    ) -> IntRows:
        """Rounds a float weight [N, K] to the nearest codes, of bits [N] for each row; see `Int4.pack`.

        `group_size` None is one group per row. Raises ValueError if the weight is no finite float matrix, K
        is no multiple of the group size, or a row's bits are not from 2 to 8.
        """
        weight = check_weight(weight)
        size = weight.shape[1] if group_size is None else group_size
        check_group_size(size, weight.shape[1])
        check_tensor("bits", bits, (len(weight),), (torch.uint8,))
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = weight.new_empty(len(weight), weight.shape[1] // size)
        zeros = None if symmetric else torch.empty_like(scales)
        for width, rows in rows_by_width(bits):
            found, scales[rows], of_rows = round_to_integers(weight[rows], size, width, symmetric, None)
            codes[rows] = found.to(torch.uint8)
            if zeros is not None and of_rows is not None:
                zeros[rows] = of_rows
        return cls.from_codes(codes, bits, scales, zeros)

    @classmethod
    def from_codes(cls, codes: Tensor, bits: Tensor, scales: Tensor, zeros: Tensor | None) -> IntRows:
        """A weight of codes [N, K] uint8 below 2^bits, bits [N] uint8, scales [N, K / G] and whole zero
        points [N, K / G], or None. Raises ValueError if a row's bits are not from 2 to 8."""
        stored = codes if zeros is None else torch.cat((codes, zeros.to(torch.uint8)), 1)
        words = [pack_codes(stored[rows].view(1, -1), width)[0] for width, rows in rows_by_width(bits)]
        return cls(torch.cat(words), bits, scales, codes.shape[1] // scales.shape[1], zeros is None)

    def _check(self) -> None:
        (n,) = check_tensor("IntRows.bits", self.bits, ("N",), (torch.uint8,))
        if int(self.bits.min()) < 2 or int(self.bits.max()) > 8:
            found = f"{int(self.bits.min())} to {int(self.bits.max())}"
            raise ValueError(f"IntRows.bits must be from 2 to 8, not {found}")
        check_tensor("IntRows.scales", self.scales, (n, "K / G"), FLOATS)
        check_group_size(self.group_size, self.in_features)
        words = sum(
            words_of(len(rows) * self._codes_of_a_row, width) for width, rows in rows_by_width(self.bits)
        )
        check_tensor("IntRows.words", self.words, (words,), (torch.int32,))

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.scales.shape[1] * self.group_size

    @property
    def _codes_of_a_row(self) -> int:
        """Zero points included."""
        return self.in_features + (0 if self.symmetric else self.scales.shape[1])

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""
        return self.arguments_of(lambda part: part.arguments)

    def arguments_of(
        self, pack: Callable[[Int4 | Int8], tuple[Tensor | int | None, ...]]
    ) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, where `pack` gives what the operator of a part
        takes: its first three."""
        narrow, wide, rows = self.parts()
        given = [(None,) * 3 if part is None else pack(part)[:3] for part in (narrow, wide)]
        count = 0 if narrow is None else narrow.out_features
        return (*given[0], *given[1], rows, self.out_features, count, self.group_size)

    def parts(self) -> tuple[Int4 | None, Int8 | None, Tensor]:
        """Rows of at most 4 bits, if K is even, and the others; None where there are none. Also which row
        each of these is, one below the other: [N] int64.

        Where there are both, the first are whole panels: what is left of them goes with the others.
        """
        plain = self.int8()
        fits = (self.bits <= 4) & (self.in_features % 2 == 0)
        few, many = fits.nonzero()[:, 0], (~fits).nonzero()[:, 0]
        if len(many):
            few, rest = few.split((len(few) // PANEL_ROWS * PANEL_ROWS, len(few) % PANEL_ROWS))
            many = torch.cat((many, rest)).sort().values
        narrow, wide = None, None
        if len(few):
            zeros = None if plain.zeros is None else plain.zeros[few] + 8
            narrow = Int4(pack_pairs(plain.values[few] + 8), plain.scales[few], zeros, self.group_size)
        if len(many):
            zeros = None if plain.zeros is None else plain.zeros[many]
            wide = Int8(plain.values[many], plain.scales[many], zeros, self.group_size)
        return narrow, wide, torch.cat((few, many))

    def codes(self) -> tuple[Tensor, Tensor | None]:
        """The codes of all rows [N, K] uint8, and their zero points [N, K / G] uint8 if there are any."""
        shape = (self.out_features, self._codes_of_a_row)
        stored = torch.empty(shape, dtype=torch.uint8, device=self.device)
        start = 0
        for width, rows in rows_by_width(self.bits):
            count = len(rows) * self._codes_of_a_row
            stop = start + words_of(count, width)
            stored[rows] = unpack_codes(self.words[None, start:stop], width, count).view(len(rows), -1)
            start = stop
        codes, zeros = stored.split((self.in_features, shape[1] - self.in_features), 1)
        return codes, None if self.symmetric else zeros

    def int8(self) -> Int8:
        """The codes less 2^(bits - 1) as an `Int8`: those of rows of at most 4 bits are from -8 to 7."""
        codes, zeros = self.codes()
        middle = 2 ** (self.bits.short()[:, None] - 1)
        values = (codes.short() - middle).to(torch.int8)
        signed = None if zeros is None else (zeros.short() - middle).to(self.scales.dtype)
        return Int8(values, self.scales, signed, self.group_size)

    def dequantize(self) -> Tensor:
        """(code - zero) * scale: [N, K] float32."""
        return self.int8().dequantize()


def rows_by_width(bits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each number of bits that a row [N] has, the fewest first, and which rows have it, int64."""
    for width in bits.unique().tolist():
        yield width, (bits == width).nonzero()[:, 0]
