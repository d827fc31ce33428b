"""Integers of as many bits as each row needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastserve_kernels.code_words import pack_codes, unpack_codes, words_of
from fastserve_kernels.quantised import Int8, round_to_integers
from fastserve_kernels.weight import FLOATS, Weight, check_group_size, check_tensor, check_weight


@dataclass(frozen=True, eq=False)
class IntRows(Weight):
    """w = (code - zero) * scale, with codes of 2 to 8 bits, the same for all of a row.

    The operator's arguments are those of the `Int8` that holds the same numbers, made at each call.
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

    operator: ClassVar[str] = "linear_int8"

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
        """Of codes [N, K] uint8 below 2^bits, bits [N] uint8, scales [N, K / G] and whole zero points of the
        same shape, or None. Raises ValueError if a row's bits are not from 2 to 8."""
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
        return self.scales.shape[0]

    @property
    def in_features(self) -> int:
        return self.scales.shape[1] * self.group_size

    @property
    def _codes_of_a_row(self) -> int:
        """Zero points included."""
        return self.in_features + (0 if self.symmetric else self.scales.shape[1])

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        return self.int8().arguments

    def int8(self) -> Int8:
        """The same numbers, less 2^(bits - 1): those of rows of 4 bits at most are from -8 to 7."""
        shape = (self.out_features, self._codes_of_a_row)
        stored = torch.empty(shape, dtype=torch.int16, device=self.device)
        start = 0
        for width, rows in rows_by_width(self.bits):
            count = len(rows) * self._codes_of_a_row
            stop = start + words_of(count, width)
            codes = unpack_codes(self.words[None, start:stop], width, count).short() - 2 ** (width - 1)
            stored[rows] = codes.view(len(rows), -1)
            start = stop
        values, zeros = stored[:, : self.in_features], stored[:, self.in_features :]
        return Int8(
            values.to(torch.int8).contiguous(),
            self.scales,
            None if self.symmetric else zeros.to(self.scales.dtype),
            self.group_size,
        )

    def dequantize(self) -> Tensor:
        return self.int8().dequantize()


def rows_by_width(bits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each number of bits that a row [N] has, the fewest first, and which rows have it, int64."""
    for width in bits.unique().tolist():
        yield width, (bits == width).nonzero()[:, 0]
