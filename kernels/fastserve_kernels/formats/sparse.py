"""Formats that leave weights out: two of each four, the same in four bits, blocks, and single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastserve_kernels.formats.quantized import round_to_integers
from fastserve_kernels.formats.weight import (
    FLOATS,
    GROUP_SIZES,
    MatrixWeight,
    Weight,
    check_even,
    check_tensor,
    check_weight,
    pack_pairs,
    spread,
    unpack_pairs,
)

BLOCK_SIZES = (16, 32, 64, 128)
"""Rows, and columns, that a block may have."""


@dataclass(frozen=True, eq=False)
class Sparse24(MatrixWeight):
    """Two of each four adjacent columns of a row are kept, as NVIDIA's sparse tensor cores want it."""

    values: Tensor
    """[N, K / 2] float32, float16 or bfloat16: what is kept, in the order of the columns. K % 8 == 0."""
    indices: Tensor
    """[N, K / 8] uint8: 4 bits for each four columns, the earlier four in the low nibble: the column, 0 to 3,
    of the first that is kept in the low two bits, that of the second, which is greater, in the high two."""

    operator: ClassVar[str] = "linear_sparse24"
    columns_per_element: ClassVar[int] = 2

    @classmethod
    def pack(cls, weight: Tensor) -> Sparse24:
        """Keeps the two of largest magnitude of each four columns of a float weight [N, K]; of equal ones
        those that come first. A weight that has two zeros in each four is kept as it is.

        Raises ValueError if the weight is no finite float matrix, or K is no multiple of 8.
        """
        return cls(*_keep_two_of_four(weight))

    def _check(self) -> None:
        n, half = check_tensor("Sparse24.values", self.values, ("N", "K / 2"), FLOATS)
        check_even(2 * half, 8)
        _check_indices("Sparse24.indices", self.indices, n, 2 * half)

    def dequantize(self) -> Tensor:
        """The kept values in their columns, zeros elsewhere: [N, K] float32."""
        return _put_two_of_four(self.values.float(), self.indices)


@dataclass(frozen=True, eq=False)
class Sparse24Int4(MatrixWeight):
    """Two of each four columns are kept, as in `Sparse24`, each as w = (code - 8) * scale, with codes from 0
    to 15."""

    codes: Tensor
    """[N, K / 4] uint8: two codes per byte, the earlier in the low nibble; in the order of the columns."""
    indices: Tensor
    """[N, K / 8] uint8: as in `Sparse24`."""
    scales: Tensor
    """[N, K / G] float32, float16 or bfloat16."""
    group_size: int
    """G: columns, kept or not, that share a scale: 32, 64 or 128."""

    operator: ClassVar[str] = "linear_sparse24_int4"
    columns_per_element: ClassVar[int] = 4

    @classmethod
    def pack(
        cls, weight: Tensor, group_size: int = 128, scale_dtype: torch.dtype | None = None
    ) -> Sparse24Int4:
        """Keeps of each four columns what `Sparse24.pack` keeps, and rounds it with scale = max|w| / 7.5.

        `scale_dtype` None is that of the weight. Raises ValueError if the weight is no finite float matrix, K
        is no multiple of the group size, or `scale_dtype` cannot hold a scale.
        """
        values, indices = _keep_two_of_four(weight)
        _check_sparse_group_size(group_size, weight.shape[1])
        codes, scales, _ = round_to_integers(values, group_size // 2, 4, True, scale_dtype)
        return cls(pack_pairs(codes), indices, scales, group_size)

    def _check(self) -> None:
        n, quarter = check_tensor("Sparse24Int4.codes", self.codes, ("N", "K / 4"), (torch.uint8,))
        _check_sparse_group_size(self.group_size, 4 * quarter)
        _check_indices("Sparse24Int4.indices", self.indices, n, 4 * quarter)
        check_tensor("Sparse24Int4.scales", self.scales, (n, 4 * quarter // self.group_size), FLOATS)

    def dequantize(self) -> Tensor:
        """(code - 8) * scale in the kept columns, zeros elsewhere: [N, K] float32."""
        kept = (unpack_pairs(self.codes).float() - 8) * spread(self.scales, self.group_size // 2)
        return _put_two_of_four(kept, self.indices)


@dataclass(frozen=True, eq=False)
class BlockSparse(Weight):
    """Blocks of bn rows and bk columns, each kept whole or left out: block compressed rows."""

    blocks: Tensor
    """[B, bn, bk] float32, float16 or bfloat16: block rows in order, in each the columns ascending. bn and bk
    are 16, 32, 64 or 128."""
    row_starts: Tensor
    """[N / bn + 1] int32: the blocks of block row i are row_starts[i] to row_starts[i + 1]."""
    columns: Tensor
    """[B] int32: the block column of each block, from 0 to K / bk - 1."""
    shape: tuple[int, int]
    """(N, K), multiples of bn and bk."""

    operator: ClassVar[str] = "linear_block_sparse"

    @classmethod
    def pack(
        cls, weight: Tensor, block_shape: tuple[int, int] = (64, 64), density: float | None = None
    ) -> BlockSparse:
        """Keeps the blocks of a float weight [N, K] that have the largest sums of magnitudes: the fraction
        `density` of all blocks, or, if that is None, every block that is not zero.

        Raises ValueError if the weight is no finite float matrix, does not divide into blocks, or `density`
        is not above 0 and at most 1.
        """
        weight = check_weight(weight)
        _check_block_shape(block_shape, tuple(weight.shape))
        rows, columns = block_shape
        tiles = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
        norms = tiles.float().abs().sum((-1, -2))
        kept = norms > 0 if density is None else _largest(norms, density)
        starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        return cls(
            tiles[kept],
            starts.to(torch.int32),
            kept.nonzero()[:, 1].to(torch.int32),
            (weight.shape[0], weight.shape[1]),
        )

    def _check(self) -> None:
        if self.blocks.dim() != 3:
            raise ValueError(f"BlockSparse.blocks must have shape [B, bn, bk], not {list(self.blocks.shape)}")
        count, rows, columns = self.blocks.shape
        _check_block_shape((rows, columns), self.shape)
        check_tensor("BlockSparse.blocks", self.blocks, (count, rows, columns), FLOATS)
        block_rows, block_columns = self.shape[0] // rows, self.shape[1] // columns
        check_tensor("BlockSparse.columns", self.columns, (count,), (torch.int32,))
        _check_starts("BlockSparse.row_starts", self.row_starts, block_rows, count)
        if ((self.columns < 0) | (self.columns >= block_columns)).any():
            raise ValueError(
                f"BlockSparse.columns must be from 0 to {block_columns - 1}, not from "
                f"{int(self.columns.min())} to {int(self.columns.max())}"
            )
        # In order over all block rows: each block stands behind the one before it.
        if (self._block_rows() * block_columns + self.columns).diff().le(0).any():
            raise ValueError("BlockSparse.columns must ascend within each block row")

    def _block_rows(self) -> Tensor:
        """The block row [B] of each block."""
        block_rows = torch.arange(len(self.row_starts) - 1, device=self.row_starts.device)
        return block_rows.repeat_interleave(self.row_starts.diff())

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[1]

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""
        return (self.blocks, self.row_starts, self.columns, self.out_features)

    def dequantize(self) -> Tensor:
        """The blocks in their places, zeros elsewhere: [N, K] float32."""
        _, rows, columns = self.blocks.shape
        n, k = self.shape
        tiles = self.blocks.new_zeros(n // rows, k // columns, rows, columns, dtype=torch.float32)
        tiles[self._block_rows(), self.columns.long()] = self.blocks.float()
        return tiles.transpose(1, 2).reshape(n, k)


@dataclass(frozen=True, eq=False)
class Bitmap(Weight):
    """Any weights kept, one by one, and a bit for each of the N K that says whether."""

    values: Tensor
    """[nnz] float32, float16 or bfloat16: what is kept, row by row, in the order of the columns."""
    mask: Tensor
    """[N, ceil(K / 8)] uint8: bit k % 8, counted from the lowest, of byte k / 8 is 1 where column k is kept;
    the bits beyond K are 0."""
    row_starts: Tensor
    """[N + 1] int32: the values of row i are row_starts[i] to row_starts[i + 1]."""
    in_features: int
    """K."""

    operator: ClassVar[str] = "linear_bitmap"

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor | None = None, density: float | None = None) -> Bitmap:
        """Keeps of a float weight [N, K] where `mask` [N, K] bool is true; or the fraction `density` of the
        elements that is largest in magnitude; or, if both are None, whatever is not zero.

        Raises ValueError if the weight is no finite float matrix, both are given, the mask has another shape
        or dtype, or `density` is not above 0 and at most 1.
        """
        weight = check_weight(weight)
        if mask is not None and density is not None:
            raise ValueError("Bitmap.pack takes a mask or a density, not both")
        if mask is not None:
            check_tensor("mask", mask, tuple(weight.shape), (torch.bool,))
        elif density is not None:
            mask = _largest(weight.float().abs(), density)
        else:
            mask = weight != 0
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(weight[mask], pack_bits(mask), starts.to(torch.int32), weight.shape[1])

    def _check(self) -> None:
        if self.in_features < 1:
            raise ValueError(f"Bitmap.in_features must be 1 or more, not {self.in_features}")
        count = self.values.numel()
        check_tensor("Bitmap.values", self.values, (count,), FLOATS)
        n, _ = check_tensor("Bitmap.mask", self.mask, ("N", -(-self.in_features // 8)), (torch.uint8,))
        _check_starts("Bitmap.row_starts", self.row_starts, n, count)
        kept = unpack_bits(self.mask, 8 * self.mask.shape[1])
        if kept[:, self.in_features :].any() or not torch.equal(kept.sum(1), self.row_starts.diff()):
            raise ValueError(
                "Bitmap.mask must have as many bits in each row as row_starts says, none beyond in_features"
            )

    @property
    def out_features(self) -> int:
        """N."""
        return self.mask.shape[0]

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What the operator takes between x and bias, in the plain layout."""
        return (self.values, self.mask, self.row_starts, self.out_features)

    def dequantize(self) -> Tensor:
        """The kept values in their places, zeros elsewhere: [N, K] float32."""
        dense = self.values.new_zeros(self.out_features, self.in_features, dtype=torch.float32)
        return dense.masked_scatter_(unpack_bits(self.mask, self.in_features), self.values.float())


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans [N, K] as bytes [N, ceil(K / 8)]: column k in bit k % 8, from the lowest, of byte k / 8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Bytes [N, ceil(K / 8)] as booleans [N, K]."""
    bits = packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :columns].bool()


def _keep_two_of_four(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values and indices of `Sparse24`."""
    weight = check_weight(weight)
    check_even(weight.shape[1], 8)
    fours = weight.unflatten(1, (-1, 4))
    kept = fours.abs().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    nibbles = kept[..., 0] | kept[..., 1] << 2
    return fours.gather(-1, kept).flatten(1), pack_pairs(nibbles)


def _put_two_of_four(kept: Tensor, indices: Tensor) -> Tensor:
    """[N, K / 2] values in their places of [N, K]."""
    nibbles = unpack_pairs(indices)
    columns = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    fours = kept.new_zeros(*nibbles.shape, 4)
    return fours.scatter_(-1, columns, kept.unflatten(1, (-1, 2))).flatten(1)


def _check_indices(field: str, indices: Tensor, rows: int, columns: int) -> None:
    check_tensor(field, indices, (rows, columns // 8), (torch.uint8,))
    nibbles = unpack_pairs(indices)
    if not (nibbles & 3 < nibbles >> 2).all():
        raise ValueError(f"{field} must hold two different columns of each four, the lower first")


def _check_sparse_group_size(group_size: int, columns: int) -> None:
    if group_size not in GROUP_SIZES or columns % group_size:
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))} that divides the {columns} "
            f"columns, not {group_size}"
        )


def _check_block_shape(block_shape: tuple[int, int], shape: tuple[int, ...]) -> None:
    for size, whole, what in zip(block_shape, shape, ("rows", "columns"), strict=True):
        if size not in BLOCK_SIZES or whole % size:
            raise ValueError(
                f"a block must have {', '.join(map(str, BLOCK_SIZES))} {what}, which divide the weight's "
                f"{whole}, not {size}"
            )


def _check_starts(field: str, starts: Tensor, rows: int, count: int) -> None:
    """Compressed rows: `count` things in `rows` rows."""
    check_tensor(field, starts, (rows + 1,), (torch.int32,))
    if int(starts[0]) != 0 or int(starts[-1]) != count or (starts.diff() < 0).any():
        raise ValueError(f"{field} must ascend from 0 to {count}")


def _largest(sizes: Tensor, density: float) -> Tensor:
    """True for the fraction `density` of the sizes that is largest."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, not {density}")
    count = round(density * sizes.numel())
    kept = torch.zeros_like(sizes, dtype=torch.bool).flatten()
    kept[sizes.flatten().topk(count, sorted=False).indices] = True
    return kept.view(sizes.shape)
