"""The products of paged attention by pairs of bfloat16 (`bfloat16_pairs`): what `attention_floats` does in
float32, in half the instructions and half the memory."""

from __future__ import annotations

from numba import float32, njit

from fastserve_kernels.cpu.kernels.attention_scratch import (
    Cache,
    Scratch,
    load_rows,
    prefetch_head,
    store_rows,
)
from fastserve_kernels.cpu.kernels.attention_tiles import BLOCK_N, AttentionShape, Tile, kv_tile_len
from fastserve_kernels.cpu.kernels.bfloat16_pairs import (
    PAIR_COLUMNS,
    as_int32,
    dot_pairs,
    store_pairs,
    store_transposed_pairs,
)
from fastserve_kernels.cpu.kernels.vectors import LANES, WIDE, at, load_masked, splat


@njit(error_model="numpy")
def load_kv_pairs(tile: Tile, shape: AttentionShape, scratch: Scratch, cache: Cache, base: int) -> None:
    """`load_kv_tile` for products of pairs: adjacent dimensions of a key, and a dimension of the values of
    adjacent keys; 0 for a last key that has no neighbour."""
    count = kv_tile_len(tile, base)
    keys, values = as_int32(scratch.keys), as_int32(scratch.values)
    zero = splat(float32(0), LANES)
    for j in range(0, count, 2):
        start, next_start = scratch.starts[j] * shape.dim_v, scratch.starts[j + 1] * shape.dim_v
        for i in range(0, shape.wide_dim_v, LANES):
            value, next_value = load_masked(cache.values, start + i, shape.dim_v - i), zero
            if j + 1 < count:
                next_value = load_masked(cache.values, next_start + i, shape.dim_v - i)
            store_pairs(value, next_value, values, j // 2 * shape.wide_dim_v + i)
    for first in range(0, count, LANES):
        starts = at(scratch.starts, first)
        for i in range(0, shape.dim, PAIR_COLUMNS):
            to = i // 2 * BLOCK_N + first
            store_transposed_pairs(at(cache.keys, i), starts, shape.dim, shape.dim - i, keys, to, BLOCK_N)


@njit(error_model="numpy")
def multiply_key_pairs(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int) -> None:
    """`multiply_keys` by pairs of dimensions; scores are not scaled yet."""
    queries, keys = as_int32(scratch.queries), as_int32(scratch.keys)
    first = row * shape.wide_dim
    second, third, fourth = first + shape.wide_dim, first + 2 * shape.wide_dim, first + 3 * shape.wide_dim
    for lane in range(0, BLOCK_N, WIDE):
        a = b = c = d = splat(float32(0), WIDE)
        for i in range((shape.dim + 1) // 2):
            if row + lane == 0:
                prefetch_head(cache.keys, scratch.next_starts[2 * i % BLOCK_N] * shape.dim, shape.dim)
                prefetch_head(cache.keys, scratch.next_starts[(2 * i + 1) % BLOCK_N] * shape.dim, shape.dim)
            place = i * BLOCK_N + lane
            a = dot_pairs(a, keys, place, queries[first + i])
            b = dot_pairs(b, keys, place, queries[second + i])
            c = dot_pairs(c, keys, place, queries[third + i])
            d = dot_pairs(d, keys, place, queries[fourth + i])
        store_rows(scratch.p, row * BLOCK_N + lane, BLOCK_N, a, b, c, d)


@njit(error_model="numpy")
def multiply_value_pairs(shape: AttentionShape, scratch: Scratch, cache: Cache, row: int, count: int) -> None:
    """`multiply_values` by pairs of keys."""
    p, values = as_int32(scratch.p), as_int32(scratch.values)
    if row == 0:
        for j in range((count + 1) // 2 * 2, BLOCK_N):
            prefetch_head(cache.values, scratch.next_starts[j] * shape.dim_v, shape.dim_v)
    for i in range(0, shape.wide_dim_v, WIDE):
        first = row * shape.wide_dim_v + i
        a, b, c, d = load_rows(scratch.acc, first, shape.wide_dim_v)
        for j in range((count + 1) // 2):
            if row + i == 0:
                prefetch_head(cache.values, scratch.next_starts[2 * j] * shape.dim_v, shape.dim_v)
                prefetch_head(cache.values, scratch.next_starts[2 * j + 1] * shape.dim_v, shape.dim_v)
            place, weight = j * shape.wide_dim_v + i, row * BLOCK_N + j
            a = dot_pairs(a, values, place, p[weight])
            b = dot_pairs(b, values, place, p[weight + BLOCK_N])
            c = dot_pairs(c, values, place, p[weight + 2 * BLOCK_N])
            d = dot_pairs(d, values, place, p[weight + 3 * BLOCK_N])
        store_rows(scratch.acc, first, shape.wide_dim_v, a, b, c, d)
