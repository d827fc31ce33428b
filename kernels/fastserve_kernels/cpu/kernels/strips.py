"""How a linear is divided: into pieces of work, strips of rows and blocks of columns; and a thread's memory.

A *strip* is 32 rows of the weight, whose sums are computed together. A *block* is the columns that are added
up before they are scaled. A *piece* of work is a few strips for up to TOKENS tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import float32, njit, types

from fastserve_kernels.cpu.kernels.activations import (
    Words,
    as_elements,
    as_float32,
    as_words,
    pack,
    sum_groups,
)
from fastserve_kernels.cpu.kernels.kernel import Elements, Floats, Integers, Work, claim
from fastserve_kernels.cpu.kernels.products import MOST_TOKENS, multiply_groups, width_for
from fastserve_kernels.cpu.kernels.vectors import (
    LANES,
    at,
    load,
    load_part,
    splat,
    store,
    store_part,
)
from fastserve_kernels.cpu.kernels.words import PANELS, columns_of
from fastserve_kernels.cpu.kernels.words import ROWS as PANEL

ROWS = PANELS * PANEL
"""Of a strip."""
TOKENS = 256
"""Whose activations are put into words at a time, and who meet codes that were unpacked once."""
SLICE = 256
"""Columns of a strip that meet all these tokens before the next ones do."""
BLOCK = 128
"""Columns that are added up before they are scaled, unless a group has fewer."""

_allocate: Any = types.ExternalFunction("aligned_alloc", types.CPointer(float32)(types.intp, types.intp))
_free: Any = types.ExternalFunction("free", types.void(types.CPointer(float32)))


class Shape(NamedTuple):
    """What is the same for all pieces of work."""

    tokens: int
    out_features: int
    in_features: int
    x_stride: int
    padded: int
    """in_features in whole vectors."""
    block: int
    """Columns of a block."""
    groups: int
    """Of columns that share a scale: a block each, or one of all columns."""
    run: int
    """Strips of a piece of work, at least."""
    threads: int


class Outputs(NamedTuple):
    """Where the results go, and what is added to them."""

    bias: Elements
    residual: Elements
    out: Elements
    has_bias: int
    has_residual: int


class Memory(NamedTuple):
    """A thread's own."""

    words: Words
    """[tokens / 8, padded, W] activations."""
    sums: Floats
    """[tokens / 8, groups, 8] of the activations."""
    totals: Floats
    """[tokens, ROWS]."""
    scales: Floats
    """[groups, ROWS] of a strip."""
    zeros: Floats
    """[groups, ROWS] of a strip, times their scales, negative."""
    expanded: Words
    """[SLICE, ROWS] of a strip."""


class Piece(NamedTuple):
    """Strips `first` to `end`, for tokens `token` to token + tokens."""

    first: int
    end: int
    token: int
    tokens: int


@njit(error_model="numpy")
def shape_for(
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    multiple: int,
    group: int,
    run: int,
    threads: int,
) -> Shape:
    """`group` columns share a scale: 32, 64, 128, or all of them."""
    padded = _round_up(in_features, multiple)
    shared = group >= in_features
    block = BLOCK if shared else group
    groups = 1 if shared else in_features // group
    return Shape(tokens, out_features, in_features, x_stride, padded, block, groups, run, threads)


@njit(error_model="numpy")
def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


@njit(error_model="numpy")
def memory_for(shape: Shape, x: Elements) -> Memory:
    """To be freed by `free_memory`."""
    tokens = _round_up(min(shape.tokens, TOKENS), MOST_TOKENS)
    words = (tokens if shape.tokens > MOST_TOKENS else width_for(shape.tokens)) * shape.padded
    sums = tokens * max(shape.groups, PANEL)
    totals = tokens * ROWS
    scales = shape.groups * ROWS
    size = words + sums + totals + 2 * scales + SLICE * ROWS
    memory = _allocate(64, _round_up(4 * size, 64))
    to_sums = at(memory, words)
    to_totals = at(to_sums, sums)
    to_scales = at(to_totals, totals)
    to_zeros = at(to_scales, scales)
    expanded = as_words(x, at(to_zeros, scales))
    return Memory(as_words(x, memory), to_sums, to_totals, to_scales, to_zeros, expanded)


@njit(error_model="numpy")
def next_piece(work: Work, shape: Shape) -> Piece:
    """The next piece of work; beyond the last, one of no tokens.

    It is a thread's share of half of the strips that are left: few pieces are begun, for that takes a
    microsecond in which nothing is read ahead, and yet the threads end together."""
    strips = (shape.out_features + ROWS - 1) // ROWS
    first, size, token = 0, 0, 0
    for _ in range(claim(work) + 1):
        first += size
        if first == strips:
            first, token = 0, token + TOKENS
        left = strips - first
        size = min(left, max(shape.run, left // (2 * shape.threads)))
    return Piece(first, first + size, token, max(0, min(TOKENS, shape.tokens - token)))


@njit(error_model="numpy")
def free_memory(memory: Memory) -> None:
    _free(as_float32(memory.words))


@njit(error_model="numpy")
def take(work: Work, shape: Shape, memory: Memory, x: Elements, packed: int, with_sums: bool) -> Piece:
    """The next piece of work, whose tokens are in memory; `packed` is the first one of those that are
    already."""
    piece = next_piece(work, shape)
    if piece.tokens > 0 and piece.token != packed:
        _pack(shape, memory, x, piece, with_sums)
    return piece


@njit(error_model="numpy")
def _pack(shape: Shape, memory: Memory, x: Elements, piece: Piece, with_sums: bool) -> None:
    for t in range(0, piece.tokens, MOST_TOKENS):
        start, count = (piece.token + t) * shape.x_stride, min(MOST_TOKENS, piece.tokens - t)
        to = at(memory.words, t * (shape.padded // columns_of(memory.words)))
        pack(x, start, shape.x_stride, shape.in_features, shape.padded, count, to)
        if with_sums:
            sums = at(memory.sums, t * shape.groups)
            group = shape.block if shape.groups > 1 else shape.in_features
            sum_groups(x, start, shape.x_stride, shape.in_features, group, shape.groups, count, sums)


@njit(error_model="numpy")
def clear(memory: Memory, tokens: int) -> None:
    """Begins the totals at 0."""
    for i in range(0, tokens * ROWS, LANES):
        store(memory.totals, i, splat(float32(0), LANES))


@njit(error_model="numpy")
def subtract_zeros(shape: Shape, memory: Memory, tokens: int) -> None:
    """Begins the totals at what the zeros of a strip's groups make of the sums of the activations."""
    for t in range(0, tokens, MOST_TOKENS):
        sums, totals = at(memory.sums, t * shape.groups), at(memory.totals, t * ROWS)
        multiply_groups(memory.zeros, sums, min(MOST_TOKENS, tokens - t), shape.groups, totals)


@njit(error_model="numpy")
def write(shape: Shape, memory: Memory, outputs: Outputs, piece: Piece, strip: int) -> None:
    """The results of a strip from its totals."""
    row = strip * ROWS
    for t in range(piece.tokens):
        place = (piece.token + t) * shape.out_features + row
        for i in range(0, ROWS, LANES):
            write_vector(shape, outputs, load(memory.totals, t * ROWS + i, LANES), place + i, row + i)


@njit(error_model="numpy")
def write_vector(shape: Shape, outputs: Outputs, y: Any, place: int, row: int) -> None:
    """LANES results, of which the last rows may not be there."""
    left = shape.out_features - row
    if outputs.has_bias:
        y = y + load_part(outputs.bias, row, left)
    if outputs.has_residual:
        y = y + load_part(outputs.residual, place, left)
    store_part(outputs.out, place, y, left)


@njit(error_model="numpy")
def scatter(
    memory: Memory, outputs: Outputs, piece: Piece, rows: Integers, count: int, out_features: int
) -> None:
    """The results of a strip of `count` rows from its totals, each to row rows[i] of the output."""
    buffer = as_elements(outputs.out, memory.expanded)
    for t in range(piece.tokens):
        totals, place = at(memory.totals, t * ROWS), (piece.token + t) * out_features
        if outputs.has_bias:
            _add_rows(totals, outputs.bias, rows, count, buffer)
        if outputs.has_residual:
            _add_rows(totals, at(outputs.residual, place), rows, count, buffer)
        for i in range(0, ROWS, LANES):
            store(buffer, i, load(totals, i, LANES))
        to = at(outputs.out, place)
        if count == ROWS:  # a number that the compiler knows: no loop is left
            for i in range(ROWS):
                to[rows[i]] = buffer[i]
        else:
            for i in range(count):
                to[rows[i]] = buffer[i]


@njit(error_model="numpy")
def _add_rows(totals: Floats, source: Elements, rows: Integers, count: int, buffer: Elements) -> None:
    for i in range(count):
        buffer[i] = source[rows[i]]
    for i in range(0, ROWS, LANES):
        store(totals, i, load(totals, i, LANES) + load_part(buffer, i, count - i))
