"""Weights packed for the CPU's linears (`cpu.linears`), once, at load.

The kernels (`cpu.kernels.linear`) need AVX-512 with BF16, VBMI and VNNI; those of integers alone
(`cpu.kernels.integer_linear`) AVX2. On another processor `prepare_*` of a format dequantizes the weight to a
dense one, and warns of it; oneDNN multiplies by that.

| format | packed as | bits per weight, bfloat16 |
|---|---|---|
| `Dense`, `Bitmap`, `Sparse24` | oneDNN's blocks | 16 |
| `Int4`, `NF4`, `Sparse24Int4` | nibbles | 4, and the scales |
| `Int8`, `FP8` | codes of 8 bits; `Int8` for activations of 8 bits: quads | 8, and the scales |
| `IntRows` | nibbles of some rows, codes of 8 bits of the others | 4 or 8, and the scales |
| `W8A8` | quads | 8 |
| `BlockSparse` | words of the blocks there are | 16 times the density |
| `LowRank` | words of both matrices | |

For float32 and float16 activations words are float32, which doubles the last two; the products are then
those of float32. For bfloat16 they are the exact products of bfloat16, and the codebook of `NF4` is rounded
to that.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fastserve_kernels.cpu.kernels import cpu_features, packing
from fastserve_kernels.cpu.kernels.cpu_features import FLOAT_PRODUCTS, INTEGER_PRODUCTS
from fastserve_kernels.cpu.kernels.huge_pages import in_huge_pages
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
)
from fastserve_kernels.formats.prepared import Prepared
from fastserve_kernels.formats.weight import Weight, pack_pairs, unpack_pairs

AnyWeight = TypeVar("AnyWeight", bound=Weight)
Prepare = Callable[[AnyWeight, torch.dtype], Prepared]

MAX_W8A8_COLUMNS = 65536
"""Columns whose products of eight bits cannot overflow 32."""


def _dequantized(weight: Weight, needed: tuple[str, ...], dtype: torch.dtype) -> Prepared:
    warnings.warn(
        f"this processor lacks some of {', '.join(needed)}: weights in {type(weight).__name__} are "
        "dequantized as they are loaded, and take as much memory as if they were not quantized",
        stacklevel=3,
    )
    return prepare_dense(Dense(weight.dequantize()), dtype)


def _needs(features: tuple[str, ...]) -> Callable[[Prepare[AnyWeight]], Prepare[AnyWeight]]:
    """Decorates what packs weights for kernels that need these features of a processor: on one without them
    the weight becomes a dense one."""

    def decorate(prepare: Prepare[AnyWeight]) -> Prepare[AnyWeight]:
        @functools.wraps(prepare)
        def prepare_or_dequantize(weight: AnyWeight, dtype: torch.dtype) -> Prepared:
            if cpu_features.has(*features):
                return prepare(weight, dtype)
            return _dequantized(weight, features, dtype)

        return prepare_or_dequantize

    return decorate


def _prepared(operator: str, arguments: tuple[Tensor | int | None, ...], weight: Weight) -> Prepared:
    in_place = tuple(in_huge_pages(a) if isinstance(a, Tensor) else a for a in arguments)
    return Prepared(operator, in_place, weight.out_features, weight.in_features)


def _grouped(weight: Int4 | NF4 | Int8 | FP8, codes: Tensor, *tables: Tensor | None) -> Prepared:
    """A weight of packed codes; `tables` are what its operator takes between scales and out_features."""
    scales = packing.group_rows(weight.scales)
    arguments = (codes, scales, *tables, weight.out_features, weight.group_size)
    return _prepared(weight.operator, arguments, weight)


def _group_rows(zeros: Tensor | None) -> Tensor | None:
    return None if zeros is None else packing.group_rows(zeros)


def prepare_dense(weight: Dense, dtype: torch.dtype) -> Prepared:
    """In oneDNN's blocks, which it multiplies by twice as fast as torch by a plain bfloat16 weight, and four
    times by a float32 one; it has none for float16. Of a processor without bfloat16 they are float32."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return prepare_dense(weight, torch.float32)
    plain = weight.weight.detach().to(dtype).contiguous()
    if dtype != torch.float16:
        plain = torch.ops.mkldnn._reorder_linear_weight(plain, None)
    return Prepared("linear", (plain,), weight.out_features, weight.in_features)


@_needs(FLOAT_PRODUCTS)
def prepare_int4(weight: Int4, dtype: torch.dtype) -> Prepared:
    """Nibbles, and scales and zeros by panel."""
    return _pack_int4(weight)


def _pack_int4(weight: Int4) -> Prepared:
    return _grouped(weight, packing.nibbles(unpack_pairs(weight.codes)), _group_rows(weight.zeros))


@_needs(FLOAT_PRODUCTS)
def prepare_nf4(weight: NF4, dtype: torch.dtype) -> Prepared:
    """Nibbles, and the codebook as a table of words for activations of the dtype."""
    table = packing.nibble_table(weight.codebook, dtype)
    return _grouped(weight, packing.nibbles(unpack_pairs(weight.codes)), table)


@_needs(FLOAT_PRODUCTS)
def prepare_int8(weight: Int8, dtype: torch.dtype) -> Prepared:
    """A code of eight bits is a sign and one of seven: v is stored as v, and as -1 - v if it is negative,
    which stand for v + 1/2 in either case. The halves are taken off with the zeros."""
    folded = weight.values ^ (weight.values >> 7 & 0x7F)
    return _grouped(weight, packing.codes(folded.view(torch.uint8)), _group_rows(weight.zeros))


@_needs(FLOAT_PRODUCTS)
def prepare_int_rows(weight: IntRows, dtype: torch.dtype) -> Prepared:
    """Nibbles of the rows of at most 4 bits, codes of 8 bits of the others."""

    def pack(part: Int4 | Int8) -> tuple[Tensor | int | None, ...]:
        if isinstance(part, Int4):
            return prepare_int4(part, dtype).arguments
        return prepare_int8(part, dtype).arguments

    return Prepared(weight.operator, weight.arguments_of(pack), weight.out_features, weight.in_features)


@_needs(FLOAT_PRODUCTS)
def prepare_fp8(weight: FP8, dtype: torch.dtype) -> Prepared:
    """Codes of 8 bits, which are looked up in a table of bfloat16."""
    return _grouped(weight, packing.codes(weight.values.view(torch.uint8)))


@_needs(INTEGER_PRODUCTS)
def prepare_w8a8(weight: W8A8, dtype: torch.dtype) -> Prepared:
    """Dequantized, the activations are not rounded to eight bits either. Raises ValueError if there are so
    many columns that a sum might overflow."""
    if weight.in_features > MAX_W8A8_COLUMNS:
        raise ValueError(
            f"W8A8 on a CPU takes at most {MAX_W8A8_COLUMNS} columns, not {weight.in_features}: "
            "their sum might overflow 32 bits"
        )
    scales = packing.group_rows(weight.scales[:, None])
    arguments = (packing.quads(weight.values), scales, weight.out_features)
    return _prepared("linear_w8a8", arguments, weight)


def prepare_bitmap(weight: Bitmap | Sparse24, dtype: torch.dtype) -> Prepared:
    """A dense weight: to put single weights in their places takes 3 to 4 cycles for each 32, more than a
    CPU's memory takes to bring the zeros too (0.7 to 1.0 times the speed of a dense weight, measured)."""
    return prepare_dense(Dense(weight.dequantize()), dtype)


def prepare_sparse24_int4(weight: Sparse24Int4, dtype: torch.dtype) -> Prepared:
    """An `Int4`, where what was left out has the code 8, which is 0: 4 bits for 3, but half the
    instructions."""
    unscaled = Sparse24Int4(
        weight.codes, weight.indices, torch.ones_like(weight.scales), weight.group_size
    ).dequantize()
    pairs = pack_pairs(unscaled + 8)
    return prepare_int4(Int4(pairs, weight.scales, None, weight.group_size), dtype)


@_needs(FLOAT_PRODUCTS)
def prepare_block_sparse(weight: BlockSparse, dtype: torch.dtype) -> Prepared:
    """Two block rows of 16 become one of 32, filled up with zeros where they do not have the same columns."""
    values, starts, columns = weight.blocks, weight.row_starts.long(), weight.columns.long()
    if values.shape[1] < packing.PANEL_ROWS:
        values, starts, columns = packing.taller_blocks(values, starts, columns)
    arguments = (packing.blocks(values, starts, dtype), starts, columns, weight.out_features)
    return _prepared("linear_block_sparse", arguments, weight)


@_needs(FLOAT_PRODUCTS)
def prepare_low_rank(weight: LowRank, dtype: torch.dtype) -> Prepared:
    """Both matrices in words, as `BlockSparse` whose blocks are all there."""
    arguments = (packing.whole(weight.down, dtype), packing.whole(weight.up, dtype))
    return Prepared("linear_low_rank", arguments, weight.out_features, weight.in_features)


@_needs(INTEGER_PRODUCTS)
def prepare_int4_a8(weight: Int4, dtype: torch.dtype) -> Prepared:
    """Nibbles, and scales and zeros by panel, for activations of 8 bits."""
    return replace(_pack_int4(weight), operator="linear_int4_a8")


@_needs(INTEGER_PRODUCTS)
def prepare_int8_a8(weight: Int8, dtype: torch.dtype) -> Prepared:
    """Quads, and scales and zeros by panel, for activations of 8 bits."""
    prepared = _grouped(weight, packing.quads(weight.values, 32), _group_rows(weight.zeros))
    return replace(prepared, operator="linear_int8_a8")


PREPARE: Mapping[type[Weight], Callable[..., Prepared]] = {
    Dense: prepare_dense,
    Int4: prepare_int4,
    NF4: prepare_nf4,
    Int8: prepare_int8,
    IntRows: prepare_int_rows,
    FP8: prepare_fp8,
    W8A8: prepare_w8a8,
    Bitmap: prepare_bitmap,
    Sparse24: prepare_bitmap,
    Sparse24Int4: prepare_sparse24_int4,
    BlockSparse: prepare_block_sparse,
    LowRank: prepare_low_rank,
}
"""What packs a weight that lies on the CPU for activations of a dtype, by the weight's type."""
PREPARE_A8: Mapping[type[Weight], Callable[..., Prepared]] = {Int4: prepare_int4_a8, Int8: prepare_int8_a8}
"""For activations that are rounded to 8 bits, in groups."""
