"""Linears: y = x W^T for weights as `linear_preparation` arranges them, from one token to a whole prompt.

A thread takes a few strips of rows for up to TOKENS tokens (`strips`), whose activations it puts into words
for itself (`activations`). SLICE columns of a strip at a time, whose weights then lie in the nearest cache,
meet the tokens in groups of eight (`products`). Codes are unpacked in registers, next to each group again,
which costs as much as writing them down and reading them until there are UNPACKED_AGAIN tokens.

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

from fastserve_kernels.cpu.kernels.activations import Words, as_float32, as_quads, quantize
from fastserve_kernels.cpu.kernels.kernel import (
    Bytes,
    Codes,
    Elements,
    Floats,
    Integers,
    Nibbles,
    Quads,
    RowWords,
    Stored,
    Work,
    kernel,
)
from fastserve_kernels.cpu.kernels.products import (
    MOST_TOKENS,
    multiply,
    multiply_integers,
    span_for,
    width_for,
)
from fastserve_kernels.cpu.kernels.strips import (
    ROWS,
    SLICE,
    Memory,
    Outputs,
    Piece,
    Shape,
    clear,
    free_memory,
    memory_for,
    next_piece,
    scatter,
    shape_for,
    subtract_zeros,
    take,
    write,
    write_vector,
)
from fastserve_kernels.cpu.kernels.vectors import LANES, at, load, splat, store
from fastserve_kernels.cpu.kernels.words import ROWS as PANEL
from fastserve_kernels.cpu.kernels.words import (
    columns_of,
    integers_above,
    sum_integers,
    unpack,
)

UNPACKED_AGAIN = 32
"""Tokens, at most, for which codes are unpacked next to each group; for more they are unpacked once."""


@njit(error_model="numpy")
def _multiply_slice(
    shape: Shape, memory: Memory, weights: Words, table: Bytes, first: int, columns: int, tokens: int
) -> None:
    """Adds to the totals of a strip what `columns` columns give, whose weights are there from column `first`,
    the beginning of a block."""
    step = ROWS if shape.groups > 1 else 0
    size = shape.block // columns_of(weights)
    scales = at(memory.scales, first // shape.block * step)
    for t in range(0, tokens, MOST_TOKENS):
        count = min(MOST_TOKENS, tokens - t)
        width, span = width_for(count), span_for(count, columns_of(weights))
        x = at(memory.words, t * (shape.padded // columns_of(memory.words)))
        totals = at(memory.totals, t * ROWS)
        done = 0
        while done < columns:
            blocks = span if done + span * shape.block <= columns else 1
            multiply(
                at(weights, done // columns_of(weights) * ROWS),
                table,
                at(x, (first + done) // columns_of(memory.words) * width),
                count,
                blocks,
                min(size, (columns - done) // columns_of(weights)),
                totals,
                at(scales, done // shape.block * step),
                step,
            )
            done += blocks * shape.block


class Coded(NamedTuple):
    """Rows of weights (table[code] - zero - shift) * scale."""

    codes: Words
    """[strips, padded, ROWS]."""
    table: Bytes
    scales: Stored
    """[strips, groups, ROWS]."""
    zeros: Stored
    """[strips, groups, ROWS], if there are any."""
    shift: float
    has_zeros: int


@njit(error_model="numpy")
def _is_corrected(weight: Coded) -> bool:
    """Whether sums of the activations are needed, for what is taken off the codes."""
    return weight.has_zeros != 0 or weight.shift != 0


@njit(error_model="numpy")
def _load_scales(shape: Shape, memory: Memory, weight: Coded, strip: int) -> None:
    start = strip * shape.groups * ROWS
    for i in range(0, shape.groups * ROWS, LANES):
        scale, zero = load(weight.scales, start + i, LANES), splat(float32(weight.shift), LANES)
        store(memory.scales, i, scale)
        if weight.has_zeros:
            zero = zero + load(weight.zeros, start + i, LANES)
        store(memory.zeros, i, splat(float32(0), LANES) - zero * scale)


@njit(error_model="numpy")
def _multiply_strip(shape: Shape, memory: Memory, weight: Coded, strip: int, tokens: int) -> None:
    """Makes the totals of a strip."""
    _load_scales(shape, memory, weight, strip)
    if _is_corrected(weight):
        subtract_zeros(shape, memory, tokens)
    else:
        clear(memory, tokens)
    codes = at(weight.codes, strip * (shape.padded // columns_of(weight.codes)) * ROWS)
    # One group of tokens needs no slices, and has the more blocks to multiply together.
    size = SLICE if tokens > MOST_TOKENS else shape.padded
    for first in range(0, shape.padded, size):
        columns = min(size, shape.padded - first)
        of_slice = at(codes, first // columns_of(codes) * ROWS)
        if tokens > UNPACKED_AGAIN:
            unpack(of_slice, weight.table, columns // columns_of(codes), memory.expanded)
            _multiply_slice(shape, memory, memory.expanded, weight.table, first, columns, tokens)
        else:
            _multiply_slice(shape, memory, of_slice, weight.table, first, columns, tokens)


@njit(error_model="numpy")
def _multiply_codes(work: Work, shape: Shape, outputs: Outputs, x: Elements, weight: Coded) -> None:
    """Of `linear_nibbles` and `linear_codes`."""
    memory = memory_for(shape, x)
    piece = take(work, shape, memory, x, -1, _is_corrected(weight))
    while piece.tokens > 0:
        for strip in range(piece.first, piece.end):
            _multiply_strip(shape, memory, weight, strip, piece.tokens)
            write(shape, memory, outputs, piece, strip)
        piece = take(work, shape, memory, x, piece.token, _is_corrected(weight))
    free_memory(memory)


@kernel
def linear_nibbles(
    work: Work,
    x: Elements,
    codes: Nibbles,
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
    run: int,
    threads: int,
    has_bias: int,
    has_residual: int,
    group: int,
    shift: float,
    has_zeros: int,
) -> None:
    """codes [strips, K / 8, ROWS] words; scales and zeros [strips, groups, ROWS]; see `Coded`."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 32, group, run, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    _multiply_codes(work, shape, outputs, x, Coded(codes, table, scales, zeros, shift, has_zeros))


@kernel
def linear_codes(
    work: Work,
    x: Elements,
    codes: Codes,
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
    run: int,
    threads: int,
    has_bias: int,
    has_residual: int,
    group: int,
    shift: float,
    has_zeros: int,
) -> None:
    """As `linear_nibbles`, codes [strips, K / 4, ROWS] words."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 32, group, run, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    _multiply_codes(work, shape, outputs, x, Coded(codes, table, scales, zeros, shift, has_zeros))


@kernel
def linear_rows(
    work: Work,
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
    run: int,
    threads: int,
    has_bias: int,
    has_residual: int,
    group: int,
    nibble_rows: int,
    nibble_shift: float,
    code_shift: float,
    has_zeros: int,
) -> None:
    """The first `nibble_rows` of the weight are those of `linear_nibbles`, in strips of their own, the others
    those of `linear_codes`. rows [out_features] says which row of the output each is."""
    strips = (nibble_rows + ROWS - 1) // ROWS
    code_strips = (out_features - nibble_rows + ROWS - 1) // ROWS
    shape = shape_for(tokens, (strips + code_strips) * ROWS, in_features, x_stride, 32, group, run, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    narrow = Coded(nibbles, nibble_table, nibble_scales, nibble_zeros, nibble_shift, has_zeros)
    wide = Coded(codes, code_table, code_scales, code_zeros, code_shift, has_zeros)
    memory = memory_for(shape, x)
    piece = take(work, shape, memory, x, -1, True)
    while piece.tokens > 0:
        for strip in range(piece.first, piece.end):
            if strip < strips:
                _multiply_strip(shape, memory, narrow, strip, piece.tokens)
                first, end = strip * ROWS, nibble_rows
            else:
                _multiply_strip(shape, memory, wide, strip - strips, piece.tokens)
                first, end = nibble_rows + (strip - strips) * ROWS, out_features
            scatter(memory, outputs, piece, at(rows, first), min(ROWS, end - first), out_features)
        piece = take(work, shape, memory, x, piece.token, True)
    free_memory(memory)


@njit(error_model="numpy")
def _fill(memory: Memory) -> None:
    """The scales of weights that have none."""
    for i in range(0, ROWS, LANES):
        store(memory.scales, i, splat(float32(1), LANES))


@kernel
def linear_blocks(
    work: Work,
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
    run: int,
    threads: int,
    has_bias: int,
    has_residual: int,
    block_rows: int,
    block_columns: int,
) -> None:
    """blocks, those of a block row one after another for its first strip, then for its next one: of each
    [block_columns, ROWS] in words. row_starts [block rows + 1] counts blocks; columns are block columns."""
    shape = shape_for(
        tokens, out_features, in_features, x_stride, max(32, block_columns), in_features, run, threads
    )
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    memory = memory_for(shape, x)
    _fill(memory)
    strip_size = block_columns // columns_of(blocks) * ROWS
    strips = block_rows // ROWS
    piece = take(work, shape, memory, x, -1, False)
    while piece.tokens > 0:
        for strip in range(piece.first, piece.end):
            clear(memory, piece.tokens)
            first, end = row_starts[strip // strips], row_starts[strip // strips + 1]
            start = (first * strips + strip % strips * (end - first)) * strip_size
            for i in range(first, end):
                weights = at(blocks, start + (i - first) * strip_size)
                column = columns[i] * block_columns
                _multiply_block(shape, memory, weights, column, block_columns, piece.tokens)
            write(shape, memory, outputs, piece, strip)
        piece = take(work, shape, memory, x, piece.token, False)
    free_memory(memory)


@njit(error_model="numpy")
def _multiply_block(
    shape: Shape, memory: Memory, weights: Words, column: int, columns: int, tokens: int
) -> None:
    """Adds to the totals of a strip what one block of it gives, which begins at any column."""
    count = columns // columns_of(weights)
    unused = as_float32(weights)
    for t in range(0, tokens, MOST_TOKENS):
        group = min(MOST_TOKENS, tokens - t)
        x = at(memory.words, t * (shape.padded // columns_of(memory.words)))
        x = at(x, column // columns_of(memory.words) * width_for(group))
        multiply(weights, unused, x, group, 1, count, at(memory.totals, t * ROWS), memory.scales, 0)


@kernel
def linear_quads(
    work: Work,
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
    run: int,
    threads: int,
    has_bias: int,
    has_residual: int,
) -> None:
    """values [strips, K / 4, ROWS] quads, each value + 128 as a byte without a sign; scales [strips,
    ROWS]."""
    shape = shape_for(tokens, out_features, in_features, x_stride, 64, in_features, run, threads)
    outputs = Outputs(bias, residual, out, has_bias, has_residual)
    memory = memory_for(shape, x)
    words = as_quads(memory.words)
    steps = as_float32(memory.expanded)
    packed = -1
    piece = next_piece(work, shape)
    while piece.tokens > 0:
        if piece.token != packed:
            for t in range(0, piece.tokens, MOST_TOKENS):
                start, count = (piece.token + t) * x_stride, min(MOST_TOKENS, piece.tokens - t)
                to, sums = at(words, t * (shape.padded // 4)), at(memory.sums, t * PANEL)
                quantize(x, start, x_stride, in_features, shape.padded, count, to, at(steps, t), sums)
            packed = piece.token
        for strip in range(piece.first, piece.end):
            clear(memory, piece.tokens)
            for first in range(0, shape.padded, 2 * SLICE):
                count = min(2 * SLICE, shape.padded - first) // 4
                weights = at(values, (strip * shape.padded + first) // 4 * ROWS)
                for t in range(0, piece.tokens, MOST_TOKENS):
                    group = min(MOST_TOKENS, piece.tokens - t)
                    of_x = at(words, t * (shape.padded // 4) + first // 4 * width_for(group))
                    multiply_integers(weights, of_x, group, count, at(memory.totals, t * ROWS))
            _write_integers(shape, memory, outputs, piece, strip, steps, scales)
        piece = next_piece(work, shape)
    free_memory(memory)


@njit(error_model="numpy")
def _write_integers(
    shape: Shape, memory: Memory, outputs: Outputs, piece: Piece, strip: int, steps: Floats, scales: Floats
) -> None:
    row = strip * ROWS
    for t in range(piece.tokens):
        place = (piece.token + t) * shape.out_features + row
        excess = 128 * sum_integers(memory.sums, t * PANEL)
        for i in range(0, ROWS, LANES):
            y = integers_above(memory.totals, t * ROWS + i, excess) * splat(steps[t], LANES)
            write_vector(shape, outputs, y * load(scales, row + i, LANES), place + i, row + i)
