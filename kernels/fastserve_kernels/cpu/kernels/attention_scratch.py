"""A thread's memory in paged attention, and the cache that it reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from fastserve_kernels.cpu.kernels.aligned_memory import LINE, round_up
from fastserve_kernels.cpu.kernels.attention_tiles import BLOCK_N, AttentionShape
from fastserve_kernels.cpu.kernels.kernel import Floats, Integers, Stored
from fastserve_kernels.cpu.kernels.vectors import WIDE, as_int64, at, load, prefetch, size_of, store

ROWS = 4
"""Rows that are multiplied together: their sums of WIDE lanes fit the registers."""


class Cache(NamedTuple):
    """Keys and values; if these are quantized they are multiples of their head's scale."""

    keys: Stored
    values: Stored
    key_scales: Floats
    value_scales: Floats


class Scratch(NamedTuple):
    """A thread's memory: one kv tile of keys and values, and the rows of a tile; in float32, but for what is
    multiplied by pairs, which takes half of it."""

    keys: Floats
    """[dim, BLOCK_N], or pairs of dimensions [dim / 2, BLOCK_N]."""
    values: Floats
    """[BLOCK_N, wide_dim_v], or pairs of keys [BLOCK_N / 2, wide_dim_v]."""
    queries: Floats
    """[rows, wide_dim], scaled, or pairs, as they are, in the first half of each row."""
    p: Floats
    """[rows, BLOCK_N]: scores, then their exponentials, as pairs in the first half of each row."""
    acc: Floats
    """[rows, wide_dim_v]: the sum of exponential times value so far."""
    m_i: Floats
    """[rows]: the largest score so far, which is subtracted before the exponential."""
    l_i: Floats
    """[rows]: the sum of exponentials so far."""
    starts: Integers
    """[BLOCK_N] int64: which of the cache's keys each is, counting heads and all."""
    next_starts: Integers
    """[BLOCK_N] int64: those of the kv tile that is next."""


@njit(error_model="numpy")
def scratch_size(shape: AttentionShape, tile_len: int) -> int:
    """Of so many queries a tile, in floats."""
    rows = round_up(tile_len * shape.group, ROWS)
    of_row = shape.wide_dim + BLOCK_N + shape.wide_dim_v + 2
    return BLOCK_N * (4 + shape.wide_dim + shape.wide_dim_v) + rows * of_row


@njit(error_model="numpy")
def scratch_for(memory: Floats, shape: AttentionShape, tile_len: int) -> Scratch:
    """Memory of `scratch_size` cut up."""
    rows = round_up(tile_len * shape.group, ROWS)
    keys = at(memory, 4 * BLOCK_N)
    values = at(keys, BLOCK_N * shape.wide_dim)
    queries = at(values, BLOCK_N * shape.wide_dim_v)
    p = at(queries, rows * shape.wide_dim)
    acc = at(p, rows * BLOCK_N)
    m_i = at(acc, rows * shape.wide_dim_v)
    l_i = at(m_i, rows)
    starts, next_starts = as_int64(memory), as_int64(at(memory, 2 * BLOCK_N))
    return Scratch(keys, values, queries, p, acc, m_i, l_i, starts, next_starts)


@njit(error_model="numpy")
def prefetch_head(elements: Stored, start: int, count: int) -> None:
    """Has the memory of a head brought into the cache: blocks lie too far apart for the processor to foresee
    them. It can wait for few lines at once, so they are asked for between multiplications."""
    for i in range(0, count, LINE // size_of(elements)):
        prefetch(at(elements, start + i))


@njit(error_model="numpy")
def load_rows(pointer: Floats, first: int, stride: int) -> Any:
    """WIDE lanes of ROWS rows, `stride` apart, from pointer[first] on."""
    return (
        load(pointer, first, WIDE),
        load(pointer, first + stride, WIDE),
        load(pointer, first + 2 * stride, WIDE),
        load(pointer, first + 3 * stride, WIDE),
    )


@njit(error_model="numpy")
def store_rows(pointer: Floats, first: int, stride: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """What `load_rows` loads."""
    store(pointer, first, a)
    store(pointer, first + stride, b)
    store(pointer, first + 2 * stride, c)
    store(pointer, first + 3 * stride, d)
