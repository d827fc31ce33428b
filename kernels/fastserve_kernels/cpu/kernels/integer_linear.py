"""Linears of integers: y = x W^T where activations of 8 bits meet codes of 4 or 8 bits.

As `linear`, but a thread rounds the activations that it puts into words: each block of columns of a token to
multiples of its own scale (`linear_integers`), or a whole token (`linear_quads`). The sum over a block is
int32, and exact; it is scaled by both scales and added to the total of its row and token.

Bound: few tokens by the bytes of the weight, many by the instructions: of a block of 32 columns 16 multiply,
of 22. On two cores of an EPYC 9005, 256 tokens by 4096 x 4096 run at 655 GMAC/s with blocks of 32, and at
974 with a scale a token; the products of bfloat16 at 440.
"""

from __future__ import annotations

from numba import njit

from fastserve_kernels.cpu.kernels import packing
from fastserve_kernels.cpu.kernels.activations import Words, as_quads, quantize, quantize_groups
from fastserve_kernels.cpu.kernels.byte_products import HAS_VNNI
from fastserve_kernels.cpu.kernels.kernel import (
    Elements,
    Floats,
    Packed,
    Quads,
    Stored,
    WorkCounter,
    kernel,
)
from fastserve_kernels.cpu.kernels.linear import MAX_UNPACK_TOKENS, QuantizedWeight, load_scales
from fastserve_kernels.cpu.kernels.panels import (
    PANEL_ROWS,
    SLICE,
    LinearShape,
    Outputs,
    WorkItem,
    Workspace,
    allocate_workspace,
    blocks_of,
    free_workspace,
    init_acc_from_zeros,
    next_work_item,
    shape_for,
    store_panel,
    store_vector,
    zero_acc,
)
from fastserve_kernels.cpu.kernels.products import (
    MAX_TOKENS,
    multiply_grouped_integers,
    multiply_integers,
    span_for,
    width_for,
)
from fastserve_kernels.cpu.kernels.vectors import LANES, as_bytes, as_float32, at, load, splat
from fastserve_kernels.cpu.kernels.vnni import (
    VECTOR_ROWS,
    columns_of,
    int32_to_float32_less,
    reduce_add_int32,
    unpack,
)

QUAD_EXCESS = packing.quad_excess()
UNPACKS_ONCE = HAS_VNNI
"""Whether codes of 4 bits become bytes for many tokens: without VNNI these take more instructions."""


@njit(error_model="numpy")
def _multiply_integer_slice(
    shape: LinearShape,
    workspace: Workspace,
    weights: Words,
    first: int,
    columns: int,
    tokens: int,
) -> None:
    """`_multiply_slice` of activations that are quantized by blocks."""
    words = as_quads(workspace.words)
    scale_stride = PANEL_ROWS if shape.groups > 1 else 0
    size = shape.block // columns_of(weights)
    scales = at(workspace.scales, first // shape.block * scale_stride)
    for t in range(0, tokens, MAX_TOKENS):
        count = min(MAX_TOKENS, tokens - t)
        width, span = width_for(count), span_for(count, columns_of(weights))
        x = at(words, t * (shape.padded // 4))
        x_scales = at(workspace.x_scales, t * blocks_of(shape) + first // shape.block * MAX_TOKENS)
        acc = at(workspace.acc, t * PANEL_ROWS)
        done = 0
        while done < columns:
            blocks = span if done + span * shape.block <= columns else 1
            multiply_grouped_integers(
                at(weights, done // columns_of(weights) * PANEL_ROWS),
                at(x, (first + done) // 4 * width),
                count,
                blocks,
                min(size, (columns - done) // columns_of(weights)),
                acc,
                at(scales, done // shape.block * scale_stride),
                scale_stride,
                at(x_scales, done // shape.block * MAX_TOKENS),
            )
            done += blocks * shape.block


@njit(error_model="numpy")
def _quantize_item(
    shape: LinearShape, workspace: Workspace, x: Elements, weights: Words, item: WorkItem
) -> None:
    """Puts a work item's tokens into the workspace as quads."""
    sum_stride = MAX_TOKENS if shape.groups > 1 else 0
    for t in range(0, item.tokens, MAX_TOKENS):
        quantize_groups(
            x,
            (item.token + t) * shape.x_stride,
            shape.x_stride,
            shape.in_features,
            shape.padded,
            shape.block,
            weights,
            min(MAX_TOKENS, item.tokens - t),
            at(as_quads(workspace.words), t * (shape.padded // 4)),
            at(workspace.x_scales, t * blocks_of(shape)),
            at(workspace.sums, t * shape.groups),
            sum_stride,
        )


@kernel
def linear_integers(
    counter: WorkCounter,
    x: Elements,
    codes: Packed,
    scales: Stored,
    zeros: Stored,
    bias: Elements,
    residual: Elements,
    out: Elements,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    weight_bytes: int,
    threads: int,
    has_bias: int,
    has_residual: int,
    group: int,
    shift: float,
    has_zeros: int,
) -> None:
    """`linear_quantized` of activations of 8 bits: codes [panels, K / 8, PANEL_ROWS] words of nibbles, or
    [panels, K / 4, PANEL_ROWS] quads."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 32, group, weight_bytes, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    weight = QuantizedWeight(codes, as_bytes(codes), scales, zeros, shift, has_zeros)
    workspace = allocate_workspace(shape, x)
    expanded = as_quads(workspace.expanded)
    packed = -1
    item = next_work_item(counter, shape)
    while item.tokens > 0:
        if item.token != packed:
            _quantize_item(shape, workspace, x, codes, item)
            packed = item.token
        for panel in range(item.first, item.end):
            load_scales(shape, workspace, weight, panel)
            init_acc_from_zeros(shape, workspace, item.tokens)
            of_panel = at(codes, panel * (shape.padded // columns_of(codes)) * PANEL_ROWS)
            size = SLICE if item.tokens > MAX_TOKENS else shape.padded
            for first in range(0, shape.padded, size):
                columns = min(size, shape.padded - first)
                of_slice = at(of_panel, first // columns_of(codes) * PANEL_ROWS)
                if UNPACKS_ONCE and item.tokens > MAX_UNPACK_TOKENS and columns_of(codes) > 4:
                    unpack(of_slice, weight.table, columns // columns_of(codes), expanded)
                    _multiply_integer_slice(shape, workspace, expanded, first, columns, item.tokens)
                else:
                    _multiply_integer_slice(shape, workspace, of_slice, first, columns, item.tokens)
            store_panel(shape, workspace, outputs, item, panel)
        item = next_work_item(counter, shape)
    free_workspace(workspace)


@kernel
def linear_quads(
    counter: WorkCounter,
    x: Elements,
    values: Quads,
    scales: Floats,
    bias: Elements,
    residual: Elements,
    out: Elements,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    weight_bytes: int,
    threads: int,
    has_bias: int,
    has_residual: int,
) -> None:
    """values [panels, K / 4, PANEL_ROWS] quads; scales [panels, PANEL_ROWS]."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 64, in_features, weight_bytes, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    workspace = allocate_workspace(shape, x)
    words = as_quads(workspace.words)
    x_scales = as_float32(workspace.expanded)
    packed = -1
    item = next_work_item(counter, shape)
    while item.tokens > 0:
        if item.token != packed:
            for t in range(0, item.tokens, MAX_TOKENS):
                start, count = (item.token + t) * x_stride, min(MAX_TOKENS, item.tokens - t)
                to, sums = at(words, t * (shape.padded // 4)), at(workspace.sums, t * VECTOR_ROWS)
                quantize(x, start, x_stride, in_features, shape.padded, count, to, at(x_scales, t), sums)
            packed = item.token
        for panel in range(item.first, item.end):
            zero_acc(workspace, item.tokens)
            for first in range(0, shape.padded, 2 * SLICE):
                count = min(2 * SLICE, shape.padded - first) // 4
                weights = at(values, (panel * shape.padded + first) // 4 * PANEL_ROWS)
                for t in range(0, item.tokens, MAX_TOKENS):
                    group = min(MAX_TOKENS, item.tokens - t)
                    of_x = at(words, t * (shape.padded // 4) + first // 4 * width_for(group))
                    multiply_integers(weights, of_x, group, count, at(workspace.acc, t * PANEL_ROWS))
            _write_integers(shape, workspace, outputs, item, panel, x_scales, scales)
        item = next_work_item(counter, shape)
    free_workspace(workspace)


@njit(error_model="numpy")
def _write_integers(
    shape: LinearShape,
    workspace: Workspace,
    outputs: Outputs,
    item: WorkItem,
    panel: int,
    x_scales: Floats,
    scales: Floats,
) -> None:
    row = panel * PANEL_ROWS
    for t in range(item.tokens):
        place = (item.token + t) * shape.out_features + row
        excess = QUAD_EXCESS * reduce_add_int32(workspace.sums, t * VECTOR_ROWS)
        for i in range(0, PANEL_ROWS, LANES):
            y = int32_to_float32_less(workspace.acc, t * PANEL_ROWS + i, excess) * splat(x_scales[t], LANES)
            store_vector(shape, outputs, y * load(scales, row + i, LANES), place + i, row + i)
