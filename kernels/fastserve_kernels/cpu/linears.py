"""The linears on a CPU: y = x W^T for weights as `linear_preparation` packs them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastserve_kernels import reference
from fastserve_kernels.cpu.kernels import packing
from fastserve_kernels.formats.prepared import (
    BlockSparseArguments,
    DenseArguments,
    FP8Arguments,
    IntArguments,
    IntRowsArguments,
    LowRankArguments,
    NF4Arguments,
    W8A8Arguments,
)

if TYPE_CHECKING:
    from fastserve_kernels.cpu.kernels.kernel import Kernel

WIDEST_SINGLE_ROW = 1024
"""oneDNN adds up a wider single row in another order than several rows; rounding hides most of it."""
MIN_PARALLEL = 1 << 18
"""Products that are worth a second thread: it takes a microsecond to get one."""

KernelFor = Callable[[torch.dtype, "torch.dtype | None"], "Kernel"]
"""Compiles a kernel for the dtype of the activations and that of the scales, once. Each of these imports its
kernel when it is first called: numba takes half a second, which nobody need wait for who runs no kernel on a
CPU."""


@functools.cache
def _quantized_kernel(packed: str, dtype: torch.dtype, stored: torch.dtype | None) -> Kernel:
    from fastserve_kernels.cpu.kernels.linear import linear_quantized

    return linear_quantized(dtype, stored, packed)


@functools.cache
def _integer_kernel(packed: str, dtype: torch.dtype, stored: torch.dtype | None) -> Kernel:
    from fastserve_kernels.cpu.kernels.integer_linear import linear_integers

    return linear_integers(dtype, stored, packed)


@functools.cache
def _rows_kernel(dtype: torch.dtype, stored: torch.dtype | None) -> Kernel:
    from fastserve_kernels.cpu.kernels.linear import linear_rows

    return linear_rows(dtype, stored)


@functools.cache
def _blocks_kernel(dtype: torch.dtype, stored: torch.dtype | None) -> Kernel:
    from fastserve_kernels.cpu.kernels.linear import linear_blocks

    return linear_blocks(dtype, stored)


@functools.cache
def _quads_kernel(dtype: torch.dtype, stored: torch.dtype | None) -> Kernel:
    from fastserve_kernels.cpu.kernels.integer_linear import linear_quads

    return linear_quads(dtype, stored)


_NIBBLES, _CODES = (functools.partial(_quantized_kernel, packed) for packed in ("Nibbles", "Codes"))
_INTEGER_NIBBLES, _INTEGER_QUADS = (
    functools.partial(_integer_kernel, packed) for packed in ("Nibbles", "Quads")
)


@functools.cache
def _int4_table(dtype: torch.dtype) -> Tensor:
    return packing.nibble_table(torch.arange(16) - 8, dtype)


@functools.cache
def _int8_table() -> Tensor:
    return packing.code_table(torch.arange(128) + 0.5)


@functools.cache
def _fp8_table() -> Tensor:
    return packing.code_table(torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """The tensor, contiguous; the kernels would read one of another dtype or shape as what it is not."""
    if tensor.dtype != x.dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {x.dtype} of shape {list(shape)}, not {tensor.dtype} of {list(tensor.shape)}"
        )
    return tensor.contiguous()


def _check_words(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != packing.word_dtype(x.dtype):
        raise ValueError(f"{name} were prepared as {tensor.dtype}, which does not go with x of {x.dtype}")


def _run(
    kernel_for: KernelFor,
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
    if bias is not None:
        bias = _check("bias", bias, (out_features,), x)
    if residual is not None:
        residual = _check("residual", residual, (tokens, out_features), x)
    out = x.new_empty(tokens, out_features)
    if tokens == 0:
        return out
    row_stride, column_stride = x.stride()
    if column_stride != 1:
        x, row_stride = x.contiguous(), in_features
    kernel_for(x.dtype, stored)(
        tokens * in_features * out_features >= MIN_PARALLEL,
        x.data_ptr(),
        *[0 if tensor is None else tensor.data_ptr() for tensor in (*weight, bias, residual)],
        out.data_ptr(),
        tokens,
        out_features,
        in_features,
        row_stride,
        0 if weight[0] is None else weight[0].nbytes,
        torch.get_num_threads(),
        bias is not None,
        residual is not None,
        *numbers,
    )
    return out


def linear(x: Tensor, weight: DenseArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The residual is added after rounding, as transformers does; fused into the product it takes as long."""
    (matrix,) = weight
    if not matrix.is_mkldnn:
        return reference.linear(x, weight, bias, residual)
    if matrix.dtype != x.dtype:  # of a processor without bfloat16
        wide = None if bias is None else bias.to(matrix.dtype)
        y = linear(x.to(matrix.dtype), weight, wide, None).to(x.dtype)
        return y if residual is None else y.add_(residual)
    tokens, in_features = x.shape
    if tokens == 1 and in_features > WIDEST_SINGLE_ROW:
        y = torch.ops.mkldnn._linear_pointwise(x.expand(2, -1), matrix, bias, "none", [], "")[:1]
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return y if residual is None else y.add_(residual)


def linear_int4(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The table has code - 8, so 8 is taken off the zeros."""
    codes, scales, zeros, out_features, group_size = weight
    operands = (codes, _int4_table(x.dtype), scales, zeros)
    numbers = (group_size, 0.0 if zeros is None else -8.0, zeros is not None)
    return _run(_NIBBLES, x, operands, out_features, bias, residual, numbers, scales.dtype)


def linear_nf4(x: Tensor, weight: NF4Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_nf4` on a CPU."""
    codes, scales, codebook, out_features, group_size = weight
    _check_words("codebook", codebook, x)
    operands, numbers = (codes, codebook, scales, None), (group_size, 0.0, False)
    return _run(_NIBBLES, x, operands, out_features, bias, residual, numbers, scales.dtype)


def linear_int8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_int8` on a CPU."""
    values, scales, zeros, out_features, group_size = weight
    operands, numbers = (values, _int8_table(), scales, zeros), (group_size, 0.5, zeros is not None)
    return _run(_CODES, x, operands, out_features, bias, residual, numbers, scales.dtype)


def linear_int4_a8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_int4_a8` on a CPU: exact sums of products of integers, in groups."""
    codes, scales, zeros, out_features, group_size = weight
    numbers = (group_size, 8.0 if zeros is None else 0.0, zeros is not None)
    return _run(
        _INTEGER_NIBBLES,
        x,
        (codes, scales, zeros),
        out_features,
        bias,
        residual,
        numbers,
        scales.dtype,
    )


def linear_int8_a8(x: Tensor, weight: IntArguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_int8_a8` on a CPU."""
    values, scales, zeros, out_features, group_size = weight
    numbers = (group_size, float(packing.quad_excess()), zeros is not None)
    return _run(
        _INTEGER_QUADS, x, (values, scales, zeros), out_features, bias, residual, numbers, scales.dtype
    )


def linear_int_rows(
    x: Tensor, weight: IntRowsArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_int_rows` on a CPU: panels of 4 bits and panels of 8, in one kernel."""
    narrow, narrow_scales, narrow_zeros, wide, wide_scales, wide_zeros, rows, *sizes = weight
    out_features, narrow_rows, group_size = sizes
    of_narrow = (narrow, _int4_table(x.dtype), narrow_scales, narrow_zeros)
    operands = (*of_narrow, wide, _int8_table(), wide_scales, wide_zeros, rows)
    has_zeros = narrow_zeros is not None or wide_zeros is not None
    numbers = (group_size, narrow_rows, -8.0 if has_zeros else 0.0, 0.5, has_zeros)
    scales = narrow_scales if wide_scales is None else wide_scales
    stored = None if scales is None else scales.dtype
    return _run(_rows_kernel, x, operands, out_features, bias, residual, numbers, stored)


def linear_fp8(x: Tensor, weight: FP8Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_fp8` on a CPU."""
    values, scales, out_features, group_size = weight
    operands, numbers = (values, _fp8_table(), scales, None), (group_size, 0.0, False)
    return _run(_CODES, x, operands, out_features, bias, residual, numbers, scales.dtype)


def linear_w8a8(x: Tensor, weight: W8A8Arguments, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`reference.linear_w8a8` on a CPU: exact sums of int8 products in 32 bits."""
    values, scales, out_features = weight
    return _run(_quads_kernel, x, (values, scales), out_features, bias, residual)


def linear_block_sparse(
    x: Tensor, weight: BlockSparseArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`reference.linear_block_sparse` on a CPU."""
    blocks, row_starts, columns, out_features = weight
    _check_words("blocks", blocks, x)
    operands, numbers = (blocks, row_starts, columns), tuple(blocks.shape[1:])
    return _run(_blocks_kernel, x, operands, out_features, bias, residual, numbers)


@functools.cache
def _all_blocks(out_features: int, block_columns: int) -> tuple[Tensor, Tensor]:
    """row_starts and columns of a matrix whose blocks are all there."""
    panels = -(-out_features // packing.PANEL_ROWS)
    return torch.arange(panels + 1) * block_columns, torch.arange(block_columns).repeat(panels)


def _linear_whole(x: Tensor, matrix: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    _check_words("down and up", matrix, x)
    out_features, columns = matrix.shape
    weight = (matrix, *_all_blocks(out_features, columns // packing.BLOCK))
    numbers = (packing.PANEL_ROWS, packing.BLOCK)
    return _run(_blocks_kernel, x, weight, out_features, bias, residual, numbers)


def linear_low_rank(
    x: Tensor, weight: LowRankArguments, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The product with `down` is rounded to x's dtype."""
    down, up = weight
    return _linear_whole(_linear_whole(x, down, None, None), up, bias, residual)
