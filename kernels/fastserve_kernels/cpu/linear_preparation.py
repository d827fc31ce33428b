"""Linears on a CPU: the arrangement of each weight, once, and the operators on it.

The kernels (`cpu.kernels.linear`) need AVX-512 with BF16, VBMI and VNNI. On another processor `prepare_*` of
a format dequantizes the weight to a dense one, and warns of it; oneDNN multiplies by that.

| format | arrangement | bits per weight, bfloat16 |
|---|---|---|
| `Dense`, `Bitmap`, `Sparse24` | oneDNN's blocks | 16 |
| `Int4`, `NF4`, `Sparse24Int4` | nibbles | 4, and the scales |
| `Int8`, `FP8` | codes of 8 bits | 8, and the scales |
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
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.cpu.kernels import arrangement, features
from fastserve_kernels.cpu.kernels.pages import in_huge_pages
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

if TYPE_CHECKING:
    from fastserve_kernels.cpu.kernels.kernel import Kernel

Features = Mapping[str, bool]

WIDEST_SINGLE_ROW = 1024
"""oneDNN adds up a wider single row in another order than several rows; rounding hides most of it."""
LEAST_PARALLEL = 1 << 18
"""Products that are worth a second thread: it takes a microsecond to get one."""
RUN_BYTES = 1 << 19
"""Of weights that lie together and go to one thread, at least, if there are enough for all; of a single
token, for several take as long by fewer."""
RUNS_PER_THREAD = 8
"""So that the threads end together."""
MOST_INTEGERS = 65536
"""Columns whose products of eight bits cannot overflow 32."""


def _dequantized(weight: Weight, dtype: torch.dtype) -> Prepared:
    warnings.warn(
        f"this processor lacks some of {', '.join(features.FEATURES)}: quantized and sparse weights are "
        "dequantized as they are loaded, and take as much memory as if they were neither",
        stacklevel=3,
    )
    return prepare_dense(Dense(weight.dequantize()), dtype)


def _supported(given: Features | None) -> bool:
    return features.supported(features.of_host() if given is None else given)


def _prepared(operator: str, arguments: tuple[Tensor | int | None, ...], weight: Weight) -> Prepared:
    in_place = tuple(in_huge_pages(a) if isinstance(a, Tensor) else a for a in arguments)
    return Prepared(operator, in_place, weight.out_features, weight.in_features)


def prepare_dense(weight: Dense, dtype: torch.dtype) -> Prepared:
    """In oneDNN's blocks, which it multiplies by twice as fast as torch by a plain bfloat16 weight, and four
    times by a float32 one; it has none for float16."""
    plain = weight.weight.detach().to(dtype).contiguous()
    if dtype != torch.float16:
        plain = torch.ops.mkldnn._reorder_linear_weight(plain, None)
    return Prepared("linear", (plain,), weight.out_features, weight.in_features)


def prepare_int4(weight: Int4, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    """`given` are a processor's features, in place of this one's."""
    if not _supported(given):
        return _dequantized(weight, dtype)
    zeros = None if weight.zeros is None else arrangement.group_rows(weight.zeros)
    arguments = (
        arrangement.nibbles(unpack_pairs(weight.codes)),
        arrangement.group_rows(weight.scales),
        zeros,
        weight.out_features,
        weight.group_size,
    )
    return _prepared("linear_int4", arguments, weight)


def prepare_nf4(weight: NF4, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    if not _supported(given):
        return _dequantized(weight, dtype)
    arguments = (
        arrangement.nibbles(unpack_pairs(weight.codes)),
        arrangement.group_rows(weight.scales),
        arrangement.nibble_table(weight.codebook, dtype),
        weight.out_features,
        weight.group_size,
    )
    return _prepared("linear_nf4", arguments, weight)


def prepare_int8(weight: Int8, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    """A code of eight bits is a sign and one of seven: v is stored as v, and as -1 - v if it is negative,
    which stand for v + 1/2 in either case. The halves are taken off with the zeros."""
    if not _supported(given):
        return _dequantized(weight, dtype)
    folded = weight.values ^ (weight.values >> 7 & 0x7F)
    arguments = (
        arrangement.codes(folded.view(torch.uint8)),
        arrangement.group_rows(weight.scales),
        None if weight.zeros is None else arrangement.group_rows(weight.zeros),
        weight.out_features,
        weight.group_size,
    )
    return _prepared("linear_int8", arguments, weight)


def prepare_int_rows(weight: IntRows, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    if not _supported(given):
        return _dequantized(weight, dtype)

    def arranged(part: Int4 | Int8) -> tuple[Tensor | int | None, ...]:
        if isinstance(part, Int4):
            return prepare_int4(part, dtype, given).arguments
        return prepare_int8(part, dtype, given).arguments

    return Prepared(weight.operator, weight.arguments_of(arranged), weight.out_features, weight.in_features)


def prepare_fp8(weight: FP8, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    if not _supported(given):
        return _dequantized(weight, dtype)
    arguments = (
        arrangement.codes(weight.values.view(torch.uint8)),
        arrangement.group_rows(weight.scales),
        weight.out_features,
        weight.group_size,
    )
    return _prepared("linear_fp8", arguments, weight)


def prepare_w8a8(weight: W8A8, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    """Dequantized, the activations are not rounded to eight bits either. Raises ValueError if there are so
    many columns that a sum might overflow."""
    if not _supported(given):
        return _dequantized(weight, dtype)
    if weight.in_features > MOST_INTEGERS:
        raise ValueError(
            f"W8A8 on a CPU takes at most {MOST_INTEGERS} columns, not {weight.in_features}: their sum might "
            "overflow 32 bits"
        )
    scales = arrangement.group_rows(weight.scales[:, None])
    arguments = (arrangement.quads(weight.values), scales, weight.out_features)
    return _prepared("linear_w8a8", arguments, weight)


def prepare_bitmap(weight: Bitmap | Sparse24, dtype: torch.dtype) -> Prepared:
    """As a dense weight: to put single weights in their places takes 3 to 4 cycles for each 32, more than a
    CPU's memory takes to bring the zeros too (0.7 to 1.0 times the speed of a dense weight, measured)."""
    return prepare_dense(Dense(weight.dequantize()), dtype)


prepare_sparse24 = prepare_bitmap


def prepare_sparse24_int4(
    weight: Sparse24Int4, dtype: torch.dtype, given: Features | None = None
) -> Prepared:
    """As `Int4`, where what was left out has the code 8, which is 0: 4 bits for 3, but half the
    instructions."""
    unscaled = Sparse24Int4(
        weight.codes, weight.indices, torch.ones_like(weight.scales), weight.group_size
    ).dequantize()
    pairs = pack_pairs(unscaled + 8)
    return prepare_int4(Int4(pairs, weight.scales, None, weight.group_size), dtype, given)


def prepare_block_sparse(weight: BlockSparse, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    """Two block rows of 16 become one of 32, filled up with zeros where they do not have the same columns."""
    if not _supported(given):
        return _dequantized(weight, dtype)
    values, starts, columns = weight.blocks, weight.row_starts.long(), weight.columns.long()
    if values.shape[1] < arrangement.STRIP:
        values, starts, columns = arrangement.taller_blocks(values, starts, columns)
    arguments = (arrangement.blocks(values, starts, dtype), starts, columns, weight.out_features)
    return _prepared("linear_block_sparse", arguments, weight)


def prepare_low_rank(weight: LowRank, dtype: torch.dtype, given: Features | None = None) -> Prepared:
    if not _supported(given):
        return _dequantized(weight, dtype)
    arguments = (arrangement.whole(weight.down, dtype), arrangement.whole(weight.up, dtype))
    return Prepared("linear_low_rank", arguments, weight.out_features, weight.in_features)


@functools.cache
def _kernel(name: str, dtype: torch.dtype, stored: torch.dtype | None = None) -> Kernel:
    """Imports numba, which nobody need wait for who runs no kernel on a CPU, and compiles the kernel."""
    from fastserve_kernels.cpu.kernels import linear

    kernel: Kernel = getattr(linear, name)(dtype, stored)
    return kernel


@functools.cache
def _int4_table(dtype: torch.dtype) -> Tensor:
    return arrangement.nibble_table(torch.arange(16) - 8, dtype)


@functools.cache
def _int8_table() -> Tensor:
    return arrangement.code_table(torch.arange(128) + 0.5)


@functools.cache
def _fp8_table() -> Tensor:
    return arrangement.code_table(torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """The tensor, contiguous; the kernels would read one of another dtype or shape as what it is not."""
    if tensor is None:
        return None
    if tensor.dtype != x.dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {x.dtype} of shape {list(shape)}, not {tensor.dtype} of {list(tensor.shape)}"
        )
    return tensor.contiguous()


def _check_words(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != arrangement.word_dtype(x.dtype):
        raise ValueError(f"{name} were prepared as {tensor.dtype}, which does not go with x of {x.dtype}")


def _run(
    name: str,
    x: Tensor,
    weight: tuple[Tensor | None, ...],
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    numbers: tuple[float, ...] = (),
    stored: torch.dtype | None = None,
) -> Tensor:
    """Runs a kernel: `weight` are its pointers between x and bias, `numbers` what it takes last."""
    tokens, in_features = x.shape
    bias = _check("bias", bias, (out_features,), x)
    residual = _check("residual", residual, (tokens, out_features), x)
    out = x.new_empty(tokens, out_features)
    if tokens == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    in_parallel = tokens * in_features * out_features >= LEAST_PARALLEL
    threads = torch.get_num_threads() if in_parallel else 1
    _kernel(name, x.dtype, stored)(
        in_parallel,
        x.data_ptr(),
        *map(_address, weight),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        tokens,
        out_features,
        in_features,
        x.stride(0),
        _strips_of_a_run(tokens, out_features, weight[0], threads),
        threads,
        bias is not None,
        residual is not None,
        *numbers,
    )
    return out


def _strips_of_a_run(tokens: int, out_features: int, weight: Tensor | None, threads: int) -> int:
    strips = -(-out_features // arrangement.STRIP)
    nbytes = tokens * (0 if weight is None else weight.nbytes)
    return max(1, min(RUN_BYTES * strips // max(1, nbytes), strips // (RUNS_PER_THREAD * threads)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The residual is added after rounding, as transformers does; fused into the product it takes as long."""
    if not weight.is_mkldnn:
        return reference.linear(x, weight, bias, residual)
    if x.shape[0] == 1 and x.shape[1] > WIDEST_SINGLE_ROW:
        y = torch.ops.mkldnn._linear_pointwise(x.expand(2, -1), weight, bias, "none", [], "")[:1]
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y if residual is None else y.add_(residual)


def linear_int4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The table has code - 8, so 8 is taken off the zeros."""
    weight = (codes, _int4_table(x.dtype), scales, zeros)
    numbers = (group_size, 0.0 if zeros is None else -8.0, zeros is not None)
    return _run("linear_nibbles", x, weight, out_features, bias, residual, numbers, scales.dtype)


def linear_nf4(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    _check_words("codebook", codebook, x)
    weight, numbers = (codes, codebook, scales, None), (group_size, 0.0, False)
    return _run("linear_nibbles", x, weight, out_features, bias, residual, numbers, scales.dtype)


def linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    weight, numbers = (values, _int8_table(), scales, zeros), (group_size, 0.5, zeros is not None)
    return _run("linear_codes", x, weight, out_features, bias, residual, numbers, scales.dtype)


def linear_int_rows(
    x: Tensor,
    narrow: Tensor | None,
    narrow_scales: Tensor | None,
    narrow_zeros: Tensor | None,
    wide: Tensor | None,
    wide_scales: Tensor | None,
    wide_zeros: Tensor | None,
    rows: Tensor,
    out_features: int,
    narrow_rows: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    of_narrow = (narrow, _int4_table(x.dtype), narrow_scales, narrow_zeros)
    weight = (*of_narrow, wide, _int8_table(), wide_scales, wide_zeros, rows)
    has_zeros = narrow_zeros is not None or wide_zeros is not None
    numbers = (group_size, narrow_rows, -8.0 if has_zeros else 0.0, 0.5, has_zeros)
    scales = narrow_scales if wide_scales is None else wide_scales
    stored = None if scales is None else scales.dtype
    return _run("linear_rows", x, weight, out_features, bias, residual, numbers, stored)


def linear_fp8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    weight, numbers = (values, _fp8_table(), scales, None), (group_size, 0.0, False)
    return _run("linear_codes", x, weight, out_features, bias, residual, numbers, scales.dtype)


def linear_w8a8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return _run("linear_quads", x, (values, scales), out_features, bias, residual)


def linear_block_sparse(
    x: Tensor,
    blocks: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    _check_words("blocks", blocks, x)
    weight, numbers = (blocks, row_starts, columns), tuple(blocks.shape[1:])
    return _run("linear_blocks", x, weight, out_features, bias, residual, numbers)


@functools.cache
def _all_blocks(out_features: int, block_columns: int) -> tuple[Tensor, Tensor]:
    """row_starts and columns of a matrix whose blocks are all there."""
    strips = -(-out_features // arrangement.STRIP)
    return torch.arange(strips + 1) * block_columns, torch.arange(block_columns).repeat(strips)


def _linear_whole(x: Tensor, matrix: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    _check_words("down and up", matrix, x)
    out_features, columns = matrix.shape
    weight = (matrix, *_all_blocks(out_features, columns // arrangement.BLOCK))
    numbers = (arrangement.STRIP, arrangement.BLOCK)
    return _run("linear_blocks", x, weight, out_features, bias, residual, numbers)


def linear_low_rank(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The product with `down` is rounded to x's dtype."""
    return _linear_whole(_linear_whole(x, down, None, None), up, bias, residual)
