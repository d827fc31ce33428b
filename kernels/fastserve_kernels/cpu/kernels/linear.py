"""Linears: y = x W^T for weights as `linear_preparation` packs them, from one token to a whole prompt.

A thread takes a few panels of rows for up to TOKENS tokens (`panels`), whose activations it puts into words
for itself (`activations`). SLICE columns of a panel at a time, whose weights then lie in the nearest cache,
meet the tokens in groups of eight (`products`). Codes are unpacked in registers, next to each group again,
which costs as much as writing them down and reading them until there are MAX_UNPACK_TOKENS tokens.

The sum over a *block* of columns, a group of the weight or BLOCK of them, begins at 0, is scaled and then
added to the total of its row and token. So a token's result is the same to the last bit whatever else is
computed with it.

Bound: few tokens by the bytes of the weight, many by the multiplications: two of 32 products each per cycle.
On two cores of an EPYC 9005: of the bandwidth read in the same minute, 43 and 71 GB/s, one token takes int8
weights of 8192 x 2048 and 2048 x 8192 at 99 and 88 % and int4 weights at 83 and 69 %; a prompt of 256 runs
at 0.97 to 1.00 times the speed of oneDNN's bfloat16, in groups of 32 with zeros at 0.9.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import float32, njit

from fastserve_kernels.cpu.kernels.activations import Words
from fastserve_kernels.cpu.kernels.kernel import (
    Bytes,
    Codes,
    Elements,
    Integers,
    Nibbles,
    Packed,
    RowWords,
    Stored,
    WorkCounter,
    kernel,
)
from fastserve_kernels.cpu.kernels.panels import (
    PANEL_ROWS,
    SLICE,
    LinearShape,
    Outputs,
    Workspace,
    allocate_workspace,
    free_workspace,
    init_acc_from_zeros,
    scatter_panel,
    shape_for,
    store_panel,
    take_work_item,
    zero_acc,
)
from fastserve_kernels.cpu.kernels.products import (
    MAX_TOKENS,
    multiply,
    span_for,
    width_for,
)
from fastserve_kernels.cpu.kernels.vectors import LANES, as_float32, at, load, splat, store
from fastserve_kernels.cpu.kernels.vnni import (
    columns_of,
    unpack,
)

MAX_UNPACK_TOKENS = 32
"""Tokens, at most, for which codes are unpacked next to each group; for more they are unpacked once."""


@njit(error_model="numpy")
def _multiply_slice(
    shape: LinearShape,
    workspace: Workspace,
    weights: Words,
    table: Bytes,
    first: int,
    columns: int,
    tokens: int,
) -> None:
    """Adds to the accumulators of a panel what `columns` columns give, whose weights are there from column
    `first`, the beginning of a block."""
    scale_stride = PANEL_ROWS if shape.groups > 1 else 0
    size = shape.block // columns_of(weights)
    scales = at(workspace.scales, first // shape.block * scale_stride)
    for t in range(0, tokens, MAX_TOKENS):
        count = min(MAX_TOKENS, tokens - t)
        width, span = width_for(count), span_for(count, columns_of(weights))
        x = at(workspace.words, t * (shape.padded // columns_of(workspace.words)))
        acc = at(workspace.acc, t * PANEL_ROWS)
        done = 0
        while done < columns:
            blocks = span if done + span * shape.block <= columns else 1
            multiply(
                at(weights, done // columns_of(weights) * PANEL_ROWS),
                table,
                at(x, (first + done) // columns_of(workspace.words) * width),
                count,
                blocks,
                min(size, (columns - done) // columns_of(weights)),
                acc,
                at(scales, done // shape.block * scale_stride),
                scale_stride,
            )
            done += blocks * shape.block


class QuantizedWeight(NamedTuple):
    """Rows of weights (table[code] - zero - shift) * scale."""

    codes: Words
    """[panels, padded, PANEL_ROWS]."""
    table: Bytes
    scales: Stored
    """[panels, groups, PANEL_ROWS]."""
    zeros: Stored
    """[panels, groups, PANEL_ROWS], if there are any."""
    shift: float
    has_zeros: int


@njit(error_model="numpy")
def _is_corrected(weight: QuantizedWeight) -> bool:
    """Whether sums of the activations are needed, for what is taken off the codes."""
    return weight.has_zeros != 0 or weight.shift != 0


@njit(error_model="numpy")
def load_scales(shape: LinearShape, workspace: Workspace, weight: QuantizedWeight, panel: int) -> None:
    """The scales of a panel, and what its zeros take off, into the workspace."""
    start = panel * shape.groups * PANEL_ROWS
    for i in range(0, shape.groups * PANEL_ROWS, LANES):
        scale, zero = load(weight.scales, start + i, LANES), splat(float32(weight.shift), LANES)
        store(workspace.scales, i, scale)
        if weight.has_zeros:
            zero = zero + load(weight.zeros, start + i, LANES)
        store(workspace.zeros, i, splat(float32(0), LANES) - zero * scale)


@njit(error_model="numpy")
def _multiply_panel(
    shape: LinearShape, workspace: Workspace, weight: QuantizedWeight, panel: int, tokens: int
) -> None:
    """Computes the accumulators of a panel."""
    load_scales(shape, workspace, weight, panel)
    if _is_corrected(weight):
        init_acc_from_zeros(shape, workspace, tokens)
    else:
        zero_acc(workspace, tokens)
    codes = at(weight.codes, panel * (shape.padded // columns_of(weight.codes)) * PANEL_ROWS)
    # One group of tokens needs no slices, and has the more blocks to multiply together.
    size = SLICE if tokens > MAX_TOKENS else shape.padded
    for first in range(0, shape.padded, size):
        columns = min(size, shape.padded - first)
        of_slice = at(codes, first // columns_of(codes) * PANEL_ROWS)
        if tokens > MAX_UNPACK_TOKENS:
            unpack(of_slice, weight.table, columns // columns_of(codes), workspace.expanded)
            _multiply_slice(shape, workspace, workspace.expanded, weight.table, first, columns, tokens)
        else:
            _multiply_slice(shape, workspace, of_slice, weight.table, first, columns, tokens)


@kernel
def linear_quantized(
    counter: WorkCounter,
    x: Elements,
    codes: Packed,
    table: Bytes,
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
    """codes [panels, K / 8, PANEL_ROWS] words of nibbles, or [panels, K / 4, PANEL_ROWS] words of codes of 8
    bits; scales and zeros [panels, groups, PANEL_ROWS]; see `QuantizedWeight`."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 32, group, weight_bytes, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    weight = QuantizedWeight(codes, table, scales, zeros, shift, has_zeros)
    workspace = allocate_workspace(shape, x)
    item = take_work_item(counter, shape, workspace, x, -1, _is_corrected(weight))
    while item.tokens > 0:
        for panel in range(item.first, item.end):
            _multiply_panel(shape, workspace, weight, panel, item.tokens)
            store_panel(shape, workspace, outputs, item, panel)
        item = take_work_item(counter, shape, workspace, x, item.token, _is_corrected(weight))
    free_workspace(workspace)


@kernel
def linear_rows(
    counter: WorkCounter,
    x: Elements,
    nibbles: Nibbles,
    nibble_table: Bytes,
    nibble_scales: Stored,
    nibble_zeros: Stored,
    codes: Codes,
    code_table: Bytes,
    code_scales: Stored,
    code_zeros: Stored,
    rows: Integers,
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
    nibble_rows: int,
    nibble_shift: float,
    code_shift: float,
    has_zeros: int,
) -> None:
    """The first `nibble_rows` of the weight are nibbles, in panels of their own, the others
    codes of 8 bits. rows [out_features] says which row of the output each is."""
    panels = (nibble_rows + PANEL_ROWS - 1) // PANEL_ROWS
    code_panels = (out_features - nibble_rows + PANEL_ROWS - 1) // PANEL_ROWS
    shape = shape_for(
        tokens, (panels + code_panels) * PANEL_ROWS, in_features, x_stride, 32, group, weight_bytes, threads
    )
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    narrow = QuantizedWeight(nibbles, nibble_table, nibble_scales, nibble_zeros, nibble_shift, has_zeros)
    wide = QuantizedWeight(codes, code_table, code_scales, code_zeros, code_shift, has_zeros)
    workspace = allocate_workspace(shape, x)
    item = take_work_item(counter, shape, workspace, x, -1, True)
    while item.tokens > 0:
        for panel in range(item.first, item.end):
            if panel < panels:
                _multiply_panel(shape, workspace, narrow, panel, item.tokens)
                first, end = panel * PANEL_ROWS, nibble_rows
            else:
                _multiply_panel(shape, workspace, wide, panel - panels, item.tokens)
                first, end = nibble_rows + (panel - panels) * PANEL_ROWS, out_features
            scatter_panel(
                workspace, outputs, item, at(rows, first), min(PANEL_ROWS, end - first), out_features
            )
        item = take_work_item(counter, shape, workspace, x, item.token, True)
    free_workspace(workspace)


@njit(error_model="numpy")
def _fill(workspace: Workspace) -> None:
    """The scales of weights that have none."""
    for i in range(0, PANEL_ROWS, LANES):
        store(workspace.scales, i, splat(float32(1), LANES))


@kernel
def linear_blocks(
    counter: WorkCounter,
    x: Elements,
    blocks: RowWords,
    row_starts: Integers,
    columns: Integers,
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
    block_rows: int,
    block_columns: int,
) -> None:
    """blocks, those of a block row one after another for its first panel, then for its next one: of each
    [block_columns, PANEL_ROWS] in words. row_starts [block rows + 1] counts blocks; columns are block
    columns."""
    multiple = max(32, block_columns)
    shape = shape_for(
        tokens, out_features, in_features, x_stride, multiple, in_features, weight_bytes, threads
    )
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    workspace = allocate_workspace(shape, x)
    _fill(workspace)
    panel_size = block_columns // columns_of(blocks) * PANEL_ROWS
    panels = block_rows // PANEL_ROWS
    item = take_work_item(counter, shape, workspace, x, -1, False)
    while item.tokens > 0:
        for panel in range(item.first, item.end):
            zero_acc(workspace, item.tokens)
            first, end = row_starts[panel // panels], row_starts[panel // panels + 1]
            start = (first * panels + panel % panels * (end - first)) * panel_size
            for i in range(first, end):
                weights = at(blocks, start + (i - first) * panel_size)
                column = columns[i] * block_columns
                _multiply_block(shape, workspace, weights, column, block_columns, item.tokens)
            store_panel(shape, workspace, outputs, item, panel)
        item = take_work_item(counter, shape, workspace, x, item.token, False)
    free_workspace(workspace)


@njit(error_model="numpy")
def _multiply_block(
    shape: LinearShape, workspace: Workspace, weights: Words, column: int, columns: int, tokens: int
) -> None:
    """Adds to the accumulators of a panel what one block of it gives, which begins at any column."""
    count = columns // columns_of(weights)
    unused = as_float32(weights)
    for t in range(0, tokens, MAX_TOKENS):
        group = min(MAX_TOKENS, tokens - t)
        x = at(workspace.words, t * (shape.padded // columns_of(workspace.words)))
        x = at(x, column // columns_of(workspace.words) * width_for(group))
        multiply(weights, unused, x, group, 1, count, at(workspace.acc, t * PANEL_ROWS), workspace.scales, 0)
