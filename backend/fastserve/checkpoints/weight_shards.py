"""Parts of weights in any format, for ranks that share a matrix: some rows of it, or some columns.

The numbers stay what they are: codes are not rounded again, and a group that is cut keeps its scale in either
part.
"""

from __future__ import annotations

from dataclasses import fields, replace
from math import gcd
from typing import Any

from torch import Tensor

from fastserve.checkpoints.model_error import ModelError
from fastserve_kernels.formats import (
    FP8,
    NF4,
    W8A8,
    Bitmap,
    BlockSparse,
    Dense,
    Int4,
    Int8,
    IntRows,
    LowRank,
    Sparse24,
    Sparse24Int4,
    Weight,
)
from fastserve_kernels.formats.sparse import BLOCK_SIZES, unpack_bits
from fastserve_kernels.formats.weight import GROUP_SIZES

_SHARED = ("codebook",)
"""Tensors that all rows share."""


def shard_rows(weight: Weight, rows: range) -> Weight:
    """Adjacent rows of a weight [N, K]. Raises ModelError for a format that cannot be cut there."""
    return _cut(weight, rows, range(weight.in_features))


def shard_columns(weight: Weight, columns: range) -> Weight:
    """Adjacent columns of a weight [N, K]. Raises ModelError for a format that cannot be cut there."""
    return _cut(weight, range(weight.out_features), columns)


def _cut(weight: Weight, rows: range, columns: range) -> Weight:
    if isinstance(weight, Dense):
        return Dense(_part(weight.weight, rows, columns))
    if isinstance(weight, LowRank):
        return LowRank(
            _part(weight.down, range(len(weight.down)), columns),
            _part(weight.up, rows, range(weight.up.shape[1])),
        )
    if isinstance(weight, IntRows):
        return _cut_int_rows(weight, rows, columns)
    if isinstance(weight, BlockSparse):
        block = _block_shape(weight, rows, columns)
        return BlockSparse.pack(_part(weight.dequantize(), rows, columns).to(weight.blocks.dtype), block)
    if isinstance(weight, Bitmap):
        mask = unpack_bits(weight.mask, weight.in_features)
        numbers = _part(weight.dequantize(), rows, columns).to(weight.values.dtype)
        return Bitmap.pack(numbers, _part(mask, rows, columns))
    if isinstance(weight, Int4 | Int8 | NF4 | FP8 | W8A8 | Sparse24 | Sparse24Int4):
        return _cut_matrix(weight, rows, columns)
    if len(columns) == weight.in_features:  # a format of one's own
        return _cut_matrix(weight, rows, columns)
    raise ModelError(f"a weight in {type(weight).__name__} cannot be cut into columns for several ranks")


def _part(tensor: Tensor, rows: range, columns: range) -> Tensor:
    return tensor[rows.start : rows.stop, columns.start : columns.stop].contiguous()


def _cut_matrix(weight: Any, rows: range, columns: range) -> Weight:
    """Of tensors with a row for each row, and as many columns or a fraction of them."""
    group_size = getattr(weight, "group_size", None)
    values: dict[str, Any] = {}
    if group_size is not None:
        values["group_size"] = new_size = _group_size(weight, group_size, columns)
        values["scales"] = _cut_groups(weight.scales, group_size, new_size, rows, columns)
    for field in fields(weight):
        tensor = getattr(weight, field.name)
        if not isinstance(tensor, Tensor) or field.name in (*values, *_SHARED):
            continue
        if field.name == "zeros" and group_size is not None:
            values["zeros"] = _cut_groups(tensor, group_size, values["group_size"], rows, columns)
        elif tensor.dim() == 1:
            values[field.name] = tensor[rows.start : rows.stop].contiguous()
        else:
            values[field.name] = _part(tensor, rows, _scaled(weight, tensor, columns))
    cut: Weight = replace(weight, **values)
    return cut


def _scaled(weight: Weight, tensor: Tensor, columns: range) -> range:
    """The columns of a tensor in which several columns of the weight lie together."""
    per_element = weight.in_features // tensor.shape[1]
    if columns.start % per_element or columns.stop % per_element:
        raise _misaligned(weight, columns, f"multiples of {per_element}")
    return range(columns.start // per_element, columns.stop // per_element)


def _misaligned(weight: Weight, columns: range, allowed: str) -> ModelError:
    return ModelError(
        f"a weight in {type(weight).__name__} cannot be cut at columns {columns.start} and {columns.stop} of "
        f"{weight.in_features} for several ranks; allowed: {allowed}"
    )


def _group_size(weight: Weight, group_size: int, columns: range) -> int:
    """Of the part: what divides the group and both ends, or all columns where a row is one group."""
    if group_size == weight.in_features:
        return len(columns)
    size = gcd(gcd(group_size, columns.start), columns.stop)
    if size not in GROUP_SIZES:
        raise _misaligned(weight, columns, f"multiples of {GROUP_SIZES[0]}")
    return size


def _cut_groups(tensor: Tensor, old_size: int, new_size: int, rows: range, columns: range) -> Tensor:
    """Values [N, K / G] of groups, for the part's groups."""
    values = tensor[rows.start : rows.stop]
    if tensor.shape[1] == 1 and len(columns) == new_size:
        return values.contiguous()
    finer = values.repeat_interleave(old_size // new_size, dim=1)
    return finer[:, columns.start // new_size : columns.stop // new_size].contiguous()


def _cut_int_rows(weight: IntRows, rows: range, columns: range) -> IntRows:
    codes, zeros = weight.codes()
    size = _group_size(weight, weight.group_size, columns)
    if zeros is not None:
        zeros = _cut_groups(zeros, weight.group_size, size, rows, columns)
    return IntRows.from_codes(
        _part(codes, rows, columns),
        weight.bits[rows.start : rows.stop].contiguous(),
        _cut_groups(weight.scales, weight.group_size, size, rows, columns),
        zeros,
    )


def _block_shape(weight: BlockSparse, rows: range, columns: range) -> tuple[int, int]:
    """The largest blocks that the weight's own divide into and that the part divides into."""
    found = []
    for size, part in zip(weight.blocks.shape[1:], (rows, columns), strict=True):
        fitting = gcd(gcd(size, part.start), part.stop)
        if fitting not in BLOCK_SIZES:
            raise _misaligned(weight, columns, f"rows and columns that are multiples of {BLOCK_SIZES[0]}")
        found.append(fitting)
    return found[0], found[1]
